//! Sockets for datagrams: UDP, and ICMP echo where the host lets its users send it.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};

use crate::user::resolver::Asked;
use crate::user::tcp::Key;

/// At most so many at a time; the one longest unused makes room for a new one.
pub(crate) const MAX: usize = 512;
const IDLE: Duration = Duration::from_secs(60);
/// For what is one question and one answer.
const SHORT: Duration = Duration::from_secs(10);

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Udp,
    /// Echo; the ports of a [`Key`] are the identifier and zero.
    Echo,
}

#[derive(Debug)]
pub(crate) struct Datagrams {
    kind: Kind,
    key: Key,
    pub(crate) socket: UdpSocket,
    pub(crate) token: u64,
    pub(crate) used: Instant,
    /// The question to a resolver that has no answer yet.
    pub(crate) asked: Option<Asked>,
}

impl Datagrams {
    /// A socket connected to `to`.
    pub(crate) fn open(kind: Kind, key: Key, to: SocketAddr, token: u64, now: Instant) -> io::Result<Self> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let protocol = match (kind, to) {
            (Kind::Udp, _) => ipproto::UDP,
            (Kind::Echo, SocketAddr::V4(_)) => ipproto::ICMP,
            (Kind::Echo, SocketAddr::V6(_)) => ipproto::ICMPV6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
        connect(&socket, &to)?;
        Ok(Self { kind, key, socket: socket.into(), token, used: now, asked: None })
    }

    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        let short = self.kind == Kind::Echo || self.key.remote.port() == 53;
        now.saturating_duration_since(self.used) > if short { SHORT } else { IDLE }
    }
}

/// An echo request or reply with another identifier and a zero checksum. `None` if it is too short.
pub(crate) fn echo(message: &[u8], v4: bool, request: bool, identifier: u16) -> Option<Vec<u8>> {
    let kind = match (v4, request) {
        (true, true) => 8,
        (true, false) => 0,
        (false, true) => 128,
        (false, false) => 129,
    };
    if message.len() < 8 {
        return None;
    }
    let mut out = message.to_vec();
    (out[0], out[1], out[2], out[3]) = (kind, 0, 0, 0);
    out[4..6].copy_from_slice(&identifier.to_be_bytes());
    Some(out)
}

/// "Port unreachable" for a datagram that went from `key.guest` to `key.remote` (RFC 792, RFC 4443 3.1).
pub(crate) fn unreachable(key: Key) -> ([IpAddr; 2], Vec<u8>) {
    use crate::wire::{ETH, UDP, VNET, headers};
    let (guest, remote) = (key.guest, key.remote);
    let mut original = Vec::new();
    headers(&mut original, [[0; 6]; 2], guest.ip(), remote.ip(), UDP, 8);
    let mut message = if guest.is_ipv4() { vec![3, 3] } else { vec![1, 4] };
    message.extend_from_slice(&[0; 6]);
    message.extend_from_slice(&original[VNET + ETH..]);
    message.extend_from_slice(&guest.port().to_be_bytes());
    message.extend_from_slice(&remote.port().to_be_bytes());
    message.extend_from_slice(&[0, 8, 0, 0]);
    ([remote.ip(), guest.ip()], message)
}
