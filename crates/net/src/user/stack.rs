//! The gateway: sorts the guest's frames, and keeps what each connection needs.

use std::collections::HashMap;
use std::hash::RandomState;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFlags, epoll};

use crate::error::NetError;
use crate::limit::Limiter;
use crate::spec::{Forward, NetSpec, UserSpec};
use crate::user::addresses::{GATEWAY_MAC, Way, way};
use crate::user::datagram::{Datagrams, Kind};
use crate::user::fragments::Fragments;
use crate::user::neighbour;
use crate::user::outlet::Outlet;
use crate::user::resolver::Resolver;
use crate::user::tcp::{Flow, Key};
use crate::wire::{
    ARP, CONTROL, DATA_VALID, ETH, ICMP, ICMP6, NEEDS_CSUM, Offloads, Packet, TCP, UDP, VNET, be16, sum,
};
use ringfence_helper::Link;

mod connections;
mod datagrams;
mod questions;
mod waiting;

use waiting::watch;

/// The link's token; others count from there.
pub(crate) const LINK: u64 = 0;
/// Connections at a time; beyond it the guest is refused.
const MAX_FLOWS: usize = 4096;
/// Bytes in connections' rings before new ones get less.
const MEMORY: usize = 128 << 20;
/// Datagrams read from one socket before others have their turn.
const BATCH: usize = 32;
/// How often unused sockets are looked for.
const TIDY: Duration = Duration::from_secs(2);

/// What a token stands for.
#[derive(Clone, Copy, Debug)]
enum Socket {
    Flow(Key),
    Datagrams(Kind, Key),
    Listener(usize),
    UdpForward(usize),
}

/// The two ends of a datagram's way through a forwarded port.
#[derive(Debug)]
struct Caller {
    forward: usize,
    peer: SocketAddr,
    used: Instant,
}

pub(crate) struct Stack {
    pub(crate) out: Outlet,
    mtu: u16,
    restrict: bool,
    epoll: OwnedFd,
    /// What its socket is watched for.
    link_watched: PollFlags,
    tokens: HashMap<u64, Socket>,
    next_token: u64,
    flows: HashMap<Key, Flow>,
    touched: Vec<Key>,
    blocked: Vec<Key>,
    sweep: Option<Instant>,
    datagrams: HashMap<(Kind, Key), Datagrams>,
    tidy: Option<Instant>,
    pub(crate) resolver: Resolver,
    listeners: Vec<(TcpListener, u16)>,
    udp_forwards: Vec<(UdpSocket, u16)>,
    callers: HashMap<u16, Caller>,
    next_port: u16,
    random: RandomState,
    no_echo: bool,
    fragments: Fragments,
    buffer: Vec<u8>,
    /// All connections lead to the fuzzer's server.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) detour: bool,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stack")
    }
}

