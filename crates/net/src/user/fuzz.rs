//! What fuzzing drives: frames from arbitrary bytes, time that passes, and a server of the fuzzer's own that all
//! connections lead to.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::spec::{Backend, NetSpec};
use crate::user::addresses::{GATEWAY, GATEWAY6, GUEST};
use crate::user::stack::Stack;
use crate::wire::extensions::{HOP_OPTIONS, OPTIONS, ROUTING};
use crate::wire::{
    ETH, FRAGMENT, ICMP, ICMP6, MAX_MESSAGE, Offloads, SYN, Segment, TCP, UDP, VNET, headers, sum,
};
use ringfence_helper::Link;

/// An address of the guest's own making.
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 15);

struct Server {
    listener: TcpListener,
    socket: UdpSocket,
}

/// The server, made once: ports of the host are not endless.
#[expect(clippy::expect_used, reason = "there is no fuzzing without loopback")]
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
        listener.set_nonblocking(true).expect("no waiting");
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
        socket.set_nonblocking(true).expect("no waiting");
        Server { listener, socket }
    })
}

/// Where everything goes in place of `to`. Odd ports are refused: nobody listens at port 1.
pub(crate) fn detour(to: SocketAddr) -> SocketAddr {
    let port = match to.port() {
        0 => 0,
        port if port & 1 == 1 => 1,
        port if port & 2 == 0 => server().listener.local_addr().map_or(1, |at| at.port()),
        _ => server().socket.local_addr().map_or(1, |at| at.port()),
    };
    (Ipv4Addr::LOCALHOST, port).into()
}

struct Playground {
    stack: Stack,
    link: Link,
    now: Instant,
    streams: Vec<TcpStream>,
    /// Numbers of the last segment that the guest was sent: what it should send next, and confirm.
    next: u32,
    seen: u32,
}

impl Playground {
    fn turn(&mut self) {
        let mut events = Vec::with_capacity(64);
        let mut buffer = vec![0; MAX_MESSAGE + 1];
        for _ in 0..3 {
            if self.stack.wait(&mut events, false, Some(Instant::now())).is_err() {
                return;
            }
            for event in &events {
                self.stack.ready(event.data.u64(), self.now);
            }
            while let Ok(Some(len)) = self.link.receive(&mut buffer, false) {
                assert!(len <= MAX_MESSAGE, "a frame of {len} bytes");
                self.note(&buffer[..len]);
            }
            self.stack.room(self.now);
        }
        while let Ok((stream, _)) = server().listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.streams.push(stream);
            }
        }
    }

    fn note(&mut self, message: &[u8]) {
        let ip = message.get(VNET + ETH..).unwrap_or_default();
        if ip.get(9) == Some(&TCP)
            && let Some(segment) = ip.get(20..).and_then(Segment::read)
        {
            let len = segment.payload.len() as u32 + u32::from(segment.flags & (SYN | 1) != 0);
            (self.next, self.seen) = (segment.ack, segment.seq.wrapping_add(len));
        }
    }

    /// A piece of a packet, of few packets, at few places.
    fn piece(&mut self, body: &[u8]) {
        let [kind, place, payload @ ..] = body else { return };
        let place = u16::from(place & 0x7f) | u16::from(place >> 7) << 15;
        let behind = [[TCP, UDP, ICMP, ICMP6], [HOP_OPTIONS, ROUTING, OPTIONS, FRAGMENT]];
        let protocol = behind[usize::from(kind >> 6 & 1)][usize::from(kind >> 1 & 3)];
        let message = piece(kind & 1 == 0, protocol, place, kind >> 3 & 7, payload);
        self.stack.message(&message, self.now);
    }

    /// A segment near the numbers that count: flags, ports, offsets from them, window, data.
    fn segment(&mut self, body: &[u8], repeat: usize) {
        let [flags, port, seq, ack, window, payload @ ..] = body else { return };
        let near = |base: u32, offset: u8| base.wrapping_add(i32::from(offset as i8) as u32);
        let payload = payload.repeat(1 + repeat);
        let segment = Segment {
            source: 1000 + u16::from(port & 3),
            destination: 4 * u16::from(port >> 4) + u16::from(port >> 2 & 1),
            seq: near(self.next, *seq),
            ack: near(self.seen, *ack),
            flags: *flags,
            window: u16::from(*window) << (port & 7),
            mss: (flags & SYN != 0).then_some(u16::from(*window) * 8),
            scale: (flags & SYN != 0 && port & 8 != 0).then_some(port & 15),
            payload: &[],
        };
        let mut message = Vec::new();
        let ips = [GUEST.into(), GATEWAY.into()];
        segment.write(&mut message, [[2; 6]; 2], ips, [&payload, &[]], 65_535, Offloads::default());
        message.extend_from_slice(&payload);
        self.stack.message(&message, self.now);
    }
}

