//! A hostile guest, frame by frame, with programs of this host on loopback at the other end.

mod extensions;
mod names;
mod packets;
mod restricted;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::spec::{Backend, NetSpec};
use crate::user::addresses::{GATEWAY, GUEST};
use crate::user::stack::Stack;
use crate::wire::{ACK, CONTROL, ETH, FIN, MAX_MESSAGE, NEEDS_CSUM, Offloads, RST, SYN, Segment, VNET, udp};
use ringfence_helper::Link;

const MACS: [[u8; 6]; 2] = [[2; 6]; 2];

/// A stack, the time it believes in, and a server.
struct Playground {
    stack: Stack,
    link: Link,
    now: Instant,
    listener: TcpListener,
}

impl Playground {
    fn new() -> Self {
        Self::with("user")
    }

    fn with(spec: &str) -> Self {
        let spec: NetSpec = spec.parse().unwrap();
        let Backend::User(user) = &spec.backend else { panic!() };
        let (link, theirs) = Link::pair_with_rings(MAX_MESSAGE).unwrap();
        let stack = Stack::new(theirs, &spec, user).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // Longer than the standard library's backlog, for floods.
        rustix::net::listen(&listener, 4096).unwrap();
        Self { stack, link, now: Instant::now(), listener }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// Sends a message, and takes what comes back.
    fn send(&mut self, message: &[u8]) -> Vec<Vec<u8>> {
        self.stack.message(message, self.now);
        self.stack.batch_done(self.now);
        self.turn()
    }

    fn wait(&mut self, time: Duration) -> Vec<Vec<u8>> {
        self.now += time;
        self.stack.tick(self.now);
        self.turn()
    }

    /// Lets the stack look at the host's sockets a few times.
    fn turn(&mut self) -> Vec<Vec<u8>> {
        let (mut frames, mut events) = (Vec::new(), Vec::with_capacity(64));
        for _ in 0..6 {
            self.stack.wait(&mut events, false, Some(Instant::now())).unwrap();
            for event in &events {
                self.stack.ready(event.data.u64(), self.now);
            }
            let mut buffer = vec![0; MAX_MESSAGE];
            while let Ok(Some(len)) = self.link.receive(&mut buffer, false) {
                frames.push(buffer[..len].to_vec());
            }
            self.stack.room(self.now);
        }
        frames
    }

    fn connections(&self) -> usize {
        self.stack.counts()[0]
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy)]
struct Peer {
    port: u16,
    to: u16,
    seq: u32,
    ack: u32,
    window: u16,
}

impl Peer {
    fn calling(port: u16, to: u16) -> Self {
        Self { port, to, seq: 1000, ack: 0, window: 1000 }
    }

    fn frame(&self, flags: u8, payload: &[u8]) -> Vec<u8> {
        let segment = Segment {
            source: self.port,
            destination: self.to,
            seq: self.seq,
            ack: self.ack,
            flags,
            window: self.window,
            mss: (flags & SYN != 0).then_some(1460),
            ..Segment::default()
        };
        let (mut out, ips) = (Vec::new(), [GUEST.into(), GATEWAY.into()]);
        segment.write(&mut out, MACS, ips, [payload, &[]], 65_535, Offloads::default());
        out.extend_from_slice(payload);
        out
    }

    /// An open connection and the host's end of it.
    fn open(playground: &mut Playground, port: u16, window: u16) -> (Self, TcpStream) {
        let mut peer = Self { window, ..Self::calling(port, playground.port()) };
        let frames = playground.send(&peer.frame(SYN, &[]));
        let answer = tcp(&frames[0]);
        assert_eq!((answer.flags, answer.ack), (SYN | ACK, 1001));
        (peer.seq, peer.ack) = (1001, answer.seq.wrapping_add(1));
        // A SYN's window has no scale; the real one may follow.
        assert!(playground.send(&peer.frame(ACK, &[])).iter().all(|frame| tcp(frame).flags == ACK));
        let (host, _) = playground.listener.accept().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (peer, host)
    }
}

fn tcp(frame: &[u8]) -> Segment<'_> {
    assert_eq!(frame[VNET + ETH + 9], 6);
    Segment::read(&frame[VNET + ETH + 20..]).unwrap()
}

