//! The guest's TCP connections, and those of clients of forwarded ports.

use std::hash::BuildHasher;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};

use super::waiting::watch;
use super::{BATCH, MAX_FLOWS, MEMORY, Socket, Stack};
use crate::user::addresses::{self, GATEWAY, GUEST};
use crate::user::tcp::{Flow, Key, LITTLE_ROOM, ROOM};
use crate::wire::{ACK, FIN, Packet, RST, SYN, Segment};

impl Stack {
    pub(super) fn tcp(&mut self, packet: &Packet<'_>, now: Instant) -> Option<()> {
        let segment = Segment::read(packet.payload)?;
        let key = Key {
            guest: SocketAddr::new(packet.source, segment.source),
            remote: SocketAddr::new(packet.destination, segment.destination),
        };
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.segment(&segment, &mut self.out, now);
            if !flow.touched || flow.is_over() {
                self.settle(key);
            } else if self.touched.last() != Some(&key) {
                self.touched.push(key);
            }
            return Some(());
        }
        if segment.flags & RST != 0 {
            return None;
        }
        if segment.flags & (SYN | ACK) == SYN
            && !self.restrict
            && self.flows.len() < MAX_FLOWS
            && addresses::is_a_guests(key.guest.ip())
            && self.call_out(key, &segment, now).is_some()
        {
            return Some(());
        }
        self.refuse(key, &segment);
        None
    }

    /// The answer to a segment that belongs to nothing (RFC 9293 3.10.7.1).
    pub(super) fn refuse(&mut self, key: Key, segment: &Segment<'_>) {
        let syn_fin = u32::from(segment.flags & SYN != 0) + u32::from(segment.flags & FIN != 0);
        let (seq, ack, flags) = if segment.flags & ACK != 0 {
            (segment.ack, 0, RST)
        } else {
            (0, segment.seq.wrapping_add(segment.payload.len() as u32 + syn_fin), RST | ACK)
        };
        let answer = Segment {
            source: key.remote.port(),
            destination: key.guest.port(),
            seq,
            ack,
            flags,
            ..Segment::default()
        };
        self.out.tcp(&answer, [key.remote.ip(), key.guest.ip()], [&[], &[]], 536);
    }

    pub(super) fn call_out(&mut self, key: Key, syn: &Segment<'_>, now: Instant) -> Option<()> {
        let stream = self.try_ways(key.remote, now, begin_connecting)?;
        let token = self.token();
        prepare(&stream);
        let isn = self.random.hash_one((token, key)) as u32;
        let flow = Flow::outward(key, token, stream, syn, self.out.mss(key.guest.is_ipv4()), isn);
        self.adopt(key, flow);
        Some(())
    }

    pub(super) fn adopt(&mut self, key: Key, mut flow: Flow) {
        let held: usize = self.flows.values().map(Flow::memory).sum();
        flow.limit(if held > MEMORY || self.flows.len() > 256 { LITTLE_ROOM } else { ROOM });
        self.tokens.insert(flow.token, Socket::Flow(key));
        self.flows.insert(key, flow);
        self.settle(key);
    }

    /// Sees to it that a connection is watched as it needs, and forgotten when it is over.
    pub(super) fn settle(&mut self, key: Key) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let interest = if flow.is_over() { (false, false) } else { flow.interest() };
        watch(&self.epoll, flow.stream.as_fd(), flow.token, flow.watched, interest);
        flow.watched = interest;
        if flow.is_over() {
            self.tokens.remove(&flow.token);
            self.flows.remove(&key);
            return;
        }
        if let Some(deadline) = flow.deadline {
            self.sweep = Some(self.sweep.map_or(deadline, |sweep| sweep.min(deadline)));
        }
        if flow.blocked && self.blocked.last() != Some(&key) {
            self.blocked.push(key);
        }
    }

    /// Clients of a forwarded port.
    pub(super) fn accept(&mut self, index: usize, now: Instant) {
        for _ in 0..BATCH {
            let Some((listener, port)) = self.listeners.get(index) else { return };
            let port = *port;
            let Ok((stream, _)) = listener.accept() else { return };
            if self.flows.len() >= MAX_FLOWS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            prepare(&stream);
            let guest = SocketAddr::from((GUEST, port));
            let free = (0..MAX_FLOWS * 2).find_map(|_| {
                let key = Key { guest, remote: SocketAddr::from((GATEWAY, self.port())) };
                (!self.flows.contains_key(&key)).then_some(key)
            });
            let Some(key) = free else { continue };
            let token = self.token();
            let isn = self.random.hash_one((token, key)) as u32;
            let mut flow = Flow::inward(key, token, stream, isn);
            flow.call(&mut self.out, now);
            self.adopt(key, flow);
        }
    }
}

/// A socket on its way to be connected.
fn begin_connecting(to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// The guest has its own ideas of when to send; a peer that vanished is noticed some time.
fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
}