/// A packet from the guest to the gateway that says it is a piece of `protocol` at `place`, in eights of bytes, a flag at the top.
fn piece(v4: bool, protocol: u8, place: u16, id: u8, payload: &[u8]) -> Vec<u8> {
    let ends: [IpAddr; 2] =
        if v4 { [GUEST.into(), GATEWAY.into()] } else { [GUEST6.into(), GATEWAY6.into()] };
    let mut message = Vec::new();
    let len = payload.len() + if v4 { 0 } else { 8 };
    headers(&mut message, [[2; 6]; 2], ends[0], ends[1], if v4 { protocol } else { FRAGMENT }, len);
    let ip = VNET + ETH;
    if v4 {
        message[ip + 5] = id;
        // The flag is at 0x2000 here.
        let place = place & 0x1fff | place >> 2 & 0x2000;
        message[ip + 6..ip + 8].copy_from_slice(&place.to_be_bytes());
        message[ip + 10..ip + 12].fill(0);
        let check = !(sum(&message[ip..], 0) as u16);
        message[ip + 10..ip + 12].copy_from_slice(&check.to_be_bytes());
    } else {
        message.extend_from_slice(&[protocol, 0]);
        message.extend_from_slice(&(place << 3 | place >> 15).to_be_bytes());
        message.extend_from_slice(&[0, 0, 0, id]);
    }
    message.extend_from_slice(payload);
    message
}

/// Feeds a stack with what `data` says.
pub fn run(mut data: &[u8]) {
    let Ok(spec) = "user".parse::<NetSpec>() else { return };
    let (Backend::User(user), Ok((link, theirs))) = (&spec.backend, Link::pair_with_rings(MAX_MESSAGE))
    else {
        return;
    };
    let Ok(mut stack) = Stack::new(theirs, &spec, user) else { return };
    stack.detour = true;
    let mut playground =
        Playground { stack, link, now: Instant::now(), streams: Vec::new(), next: 1, seen: 0 };
    while let [action, len, rest @ ..] = data {
        let (body, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        data = rest;
        match action % 8 {
            0 => {
                playground.now += Duration::from_millis(u64::from(*len) * 100);
                playground.stack.tick(playground.now);
            }
            1 => playground.streams.iter_mut().for_each(|stream| {
                let _ = stream.write(&body.repeat(1 + usize::from(action >> 3) * 16));
            }),
            2 => playground.stack.message(body, playground.now),
            3 => match body {
                [] => playground.streams.clear(),
                _ => playground.streams.iter_mut().for_each(|stream| {
                    let _ = stream.read(&mut [0; 65_536]);
                }),
            },
            // A frame whose checksums the card would finish.
            4 => {
                let mut message = vec![0; VNET];
                message[0] = crate::wire::NEEDS_CSUM;
                message.extend_from_slice(body);
                playground.stack.message(&message, playground.now);
            }
            5 => playground.piece(body),
            _ => playground.segment(body, usize::from(action >> 3)),
        }
        playground.stack.batch_done(playground.now);
        playground.turn();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn arbitrary_input_does_no_harm() {
        ringfence_helper::fuzz::inputs(1000, 2000).for_each(|input| super::run(&input));
    }
}