#[test]
fn cut_and_damaged_frames_are_dropped() {
    let mut playground = Playground::new();
    let whole = Peer::calling(1, playground.port()).frame(SYN, &[]);
    for len in 0..whole.len() {
        assert!(playground.send(&whole[..len]).is_empty(), "{len} bytes");
    }
    for at in VNET + ETH..whole.len() {
        let mut frame = whole.clone();
        frame[at] ^= 0x10;
        // Whatever it says now, its checksum is wrong.
        assert!(playground.send(&frame).is_empty(), "byte {at}");
    }
    assert_eq!(playground.connections(), 0);
    assert_eq!(playground.send(&whole).len(), 1);
}

#[test]
fn unfinished_checksum_is_taken_as_the_card_would_finish_it() {
    let mut playground = Playground::new();
    let mut frame = Peer::calling(1, playground.port()).frame(SYN, &[]);
    frame[VNET + ETH + 36] ^= 1;
    assert!(playground.send(&frame).is_empty());
    frame[0] = NEEDS_CSUM;
    assert_eq!(tcp(&playground.send(&frame)[0]).flags, SYN | ACK);
}

#[test]
fn flood_of_calls_is_bounded_and_passes() {
    let mut playground = Playground::new();
    let to = playground.port();
    for port in 0..10_000 {
        playground.stack.message(&Peer::calling(port, to).frame(SYN, &[]), playground.now);
        if port % 64 == 0 {
            playground.turn();
        }
    }
    assert!(playground.connections() <= 4096, "{}", playground.connections());
    let most = playground.connections();
    assert!(most > 100);
    for _ in 0..30 {
        playground.wait(Duration::from_secs(60));
    }
    // What the host's own kernel still tries to connect is its to give up.
    assert!(playground.connections() < most / 2 + 1, "{} of {most}", playground.connections());
}

#[test]
fn flood_of_datagrams_is_bounded_and_passes() {
    let mut playground = Playground::new();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let to = server.local_addr().unwrap().port();
    let mut frame = Vec::new();
    for port in 1..3000 {
        udp(&mut frame, MACS, [GUEST.into(), GATEWAY.into()], [port, to], b"x");
        playground.send(&frame);
    }
    assert_eq!(playground.stack.counts(), [0, 512, 512]);
    playground.wait(Duration::from_secs(300));
    assert_eq!(playground.stack.counts(), [0, 0, 0]);
}

/// What the host's program finds to read now.
fn heard(playground: &mut Playground, host: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    host.set_nonblocking(true).unwrap();
    // An error is that there is no more.
    let _ = host.read_to_end(&mut all);
    host.set_nonblocking(false).unwrap();
    playground.turn();
    all
}

/// The host's program writes, and the stack passes it on.
fn says(playground: &mut Playground, host: &mut TcpStream, bytes: &[u8]) -> Vec<Vec<u8>> {
    host.write_all(bytes).unwrap();
    playground.turn()
}

#[test]
fn refused_port_is_answered_with_a_reset() {
    let mut playground = Playground::new();
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let frames = playground.send(&Peer::calling(1, closed).frame(SYN, &[]));
    let answer = tcp(&frames[0]);
    assert_eq!((answer.flags, answer.ack), (RST | ACK, 1001));
}