impl Stack {
    /// Listens on the forwarded ports.
    pub(crate) fn new(link: Link, spec: &NetSpec, user: &UserSpec) -> Result<Self, NetError> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from).map_err(NetError::Host)?;
        let out = Outlet::new(link, GATEWAY_MAC, spec.mtu, Limiter::new(spec.bytes, spec.packets));
        let mut stack = Self {
            out,
            mtu: spec.mtu,
            restrict: user.restrict,
            epoll,
            link_watched: PollFlags::IN,
            tokens: HashMap::new(),
            next_token: LINK + 1,
            flows: HashMap::new(),
            touched: Vec::new(),
            blocked: Vec::new(),
            sweep: None,
            datagrams: HashMap::new(),
            tidy: None,
            resolver: Resolver::new(user.dns),
            listeners: Vec::new(),
            udp_forwards: Vec::new(),
            callers: HashMap::new(),
            next_port: 0,
            random: RandomState::new(),
            no_echo: false,
            fragments: Fragments::default(),
            buffer: vec![0; 65_536],
            #[cfg(any(test, feature = "fuzzing"))]
            detour: false,
        };
        let flags = epoll::EventFlags::IN;
        epoll::add(&stack.epoll, &stack.out.link, epoll::EventData::new_u64(LINK), flags)
            .map_err(|error| NetError::Host(error.into()))?;
        for forward in &user.forwards {
            stack.listen(forward).map_err(|source| NetError::Forward { listen: forward.listen, source })?;
        }
        Ok(stack)
    }

    fn listen(&mut self, forward: &Forward) -> io::Result<()> {
        let token = self.token();
        if forward.udp {
            let socket = UdpSocket::bind(forward.listen)?;
            socket.set_nonblocking(true)?;
            watch(&self.epoll, socket.as_fd(), token, (false, false), (true, false));
            self.tokens.insert(token, Socket::UdpForward(self.udp_forwards.len()));
            self.udp_forwards.push((socket, forward.port));
        } else {
            let socket = TcpListener::bind(forward.listen)?;
            // The standard library's backlog of 128 is little for many clients at once.
            let _ = rustix::net::listen(&socket, 4096);
            socket.set_nonblocking(true)?;
            watch(&self.epoll, socket.as_fd(), token, (false, false), (true, false));
            self.tokens.insert(token, Socket::Listener(self.listeners.len()));
            self.listeners.push((socket, forward.port));
        }
        Ok(())
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// A message from the machine.
    pub(crate) fn message(&mut self, message: &[u8], now: Instant) {
        if let [CONTROL, bits, ..] = *message {
            self.out.offloads = Offloads::from_bits(bits);
        } else if message.len() > VNET {
            let _ = self.frame(message, now);
        }
    }

    /// Sorts a frame. What does not fit is dropped: `None`.
    fn frame(&mut self, message: &[u8], now: Instant) -> Option<()> {
        let trusted = message[0] & (NEEDS_CSUM | DATA_VALID) != 0;
        let frame = &message[VNET..];
        let from: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
        // A group address is nobody's (IEEE 802.3 3.2.4).
        if from[0] & 1 != 0 {
            return None;
        }
        self.out.macs[0] = from;
        let (ethertype, body) = (be16(frame, 12)?, frame.get(ETH..)?);
        if ethertype == ARP {
            return neighbour::arp(body, &mut self.out);
        }
        let packet = Packet::read(ethertype, body)?;
        match packet.fragment {
            None => self.packet(&packet, trusted, now),
            Some(fragment) => {
                let payload = self.fragments.add(&packet, fragment, now)?;
                // A card finishes no checksum over several pieces.
                self.packet(&packet.joined(&payload)?, false, now)
            }
        }
    }

    fn packet(&mut self, packet: &Packet<'_>, trusted: bool, now: Instant) -> Option<()> {
        match packet.protocol {
            // The one checksum without a pseudo header.
            ICMP if packet.source.is_ipv4() => {
                (trusted || sum(packet.payload, 0) == 0xffff).then_some(())?;
                self.echo(packet, now)
            }
            ICMP6 if packet.source.is_ipv6() => {
                (trusted || packet.sum_is_right()).then_some(())?;
                neighbour::icmp6(packet, self.mtu, self.restrict, &mut self.out)
                    .or_else(|| self.echo(packet, now))
            }
            TCP => {
                (trusted || packet.sum_is_right()).then_some(())?;
                self.tcp(packet, now)
            }
            UDP => self.udp(packet, trusted, now),
            _ => None,
        }
    }

    fn host(&mut self, remote: SocketAddr, now: Instant) -> Option<SocketAddr> {
        match way(remote) {
            Way::Host(host) => Some(host),
            Way::Resolver => Some(self.resolver.server(now)),
            Way::None => None,
        }
    }

    /// The batch of frames is done: acknowledgements and data go out.
    pub(crate) fn batch_done(&mut self, now: Instant) {
        for key in std::mem::take(&mut self.touched) {
            if let Some(flow) = self.flows.get_mut(&key) {
                if flow.touched {
                    flow.pump(&mut self.out, now);
                }
                self.settle(key);
            }
        }
    }

    /// The link has room again, or the limit lets more pass.
    pub(crate) fn room(&mut self, now: Instant) {
        self.out.flush();
        for key in std::mem::take(&mut self.blocked) {
            if let Some(flow) = self.flows.get_mut(&key) {
                if flow.blocked {
                    flow.pump(&mut self.out, now);
                }
                self.settle(key);
            }
        }
    }

    /// A socket of the host's is ready.
    pub(crate) fn ready(&mut self, token: u64, now: Instant) {
        match self.tokens.get(&token).copied() {
            Some(Socket::Flow(key)) => {
                if let Some(flow) = self.flows.get_mut(&key) {
                    flow.host_ready(&mut self.out, now);
                    self.settle(key);
                }
            }
            Some(Socket::Datagrams(kind, key)) => self.answered(kind, key, now),
            Some(Socket::Listener(index)) => self.accept(index, now),
            Some(Socket::UdpForward(index)) => self.called(index, now),
            None => {}
        }
    }

    /// Everything that is due by time.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.out.retry.is_some_and(|retry| retry <= now) {
            self.room(now);
        }
        if self.sweep.is_some_and(|sweep| sweep <= now) {
            self.sweep = self.flows.values().filter_map(|flow| flow.deadline).filter(|&at| at > now).min();
            let due = |flow: &Flow| flow.deadline.is_some_and(|at| at <= now);
            let due: Vec<Key> = self.flows.values().filter(|flow| due(flow)).map(Flow::key).collect();
            for key in due {
                if let Some(flow) = self.flows.get_mut(&key) {
                    flow.timeout(&mut self.out, now);
                    self.settle(key);
                }
            }
        }
        if self.tidy.is_some_and(|tidy| tidy <= now) {
            self.ask_others(now);
            let stale = |(key, socket): (&(Kind, Key), &Datagrams)| socket.is_stale(now).then_some(*key);
            let stale: Vec<_> = self.datagrams.iter().filter_map(stale).collect();
            stale.into_iter().for_each(|key| self.forget(key));
            self.callers
                .retain(|_, caller| now.saturating_duration_since(caller.used) < Duration::from_secs(60));
            let any = !self.datagrams.is_empty() || !self.callers.is_empty();
            self.tidy = any.then(|| now + TIDY);
        }
    }

    /// A port of the gateway's that no forwarded connection uses.
    fn port(&mut self) -> u16 {
        // Above the ports that servers have.
        self.next_port = self.next_port.wrapping_add(1) % 40_000;
        20_000 + self.next_port
    }

    #[cfg(any(test, feature = "fuzzing"))]
    fn lead(&self, to: SocketAddr) -> SocketAddr {
        if self.detour { super::fuzz::detour(to) } else { to }
    }

    /// Connections, sockets for datagrams and tokens that it has.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> [usize; 3] {
        [self.flows.len(), self.datagrams.len(), self.tokens.len()]
    }
}
