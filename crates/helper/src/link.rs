//! The link between a machine and a process of its own: a pair of sockets that keep messages apart and in order, and, for who moves
//! much, two rings of memory that both have mapped.
//!
//! Nothing is lost on the way: a sender that finds no room waits. When one end closes, the other reads the end. With
//! rings the sockets are a bell, which is rung only for an end that sleeps, and tell that the other end is gone.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ringfence_memory::SharedMemory;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, recv, sendmsg,
    socketpair, sockopt,
};

use crate::ring::RingError;
use crate::rings::{self, Rings};

/// Room for several of the largest messages; the host may give less.
const BUFFER: usize = 4 << 20;

/// One end of the link.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    rings: Option<Arc<Rings>>,
}

/// Rings that the other end is to take, and has not yet.
#[derive(Debug)]
pub(crate) struct Offer {
    rings: Rings,
    file: OwnedFd,
}

impl Link {
    /// Both ends of a new link.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        for end in [&a, &b] {
            let _ = sockopt::set_socket_send_buffer_size(end, BUFFER);
        }
        Ok((Self::new(a), Self::new(b)))
    }

    /// Both ends of a new link with rings for messages of up to `longest` bytes.
    ///
    /// # Errors
    /// No descriptors left, or no memory.
    pub fn pair_with_rings(longest: usize) -> io::Result<(Self, Self)> {
        let (mut a, mut b) = Self::pair()?;
        let offer = a.offer_rings(longest)?;
        b.take_rings(longest)?;
        a.use_rings(offer);
        Ok((a, b))
    }

    /// The end that another process was given.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, rings: None }
    }

    /// The descriptor, to give to another process.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Another handle on the same end.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, rings: self.rings.clone() })
    }

    /// Makes rings for messages of up to `longest` bytes and sends them to the other end.
    pub(crate) fn offer_rings(&self, longest: usize) -> io::Result<Offer> {
        let (rings, file) = Rings::create(longest).map_err(io::Error::other)?;
        rings::offer(&self.socket, &file)?;
        Ok(Offer { rings, file })
    }

    /// Sends and receives by rings from now on: the other end has taken them.
    pub(crate) fn use_rings(&mut self, offer: Offer) {
        SharedMemory::close(&offer.file);
        self.rings = Some(Arc::new(offer.rings));
    }

    /// Takes the rings that the other end offers, for messages of up to `longest` bytes, and sends and receives by them from now on.
    /// Waits for them.
    ///
    /// # Errors
    /// It offers none, or not those, or memory that could be taken away.
    pub fn take_rings(&mut self, longest: usize) -> io::Result<()> {
        let file = rings::take(&self.socket)?;
        let rings = Rings::open(file.as_fd(), longest).map_err(io::Error::other)?;
        self.rings = Some(Arc::new(rings));
        Ok(())
    }

    /// Sends a message in pieces, whole or not at all, without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; `InvalidInput` for one that is empty or too long for the rings; another when the other
    /// end is gone, or has broken the rings' rules.
    pub fn send(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        use rustix::io::Errno;
        if let Some(rings) = &self.rings {
            return rings.send(&self.socket, pieces);
        }
        let mut none = SendAncillaryBuffer::default();
        match sendmsg(&self.socket, pieces, &mut none, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            // No memory for it now is as good as no room.
            Err(Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a message into `buffer`, as much of it as there is room for. `None` when the other end is closed, which with rings is
    /// noticed by waiting ([`Link::wait`]). Waits if `wait`.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; `InvalidData` when the other end has broken the rings' rules.
    pub fn receive(&self, buffer: &mut [u8], wait: bool) -> io::Result<Option<usize>> {
        if let Some(rings) = &self.rings {
            loop {
                match rings.receive(&self.socket, buffer) {
                    Err(error) if wait && error.kind() == io::ErrorKind::WouldBlock => self.sleep()?,
                    other => return other,
                }
            }
        }
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            match recv(&self.socket, &mut *buffer, flags) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Ok((len, _)) => return Ok(Some(len)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a message or the end.
    fn sleep(&self) -> io::Result<()> {
        self.wait(PollFlags::IN, |watched, at_once| {
            if at_once {
                return Ok(PollFlags::empty());
            }
            let mut fds = [PollFd::from_borrowed_fd(self.as_fd(), watched)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => Ok(fds[0].revents()),
                Err(error) => Err(error.into()),
            }
        })
        .map(drop)
    }

    /// Waits, among other things, for what is `wanted` of the link, `IN` or `OUT`: what it is ready for, and `HUP` if it is of no more
    /// use. `sleep` does the waiting. It is given what to watch the link's socket for, and whether that is all it is to do, since the
    /// link is ready as it is; and says what the socket was ready for. Only one thread at a time waits for a link.
    ///
    /// # Errors
    /// Those of `sleep`.
    pub fn wait(
        &self,
        wanted: PollFlags,
        sleep: impl FnOnce(PollFlags, bool) -> io::Result<PollFlags>,
    ) -> io::Result<PollFlags> {
        let Some(rings) = &self.rings else { return sleep(wanted, false) };
        let at_once = !rings.before_sleep(&self.socket, wanted).is_empty();
        // Whatever is wanted, the other end rings for it.
        let seen = sleep(PollFlags::IN, at_once)?;
        Ok(rings.after_sleep(&self.socket, wanted, !seen.is_empty()))
    }

    /// The rule of the rings that the other end has broken, after which the link is of no use.
    pub fn fault(&self) -> Option<RingError> {
        self.rings.as_ref()?.fault()
    }

    /// Ends the link for both ends, and wakes whoever waits.
    pub fn shutdown(&self) {
        if let Some(rings) = &self.rings {
            rings.end();
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests;
