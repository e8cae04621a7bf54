//! The link between a machine and a process of its own: a pair of sockets that keep messages apart and in order.
//!
//! Nothing is lost on the way: a sender that finds no room waits. When one end closes, the other reads the end.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, recv, sendmsg,
    socketpair, sockopt,
};

/// Room for several of the largest messages; the host may give less.
const BUFFER: usize = 4 << 20;

/// One end of the link.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
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
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// The end that another process was given.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
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
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// Sends a message in pieces, whole or not at all, without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; another when the other end is gone.
    pub fn send(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        use rustix::io::Errno;
        let mut none = SendAncillaryBuffer::default();
        match sendmsg(&self.socket, pieces, &mut none, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            // No memory for it now is as good as no room.
            Err(Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a message into `buffer`. `None` when the other end is closed. Waits if `wait`.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn receive(&self, buffer: &mut [u8], wait: bool) -> io::Result<Option<usize>> {
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

    /// Ends the link for both ends, and wakes whoever waits.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
