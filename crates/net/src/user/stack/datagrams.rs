//! Datagrams and echo requests of the guest's, and datagrams for forwarded ports.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Instant;

use super::waiting::watch;
use super::{BATCH, Caller, Socket, Stack, TIDY};
use crate::user::addresses::{self, GATEWAY, GUEST, Way, way};
use crate::user::datagram::{self, Datagrams, Kind};
use crate::user::dhcp;
use crate::user::tcp::Key;
use crate::wire::{Packet, be16};

impl Stack {
    pub(super) fn forget(&mut self, key: (Kind, Key)) {
        if let Some(socket) = self.datagrams.remove(&key) {
            self.tokens.remove(&socket.token);
        }
    }

    pub(super) fn udp(&mut self, packet: &Packet<'_>, trusted: bool, now: Instant) -> Option<()> {
        let bytes = packet.payload;
        let (source, destination) = (be16(bytes, 0)?, be16(bytes, 2)?);
        let body = bytes.get(8..usize::from(be16(bytes, 4)?))?;
        let summed = be16(bytes, 6)? != 0;
        if !trusted && summed && !packet.sum_is_right() {
            return None;
        }
        if destination == 67 && packet.source.is_ipv4() {
            let (answer, to) = dhcp::answer(body, self.mtu, self.restrict)?;
            self.out.udp([GATEWAY.into(), to.into()], [67, 68], &answer);
            return Some(());
        }
        let key = Key {
            guest: SocketAddr::new(packet.source, source),
            remote: SocketAddr::new(packet.destination, destination),
        };
        if packet.destination == IpAddr::V4(GATEWAY)
            && let Some(caller) = self.callers.get_mut(&destination)
            && let Some((socket, port)) = self.udp_forwards.get(caller.forward)
            && *port == source
        {
            caller.used = now;
            let _ = socket.send_to(body, caller.peer);
            return Some(());
        }
        self.datagram(Kind::Udp, key, body, now)
    }

