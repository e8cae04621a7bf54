//! A tap device of the host: frames pass between it and the link as they are.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};

use crate::error::NetError;
use crate::limit::{Limiter, time_until};
use crate::spec::NetSpec;
use crate::wire::{CONTROL, MAX_MESSAGE, Offloads, VNET};
use ringfence_helper::Link;

/// Frames passed one way before the other has its turn.
const BATCH: usize = 64;

mod sys {
    //! The three requests of linux/if_tun.h.
    #![allow(unsafe_code, reason = "ioctls")]

    use std::fs::File;
    use std::io;

    use rustix::ioctl::{IntegerSetter, Setter, ioctl};

    const TUNSETIFF: u32 = 0x4004_54ca;
    const TUNSETOFFLOAD: u32 = 0x4004_54d0;
    const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
    const IFF_TAP: u16 = 2;
    const IFF_NO_PI: u16 = 0x1000;
    const IFF_VNET_HDR: u16 = 0x4000;

    /// `struct ifreq` with its name and flags.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }

    /// Makes `file` the other end of the tap device `name`, with headers of `header` bytes.
    pub(super) fn attach(file: &File, name: &str, header: usize) -> io::Result<()> {
        let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
        for (to, from) in request.name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `Request` is in size and layout.
        unsafe { ioctl(file, Setter::<{ TUNSETIFF as _ }, Request>::new(request)) }?;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { ioctl(file, Setter::<{ TUNSETVNETHDRSZ as _ }, i32>::new(header as i32)) }?;
        Ok(())
    }

    /// Says which unfinished frames may be read from it: `TUN_F_` bits.
    pub(super) fn offload(file: &File, bits: usize) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { ioctl(file, IntegerSetter::<{ TUNSETOFFLOAD as _ }>::new_usize(bits)) }?;
        Ok(())
    }
}

/// Passes frames between the tap device and `link` until that closes.
pub(crate) fn serve(
    link: &Link,
    name: &str,
    spec: &NetSpec,
    ready: impl FnOnce(&Link),
) -> Result<(), NetError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(0o4000).open("/dev/net/tun");
    let tap = opened
        .and_then(|tap| sys::attach(&tap, name, VNET).map(|()| tap))
        .map_err(|source| NetError::Tap { name: name.to_owned(), source })?;
    ready(link);
    pass(link, &tap, spec).map_err(NetError::Host)
}

fn pass(link: &Link, tap: &File, spec: &NetSpec) -> io::Result<()> {
    let mut limits = [Limiter::new(spec.bytes, spec.packets), Limiter::new(spec.bytes, spec.packets)];
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    let mut waiting: Option<Vec<u8>> = None;
    loop {
        let now = Instant::now();
        let mut retries = [None, None];
        let open = [0, 1].map(|way| limits[way].passes(now, &mut retries[way]));
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, open[0]);
        wanted.set(PollFlags::OUT, waiting.is_some());
        let tap_flags = if open[1] && waiting.is_none() { PollFlags::IN } else { PollFlags::empty() };
        let mut from_tap = PollFlags::empty();
        let from_link = link.wait(wanted, |watched, at_once| {
            let mut fds = [
                PollFd::from_borrowed_fd(link.as_fd(), watched),
                PollFd::from_borrowed_fd(tap.as_fd(), tap_flags),
            ];
            let until = if at_once { Some(now) } else { retries.into_iter().flatten().min() };
            match poll(&mut fds, until.map(|at| time_until(at, now)).as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            from_tap = fds[1].revents();
            Ok(fds[0].revents())
        })?;
        if from_link.contains(PollFlags::HUP) {
            return link.fault().map_or(Ok(()), |fault| Err(io::Error::other(fault)));
        }
        if from_link.contains(PollFlags::IN) && !outward(link, tap, &mut limits[0], &mut buffer)? {
            return Ok(());
        }
        if let Some(frame) = &waiting {
            if from_link.contains(PollFlags::OUT) && send(link, frame)? {
                waiting = None;
            }
        } else if from_tap.contains(PollFlags::IN) {
            waiting = inward(link, tap, &mut limits[1], &mut buffer)?;
        }
    }
}

/// Some of the guest's frames. False if the link has ended.
fn outward(link: &Link, mut tap: &File, limit: &mut Limiter, buffer: &mut [u8]) -> io::Result<bool> {
    for _ in 0..BATCH {
        if !limit.passes(Instant::now(), &mut None) {
            break;
        }
        match link.receive(buffer, false) {
            Ok(None) => return Ok(false),
            Ok(Some(len)) => {
                limit.take(len);
                match buffer[..len] {
                    [CONTROL, bits, ..] => offload(tap, Offloads::from_bits(bits)),
                    // A frame that the host does not take is lost, as on any wire.
                    ref frame if len <= MAX_MESSAGE => drop(tap.write(frame)),
                    _ => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Some frames for the guest, until the link has no room for one: that one.
fn inward(
    link: &Link,
    mut tap: &File,
    limit: &mut Limiter,
    buffer: &mut [u8],
) -> io::Result<Option<Vec<u8>>> {
    for _ in 0..BATCH {
        if !limit.passes(Instant::now(), &mut None) {
            break;
        }
        match tap.read(buffer) {
            Ok(len) => {
                limit.take(len);
                if !send(link, &buffer[..len])? {
                    return Ok(Some(buffer[..len].to_vec()));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// False if the link has no room.
fn send(link: &Link, frame: &[u8]) -> io::Result<bool> {
    match link.send(&[IoSlice::new(frame)]) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

fn offload(tap: &File, offloads: Offloads) {
    // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6.
    let Offloads { checksum, tso4, tso6 } = offloads;
    let _ = sys::offload(tap, usize::from(checksum) | usize::from(tso4) << 1 | usize::from(tso6) << 2);
}