#[test]
fn reset_in_the_middle_ends_it_and_only_with_the_right_number() {
    let mut playground = Playground::new();
    let (mut peer, mut host) = Peer::open(&mut playground, 1, 1000);
    says(&mut playground, &mut host, b"hello");
    peer.seq += 5;
    // Inside the window, but not exact: the guest is asked.
    assert_eq!(tcp(&playground.send(&peer.frame(RST, &[]))[0]).flags, ACK);
    assert_eq!(playground.connections(), 1);
    peer.seq -= 5;
    assert!(playground.send(&peer.frame(RST, &[])).is_empty());
    assert_eq!(playground.connections(), 0);
    // What comes after belongs to nothing.
    assert_eq!(tcp(&playground.send(&peer.frame(ACK, b"more"))[0]).flags, RST);
}

#[test]
fn shut_window_gets_a_byte_at_a_time_until_it_opens() {
    let mut playground = Playground::new();
    let (mut peer, mut host) = Peer::open(&mut playground, 1, 0);
    assert!(says(&mut playground, &mut host, b"0123456789").is_empty());
    for _ in 0..3 {
        let frames = playground.wait(Duration::from_secs(90));
        assert_eq!(tcp(&frames[0]).payload, b"0");
        assert!(playground.send(&peer.frame(ACK, &[])).is_empty());
    }
    peer.window = 4;
    assert_eq!(tcp(&playground.send(&peer.frame(ACK, &[]))[0]).payload, b"0123");
    peer.ack = peer.ack.wrapping_add(4);
    peer.window = 1000;
    assert_eq!(tcp(&playground.send(&peer.frame(ACK, &[]))[0]).payload, b"456789");
}

#[test]
fn data_is_sent_again_when_it_is_not_confirmed_and_given_up_at_last() {
    let mut playground = Playground::new();
    let (_peer, mut host) = Peer::open(&mut playground, 1, 1000);
    assert_eq!(tcp(&says(&mut playground, &mut host, b"abc")[0]).payload, b"abc");
    let mut tries = 0;
    while playground.connections() > 0 {
        let frames = playground.wait(Duration::from_secs(65));
        let segment = tcp(&frames[0]);
        assert!(segment.payload == b"abc" || segment.flags & RST != 0);
        tries += 1;
        assert!(tries < 20);
    }
    assert!(tries > 5);
}

#[test]
fn confirmation_of_what_was_never_sent_is_answered_and_ignored() {
    let mut playground = Playground::new();
    let (mut peer, mut host) = Peer::open(&mut playground, 1, 1000);
    says(&mut playground, &mut host, b"abc");
    peer.ack = peer.ack.wrapping_add(4);
    assert_eq!(tcp(&playground.send(&peer.frame(ACK, b"junk"))[0]).ack, peer.seq);
    assert_eq!(heard(&mut playground, &mut host), b"");
}

#[test]
fn data_out_of_order_repeated_and_overlapping_reaches_the_host_once() {
    let mut playground = Playground::new();
    let (peer, mut host) = Peer::open(&mut playground, 1, 1000);
    let mut send = |offset: u32, text: &[u8]| {
        let seq = peer.seq.wrapping_add(offset);
        let frames = playground.send(&Peer { seq, ..peer }.frame(ACK, text));
        tcp(&frames[0]).ack.wrapping_sub(peer.seq)
    };
    assert_eq!(send(3, b"def"), 0);
    assert_eq!(send(0, b"abc"), 3);
    assert_eq!(send(0, b"abc"), 3);
    assert_eq!(send(1, b"bcdef"), 6);
    assert_eq!(send(u32::MAX, b""), 6);
    assert_eq!(send(6, b"g"), 7);
    assert_eq!(heard(&mut playground, &mut host), b"abcdefg");
}

