//! The gateway: sorts the guest's frames, and keeps what each connection needs.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFlags, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};

use crate::error::NetError;
use crate::limit::Limiter;
use crate::spec::{Forward, NetSpec, UserSpec};
use crate::user::addresses::{self, GATEWAY, GATEWAY_MAC, GUEST, Way, way};
use crate::user::datagram::{self, Datagrams, Kind};
use crate::user::fragments::Fragments;
use crate::user::outlet::Outlet;
use crate::user::resolver::Resolver;
use crate::user::tcp::{Flow, Key, LITTLE_ROOM, ROOM};
use crate::user::{dhcp, neighbour};
use crate::wire::{
    ACK, ARP, CONTROL, DATA_VALID, ETH, FIN, ICMP, ICMP6, NEEDS_CSUM, Offloads, Packet, RST, SYN, Segment,
    TCP, UDP, VNET, be16, sum,
};
use ringfence_helper::Link;

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
    resolver: Resolver,
    listeners: Vec<(TcpListener, u16)>,
    udp_forwards: Vec<(UdpSocket, u16)>,
    callers: HashMap<u16, Caller>,
    next_port: u16,
    random: RandomState,
    no_echo: bool,
    fragments: Fragments,
    buffer: Vec<u8>,
    /// All connections lead to the fuzzer's server.
    #[cfg(feature = "fuzzing")]
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
            #[cfg(feature = "fuzzing")]
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

    /// Waits for something to do: what the link is ready for, of frames, unless the limit holds them back, and room, when there is
    /// none; and the tokens of what else is ready.
    pub(crate) fn wait(
        &mut self,
        events: &mut Vec<epoll::Event>,
        reading: bool,
        until: Option<Instant>,
    ) -> io::Result<PollFlags> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, reading);
        wanted.set(PollFlags::OUT, self.out.is_full());
        self.watch_link(wanted);
        let now = Instant::now();
        let until = match self.out.link.before_sleep(wanted) {
            ready if ready.is_empty() => until,
            _ => Some(now),
        };
        let soonest = [self.sweep, self.tidy, self.out.retry, until].into_iter().flatten().min();
        let timeout = soonest.map(|at| {
            // Rounded up: the kernel counts in milliseconds.
            let left = match at.saturating_duration_since(now) {
                Duration::ZERO => Duration::ZERO,
                left => left + Duration::from_micros(999),
            };
            rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_millis()) * 1_000_000,
            }
        });
        events.clear();
        match epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut seen = PollFlags::empty();
        events.retain(|event| {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == LINK {
                seen.set(PollFlags::IN, flags.contains(epoll::EventFlags::IN));
                seen.set(PollFlags::OUT, flags.contains(epoll::EventFlags::OUT));
                seen.set(PollFlags::HUP, flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR));
            }
            token != LINK
        });
        Ok(self.out.link.after_sleep(wanted, seen))
    }

    fn watch_link(&mut self, wanted: PollFlags) {
        let watched = self.out.link.watched(wanted);
        if self.link_watched != watched {
            self.link_watched = watched;
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, watched.contains(PollFlags::IN));
            flags.set(epoll::EventFlags::OUT, watched.contains(PollFlags::OUT));
            let _ = epoll::modify(&self.epoll, &self.out.link, epoll::EventData::new_u64(LINK), flags);
        }
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
                self.packet(&Packet { payload: &payload, fragment: None, ..packet }, false, now)
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

    fn tcp(&mut self, packet: &Packet<'_>, now: Instant) -> Option<()> {
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
    fn refuse(&mut self, key: Key, segment: &Segment<'_>) {
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

    fn host(&mut self, remote: SocketAddr, now: Instant) -> Option<SocketAddr> {
        match way(remote) {
            Way::Host(host) => Some(host),
            Way::Resolver => Some(self.resolver.server(now)),
            Way::None => None,
        }
    }

    fn call_out(&mut self, key: Key, syn: &Segment<'_>, now: Instant) -> Option<()> {
        let to = self.host(key.remote, now)?;
        #[cfg(feature = "fuzzing")]
        let to = self.lead(to);
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP)).ok()?;
        match connect(&socket, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(_) => return None,
        }
        let stream = TcpStream::from(socket);
        let token = self.token();
        prepare(&stream);
        let isn = self.random.hash_one((token, key)) as u32;
        let flow = Flow::outward(key, token, stream, syn, self.out.mss(key.guest.is_ipv4()), isn);
        self.adopt(key, flow);
        Some(())
    }

    fn adopt(&mut self, key: Key, mut flow: Flow) {
        let held: usize = self.flows.values().map(Flow::memory).sum();
        flow.limit(if held > MEMORY || self.flows.len() > 256 { LITTLE_ROOM } else { ROOM });
        self.tokens.insert(flow.token, Socket::Flow(key));
        self.flows.insert(key, flow);
        self.settle(key);
    }

    /// Sees to it that a connection is watched as it needs, and forgotten when it is over.
    fn settle(&mut self, key: Key) {
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
            let stale = |(key, socket): (&(Kind, Key), &Datagrams)| socket.is_stale(now).then_some(*key);
            let stale: Vec<_> = self.datagrams.iter().filter_map(stale).collect();
            stale.into_iter().for_each(|key| self.forget(key));
            self.callers
                .retain(|_, caller| now.saturating_duration_since(caller.used) < Duration::from_secs(60));
            let any = !self.datagrams.is_empty() || !self.callers.is_empty();
            self.tidy = any.then(|| now + TIDY);
        }
    }

    fn forget(&mut self, key: (Kind, Key)) {
        if let Some(socket) = self.datagrams.remove(&key) {
            if let Some(server) = socket.asked {
                self.resolver.failed(server);
            }
            self.tokens.remove(&socket.token);
        }
    }

    fn udp(&mut self, packet: &Packet<'_>, trusted: bool, now: Instant) -> Option<()> {
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
    fn datagram(&mut self, kind: Kind, key: Key, body: &[u8], now: Instant) -> Option<()> {
        if self.restrict || !addresses::is_a_guests(key.guest.ip()) {
            return None;
        }
        if !self.datagrams.contains_key(&(kind, key)) {
            let to = match kind {
                Kind::Udp => self.host(key.remote, now)?,
                // Any port but zero: only the address counts.
                Kind::Echo => match way(SocketAddr::new(key.remote.ip(), 1)) {
                    Way::Host(to) => SocketAddr::new(to.ip(), 0),
                    _ => return None,
                },
            };
            #[cfg(feature = "fuzzing")]
            let to = self.lead(to);
            if self.datagrams.len() >= datagram::MAX {
                let oldest = self.datagrams.iter().min_by_key(|(_, socket)| socket.used).map(|(key, _)| *key);
                oldest.into_iter().for_each(|key| self.forget(key));
            }
            let token = self.token();
            let opened = Datagrams::open(kind, key, to, token, now);
            if let (Err(error), Kind::Echo) = (&opened, kind)
                && error.kind() == io::ErrorKind::PermissionDenied
                && !std::mem::replace(&mut self.no_echo, true)
            {
                eprintln!(
                    "ringfence: this host does not let its users ping (net.ipv4.ping_group_range), so the guest \
                     can ping its gateway only"
                );
            }
            let mut socket = opened.ok()?;
            if kind == Kind::Udp && way(key.remote) == Way::Resolver {
                socket.asked = Some(to);
            }
            watch(&self.epoll, socket.socket.as_fd(), token, (false, false), (true, false));
            self.tokens.insert(token, Socket::Datagrams(kind, key));
            self.datagrams.insert((kind, key), socket);
            self.tidy = self.tidy.or(Some(now + TIDY));
        }
        let socket = self.datagrams.get_mut(&(kind, key))?;
        socket.used = now;
        let sent = socket.socket.send(body);
        if sent.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            self.refused(kind, key);
        }
        Some(())
    }

    fn refused(&mut self, kind: Kind, key: Key) {
        self.forget((kind, key));
        if kind == Kind::Udp {
            let (ips, message) = datagram::unreachable(key);
            self.out.icmp(ips, &message);
        }
    }

    /// Answers to a datagram of the guest's.
    fn answered(&mut self, kind: Kind, key: Key, now: Instant) {
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
                Err(_) => return self.refused(kind, key),
            }
        }
    }

    /// An echo request: ours are answered here, others go by the host.
    fn echo(&mut self, packet: &Packet<'_>, now: Instant) -> Option<()> {
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

    /// A port of the gateway's that no forwarded connection uses.
    fn port(&mut self) -> u16 {
        // Above the ports that servers have.
        self.next_port = self.next_port.wrapping_add(1) % 40_000;
        20_000 + self.next_port
    }

    /// Clients of a forwarded port.
    fn accept(&mut self, index: usize, now: Instant) {
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

    /// Datagrams for a forwarded port.
    fn called(&mut self, index: usize, now: Instant) {
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

    #[cfg(feature = "fuzzing")]
    fn lead(&self, to: SocketAddr) -> SocketAddr {
        if self.detour { super::fuzz::detour(to) } else { to }
    }

    /// Connections, sockets for datagrams and tokens that it has.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> [usize; 3] {
        [self.flows.len(), self.datagrams.len(), self.tokens.len()]
    }
}

/// The guest has its own ideas of when to send; a peer that vanished is noticed some time.
fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
}

/// Changes what a socket is watched for: readable, writable.
fn watch(epoll: &OwnedFd, socket: BorrowedFd<'_>, token: u64, was: (bool, bool), now: (bool, bool)) {
    if was == now {
        return;
    }
    let mut flags = epoll::EventFlags::empty();
    flags.set(epoll::EventFlags::IN, now.0);
    flags.set(epoll::EventFlags::OUT, now.1);
    let data = epoll::EventData::new_u64(token);
    // The only failure is a lack of memory: the socket then stays silent, and the guest's own timers end it.
    let _ = match (was, now) {
        (_, (false, false)) => epoll::delete(epoll, socket),
        ((false, false), _) => epoll::add(epoll, socket, data, flags),
        _ => epoll::modify(epoll, socket, data, flags),
    };
}
