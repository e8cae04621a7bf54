//! Both directions of a link through shared memory, with the link's sockets as the bell.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ringfence_memory::{SharedError, SharedMemory};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::ring::{Place, Receiver, RingError, Sender, WORDS};

/// Where packets begin: behind a page of words.
const PACKETS: usize = 4096;
/// Bells heard at a time. There are more only if the other end rings without need.
const BELLS: usize = 16;

/// One end's rings.
#[derive(Debug)]
pub(crate) struct Rings {
    out: Mutex<Sender>,
    inward: Mutex<Receiver>,
    longest: usize,
    /// The other end is gone.
    ended: AtomicBool,
    /// What the other end has done.
    fault: OnceLock<RingError>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of memory for packets of up to `longest` bytes.
pub(crate) fn size(longest: usize) -> usize {
    PACKETS + 2 * Place::capacity_for(longest)
}

/// The two rings: of packets from who made the memory, and to it.
pub(crate) fn places(memory: SharedMemory, longest: usize) -> [Place; 2] {
    let memory = Arc::new(memory);
    [0, 1].map(|way| Place {
        memory: Arc::clone(&memory),
        words: way * WORDS,
        packets: PACKETS + way * Place::capacity_for(longest),
        longest,
    })
}

impl Rings {
    /// Rings for packets of up to `longest` bytes, and the file to give to the other end.
    pub(crate) fn create(longest: usize) -> Result<(Self, OwnedFd), SharedError> {
        let (memory, file) = SharedMemory::create("ringfence-link", size(longest))?;
        let [out, inward] = places(memory, longest);
        Ok((Self::new(out, inward), file))
    }

    /// The other end's.
    pub(crate) fn open(file: BorrowedFd<'_>, longest: usize) -> Result<Self, SharedError> {
        let [inward, out] = places(SharedMemory::open(file, size(longest))?, longest);
        Ok(Self::new(out, inward))
    }

    pub(crate) fn new(out: Place, inward: Place) -> Self {
        Self {
            longest: out.longest,
            out: Mutex::new(Sender::new(out)),
            inward: Mutex::new(Receiver::new(inward)),
            ended: AtomicBool::new(false),
            fault: OnceLock::new(),
        }
    }

    pub(crate) fn send(&self, socket: &OwnedFd, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        if len == 0 || len > self.longest {
            return Err(ErrorKind::InvalidInput.into());
        }
        self.check()?;
        if self.is_over() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        match lock(&self.out).send(pieces, len) {
            Ok(Some(false)) => Ok(()),
            Ok(Some(true)) => {
                self.ring(socket);
                if self.is_over() { Err(ErrorKind::BrokenPipe.into()) } else { Ok(()) }
            }
            Ok(None) => Err(ErrorKind::WouldBlock.into()),
            Err(error) => Err(self.fail(socket, error)),
        }
    }

    pub(crate) fn receive(&self, socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.check()?;
        // Before looking: what was sent before the end is received.
        let over = self.is_over();
        match lock(&self.inward).receive(buffer) {
            Ok(Some((len, ring))) => {
                if ring {
                    self.ring(socket);
                }
                Ok(Some(len))
            }
            Ok(None) if over => Ok(None),
            Ok(None) => Err(ErrorKind::WouldBlock.into()),
            Err(error) => Err(self.fail(socket, error)),
        }
    }

    /// What there is of `wanted` already. For the rest of it the other end will ring.
    pub(crate) fn before_sleep(&self, socket: &OwnedFd, wanted: PollFlags) -> PollFlags {
        self.ready(socket, wanted, |receiver| receiver.ask_for_packets(), |sender| sender.ask_for_room())
    }

    /// What there is of `wanted` after a sleep, whose end may have been the bell.
    pub(crate) fn after_sleep(&self, socket: &OwnedFd, wanted: PollFlags, bell: bool) -> PollFlags {
        lock(&self.inward).stay_awake();
        if bell {
            self.hear(socket);
        }
        self.ready(socket, wanted, |receiver| receiver.has_packets(), |sender| sender.has_room())
    }

    fn ready(
        &self,
        socket: &OwnedFd,
        wanted: PollFlags,
        packets: impl FnOnce(&mut Receiver) -> Result<bool, RingError>,
        room: impl FnOnce(&mut Sender) -> Result<bool, RingError>,
    ) -> PollFlags {
        let mut ready = PollFlags::empty();
        let mut note = |flag, is: Result<bool, RingError>| match is {
            Ok(is) => ready.set(flag, is),
            Err(error) => drop(self.fail(socket, error)),
        };
        if wanted.contains(PollFlags::IN) {
            note(PollFlags::IN, packets(&mut lock(&self.inward)));
        }
        if wanted.contains(PollFlags::OUT) {
            note(PollFlags::OUT, room(&mut lock(&self.out)));
        }
        ready.set(PollFlags::HUP, self.is_over() || self.fault.get().is_some());
        ready
    }

    /// Has nobody wait for the other end any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// The rule that the other end has broken.
    pub(crate) fn fault(&self) -> Option<RingError> {
        self.fault.get().copied()
    }

    fn is_over(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn check(&self) -> io::Result<()> {
        self.fault().map_or(Ok(()), |error| Err(io::Error::new(ErrorKind::InvalidData, error)))
    }

    /// The link is of no more use to either end.
    fn fail(&self, socket: &OwnedFd, error: RingError) -> io::Error {
        let error = *self.fault.get_or_init(|| error);
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        io::Error::new(ErrorKind::InvalidData, error)
    }

    /// Wakes the other end. Where there is no room for that it has not heard what was rung before, and is awake.
    fn ring(&self, socket: &OwnedFd) {
        loop {
            match send(socket, &[0], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return self.end(),
                _ => return,
            }
        }
    }

    /// Takes the bells that were rung.
    fn hear(&self, socket: &OwnedFd) {
        for _ in 0..BELLS {
            match recv(socket, &mut [0; 1], RecvFlags::DONTWAIT) {
                Ok((1.., _)) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                _ => return self.end(),
            }
        }
    }
}

/// The first message of an end that has rings, with their memory.
const OFFER: u8 = 0x82;

/// Gives the other end the memory.
pub(crate) fn offer(socket: &OwnedFd, file: &OwnedFd) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(ErrorKind::OutOfMemory.into());
    }
    sendmsg(socket, &[IoSlice::new(&[OFFER])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes it.
pub(crate) fn take(socket: &OwnedFd) -> io::Result<OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut kind = [0; 1];
    let got = loop {
        let pieces = &mut [io::IoSliceMut::new(&mut kind)];
        match recvmsg(socket, pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?.bytes,
        }
    };
    let file = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    file.filter(|_| (got, kind) == (1, [OFFER])).ok_or_else(|| ErrorKind::InvalidData.into())
}