#[test]
fn guest_that_ignores_the_window_fills_no_memory() {
    let mut playground = Playground::new();
    let (mut peer, mut host) = Peer::open(&mut playground, 1, 1000);
    let body = vec![7; 60_000];
    let (mut shut, mut rounds) = (0, 0);
    // The host's own sockets take some megabytes first, not all at once.
    while shut < 50 {
        let frames = playground.send(&peer.frame(ACK, &body));
        let answer = tcp(frames.last().unwrap());
        peer.seq = answer.ack;
        shut = if answer.window == 0 { shut + 1 } else { 0 };
        rounds += 1;
        assert!(rounds < 2000, "the window stays open");
    }
    let taken = peer.seq - 1001;
    assert!(taken < 48 << 20, "{taken} bytes");
    // Nothing of what was confirmed is lost.
    let mut sum = 0;
    while sum < taken as usize {
        let more = heard(&mut playground, &mut host).len();
        assert!(more > 0);
        sum += more;
    }
}

#[test]
fn both_ends_close_and_nothing_is_left() {
    let mut playground = Playground::new();
    let (mut peer, mut host) = Peer::open(&mut playground, 1, 1000);
    assert_eq!(tcp(&playground.send(&peer.frame(ACK | FIN, b"bye"))[0]).ack, peer.seq + 4);
    peer.seq += 4;
    // A program that hangs up before it has read everything would reset the connection.
    assert_eq!(heard(&mut playground, &mut host), b"bye");
    drop(host);
    let frames = playground.turn();
    let end = tcp(&frames[0]);
    assert_eq!(end.flags & FIN, FIN);
    peer.ack = end.seq.wrapping_add(1);
    playground.send(&peer.frame(ACK, &[]));
    assert_eq!(playground.connections(), 0);
}

#[test]
fn long_segments_are_made_only_where_the_guest_takes_them() {
    for bits in [0_u8, 3] {
        let mut playground = Playground::new();
        playground.send(&[CONTROL, bits]);
        let (_peer, mut host) = Peer::open(&mut playground, 1, 65_000);
        let frames = says(&mut playground, &mut host, &[9; 30_000]);
        let longest = frames.iter().map(Vec::len).max().unwrap();
        assert!(longest <= MAX_MESSAGE);
        if bits == 0 {
            assert_eq!(longest, VNET + 1514);
        } else {
            assert!(longest > 10_000, "{longest}");
            let frame = frames.iter().find(|frame| frame.len() == longest).unwrap();
            assert_eq!((frame[0], frame[1]), (NEEDS_CSUM, 1));
            assert_eq!(u16::from_le_bytes([frame[4], frame[5]]), 1460);
        }
    }
}

#[test]
fn arbitrary_frames_on_open_connections_do_no_harm() {
    let mut playground = Playground::new();
    let (peer, _host) = Peer::open(&mut playground, 1, 1000);
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32
    };
    for _ in 0..20_000 {
        // Near the numbers that count, with any flags, windows and lengths.
        let near = |base: u32, by: u32| base.wrapping_add(by % 2048).wrapping_sub(1024);
        let (seq, ack) = (near(peer.seq, random()), near(peer.ack, random()));
        let payload = vec![7; random() as usize % 3000];
        let wild = Peer { port: 1 + random() as u16 % 3, seq, ack, window: random() as u16, ..peer };
        let mut frame = wild.frame(random() as u8 & 0x3f, &payload[..payload.len() % 64]);
        if random() % 4 == 0 {
            let at = random() as usize % frame.len();
            frame[at] = random() as u8;
            frame[0] |= NEEDS_CSUM;
        }
        playground.stack.message(&frame, playground.now);
        if random() % 16 == 0 {
            playground.stack.batch_done(playground.now);
            playground.wait(Duration::from_millis(u64::from(random() % 500)));
        }
    }
    assert!(playground.connections() <= 8);
    // It still serves.
    let port = 40_000;
    let _ = playground.send(&Peer::calling(port, playground.port()).frame(RST, &[]));
    while let Ok((_, _)) = {
        playground.listener.set_nonblocking(true).unwrap();
        playground.listener.accept()
    } {}
    playground.listener.set_nonblocking(false).unwrap();
    Peer::open(&mut playground, port, 1000);
}
