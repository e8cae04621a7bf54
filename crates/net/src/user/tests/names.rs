//! Questions for the name server, and what becomes of them when one of the host's resolvers does not answer.

use std::net::SocketAddr;

use super::*;
use crate::user::addresses::DNS;
use crate::user::resolver::{PATIENCE, Resolver};

/// A question of the guest's from `port`.
fn question(port: u16, text: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    udp(&mut frame, MACS, [GUEST.into(), DNS.into()], [port, 53], text);
    frame
}

/// Payloads of datagrams from the name server to `port`; of others there are none.
fn answers(frames: &[Vec<u8>], port: u16) -> Vec<&[u8]> {
    let payload = |frame: &'_ Vec<u8>| {
        let ip = VNET + ETH;
        assert_eq!((frame[ip + 9], &frame[ip + 12..ip + 16]), (17, &DNS.octets()[..]));
        assert_eq!(frame[ip + 20..ip + 24], [[0, 53], port.to_be_bytes()].concat());
    };
    frames.iter().inspect(|frame| payload(frame)).map(|frame| &frame[VNET + ETH + 28..]).collect()
}

fn socket() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Answers the one question that is there.
fn answer(server: &UdpSocket, text: &[u8]) {
    let mut buffer = [0; 100];
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], text);
    server.send_to(&[b"answer to ", text].concat(), from).unwrap();
    assert!(server.recv_from(&mut buffer).is_err(), "it is asked once");
}

#[test]
fn question_goes_from_server_to_server_until_one_answers() {
    let (silent, silent_at) = socket();
    let (good, good_at) = socket();
    let closed = socket().1;
    // No host sends to all without being told that it may.
    let unreachable = SocketAddr::from(([255, 255, 255, 255], 53));
    let mut playground = Playground::new();
    playground.stack.resolver = Resolver::of(vec![unreachable, closed, silent_at, good_at]);
    assert!(playground.send(&question(7, b"one")).is_empty(), "nobody answers, and nothing is refused");
    let mut buffer = [0; 100];
    assert!(silent.recv_from(&mut buffer).is_ok() && good.recv_from(&mut buffer).is_err());
    // Asked again too soon: a server has some time.
    playground.send(&question(7, b"one"));
    assert!(good.recv_from(&mut buffer).is_err());
    assert!(playground.wait(PATIENCE * 2).is_empty());
    answer(&good, b"one");
    assert_eq!(answers(&playground.turn(), 7), [b"answer to one"]);
    // Others go there at once, and from the same port too.
    for port in [7, 8] {
        playground.send(&question(port, b"two"));
        answer(&good, b"two");
        assert_eq!(answers(&playground.turn(), port), [b"answer to two"]);
    }
    // Whoever answered is left when that ends: the next is the first again, and so on.
    while silent.recv_from(&mut buffer).is_ok() {}
    playground.send(&question(9, b"three"));
    playground.wait(PATIENCE * 2);
    playground.wait(PATIENCE * 2);
    assert!(silent.recv_from(&mut buffer).is_ok(), "all others have been asked");
}

#[test]
fn question_that_all_servers_refuse_is_refused_to_the_guest() {
    let mut playground = Playground::new();
    playground.stack.resolver = Resolver::of(vec![socket().1, socket().1]);
    let frames = playground.send(&question(7, b"one"));
    // Port unreachable (RFC 792).
    assert_eq!((frames.len(), &frames[0][VNET + ETH + 20..][..2]), (1, &[3, 3][..]));
    assert_eq!(playground.stack.counts(), [0, 0, 0]);
}

#[test]
fn questions_without_answers_are_bounded_and_pass() {
    let (_silent, at) = socket();
    let mut playground = Playground::new();
    playground.stack.resolver = Resolver::of(vec![at, at, at]);
    for port in 1..2000 {
        playground.send(&question(port, &[7; 4000]));
    }
    assert_eq!(playground.stack.counts(), [0, 512, 512]);
    for _ in 0..20 {
        playground.wait(PATIENCE);
    }
    assert_eq!(playground.stack.counts(), [0, 0, 0]);
}

#[test]
fn question_by_tcp_goes_to_the_resolver_too() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut playground = Playground::new();
    let unreachable = SocketAddr::from(([255, 255, 255, 255], 53));
    playground.stack.resolver = Resolver::of(vec![unreachable, listener.local_addr().unwrap()]);
    let call = Segment { source: 7, destination: 53, flags: SYN, window: 1000, ..Segment::default() };
    let mut frame = Vec::new();
    call.write(&mut frame, MACS, [GUEST.into(), DNS.into()], [&[], &[]], 536, Offloads::default());
    assert_eq!(tcp(&playground.send(&frame)[0]).flags, SYN | ACK);
    assert!(listener.accept().is_ok());
}