    /// Sends a datagram by the socket for its two ends, which is made if it is not there.
    pub(super) fn datagram(&mut self, kind: Kind, key: Key, body: &[u8], now: Instant) -> Option<()> {
        if self.restrict || !addresses::is_a_guests(key.guest.ip()) {
            return None;
        }
        if !self.datagrams.contains_key(&(kind, key)) {
            self.open(kind, key, now)?;
        }
        let socket = self.datagrams.get_mut(&(kind, key))?;
        socket.used = now;
        let sent = socket.socket.send(body);
        self.note_question(kind, key, body, now);
        if sent.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            self.refused(kind, key, now);
        }
        Some(())
    }

    /// Makes the socket for two ends; the one longest unused makes room for it.
    pub(super) fn open(&mut self, kind: Kind, key: Key, now: Instant) -> Option<()> {
        if self.datagrams.len() >= datagram::MAX {
            let oldest = self.datagrams.iter().min_by_key(|(_, socket)| socket.used).map(|(key, _)| *key);
            oldest.into_iter().for_each(|key| self.forget(key));
        }
        let token = self.token();
        let socket = match kind {
            // A host may be without a way to one of the resolvers.
            Kind::Udp => self.try_ways(key.remote, now, |to| Datagrams::open(kind, key, to, token, now))?,
            // Any port but zero: only the address counts.
            Kind::Echo => match way(SocketAddr::new(key.remote.ip(), 1)) {
                Way::Host(to) => {
                    let to = SocketAddr::new(to.ip(), 0);
                    #[cfg(any(test, feature = "fuzzing"))]
                    let to = self.lead(to);
                    let opened = Datagrams::open(kind, key, to, token, now);
                    self.note_refusal(&opened);
                    opened.ok()?
                }
                _ => return None,
            },
        };
        watch(&self.epoll, socket.socket.as_fd(), token, (false, false), (true, false));
        self.tokens.insert(token, Socket::Datagrams(kind, key));
        self.datagrams.insert((kind, key), socket);
        self.tidy = self.tidy.or(Some(now + TIDY));
        Some(())
    }

    /// Tells the user, once, that the host lets nobody ping.
    fn note_refusal(&mut self, opened: &io::Result<Datagrams>) {
        let refused = opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        if refused && !std::mem::replace(&mut self.no_echo, true) {
            eprintln!(
                "ringfence: this host does not let its users ping (net.ipv4.ping_group_range), so the guest can ping \
                 its gateway only"
            );
        }
    }

    pub(super) fn refused(&mut self, kind: Kind, key: Key, now: Instant) {
        if self.ask_next((kind, key), now) {
            return;
        }
        self.forget((kind, key));
        if kind == Kind::Udp {
            let (ips, message) = datagram::unreachable(key);
            self.out.icmp(ips, &message);
        }
    }

    /// Answers to a datagram of the guest's.
    pub(super) fn answered(&mut self, kind: Kind, key: Key, now: Instant) {
        for _ in 0..BATCH {
            let Some(socket) = self.datagrams.get_mut(&(kind, key)) else { return };
            match socket.socket.recv(&mut self.buffer) {
                Ok(len) => {
                    (socket.used, socket.asked) = (now, None);
                    let body = &self.buffer[..len];
                    let ips = [key.remote.ip(), key.guest.ip()];
                    match kind {
                        Kind::Udp => self.out.udp(ips, [key.remote.port(), key.guest.port()], body),
                        Kind::Echo => {
                            let reply = datagram::echo(body, ips[0].is_ipv4(), false, key.guest.port());
                            reply.into_iter().for_each(|reply| self.out.icmp(ips, &reply));
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.refused(kind, key, now),
            }
        }
    }

    /// An echo request: ours are answered here, others go by the host.
    pub(super) fn echo(&mut self, packet: &Packet<'_>, now: Instant) -> Option<()> {
        let (message, v4) = (packet.payload, packet.source.is_ipv4());
        let request = if v4 { 8 } else { 128 };
        if message.len() < 8 || message[..2] != [request, 0] {
            return None;
        }
        let identifier = be16(message, 4)?;
        if addresses::is_ours(packet.destination) {
            let reply = datagram::echo(message, v4, false, identifier)?;
            self.out.icmp([packet.destination, packet.source], &reply);
            return Some(());
        }
        let key = Key {
            guest: SocketAddr::new(packet.source, identifier),
            remote: SocketAddr::new(packet.destination, 0),
        };
        let message = datagram::echo(message, v4, true, identifier)?;
        self.datagram(Kind::Echo, key, &message, now)
    }

    /// Datagrams for a forwarded port.
    pub(super) fn called(&mut self, index: usize, now: Instant) {
        for _ in 0..BATCH {
            let Some((socket, port)) = self.udp_forwards.get(index) else { return };
            let port = *port;
            let Ok((len, peer)) = socket.recv_from(&mut self.buffer) else { return };
            let known = |(at, caller): (&u16, &Caller)| {
                (caller.forward == index && caller.peer == peer).then_some(*at)
            };
            let from = match self.callers.iter().find_map(known) {
                Some(from) => from,
                None => {
                    if self.callers.len() >= datagram::MAX {
                        let oldest =
                            self.callers.iter().min_by_key(|(_, caller)| caller.used).map(|(at, _)| *at);
                        if let Some(at) = oldest {
                            self.callers.remove(&at);
                        }
                    }
                    let from = (0..1024).find_map(|_| {
                        let at = self.port();
                        (!self.callers.contains_key(&at)).then_some(at)
                    });
                    let Some(from) = from else { continue };
                    from
                }
            };
            self.callers.insert(from, Caller { forward: index, peer, used: now });
            self.tidy = self.tidy.or(Some(now + TIDY));
            let ips: [Ipv4Addr; 2] = [GATEWAY, GUEST];
            self.out.udp(ips.map(IpAddr::from), [from, port], &self.buffer[..len]);
        }
    }
}
