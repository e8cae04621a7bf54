//! A guest without a way out: every protocol that could be one, and the forwarded ports, which are left.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::packets::packet;
use super::*;
use crate::user::addresses::{DNS, DNS6, GATEWAY6};
use crate::wire::icmp;

fn guest6() -> IpAddr {
    Ipv6Addr::from([0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 15]).into()
}

/// A call from the guest's port 7.
fn call(ends: [IpAddr; 2], port: u16) -> Vec<u8> {
    let segment = Segment { source: 7, destination: port, flags: SYN, window: 1000, ..Segment::default() };
    let mut frame = Vec::new();
    segment.write(&mut frame, MACS, ends, [&[], &[]], 536, Offloads::default());
    frame
}

/// Ends of everything that leads out: to the host's loopback, to the name server, and past the gateway to addresses for documentation.
fn ways_out(port: u16) -> Vec<([IpAddr; 2], u16)> {
    let v4 = IpAddr::from(GUEST);
    let far: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    vec![
        ([v4, GATEWAY.into()], port),
        ([v4, DNS.into()], 53),
        ([v4, far[0]], 80),
        ([guest6(), GATEWAY6.into()], port),
        ([guest6(), DNS6.into()], 53),
        ([guest6(), far[1]], 80),
    ]
}

#[test]
fn restricted_guest_gets_out_by_no_protocol() {
    // The name server would be the socket, or the listener of the same number.
    let (listener, datagrams) = loop {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()) {
            break (listener, socket);
        }
    };
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let mut restricted = Playground::with(&format!("user,restrict=yes,dns=127.0.0.1:{port}"));
    for (ends, port) in ways_out(port) {
        let frames = restricted.send(&call(ends, port));
        let answer = packet(&frames[0]);
        let answer = Segment::read(answer.payload).unwrap();
        assert_eq!((frames.len(), answer.flags), (1, RST | ACK), "TCP to {}", ends[1]);
        let mut frame = Vec::new();
        udp(&mut frame, MACS, ends, [7, port], b"out");
        assert!(restricted.send(&frame).is_empty(), "UDP to {}", ends[1]);
        let request = [if ends[0].is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1];
        icmp(&mut frame, MACS, ends, &request);
        // Our own addresses answer here; that leads nowhere.
        let ours = crate::user::addresses::is_ours(ends[1]);
        assert_eq!(restricted.send(&frame).len(), usize::from(ours), "echo to {}", ends[1]);
        assert_eq!(restricted.stack.counts(), [0, 0, 0], "{}", ends[1]);
    }
    assert!(listener.accept().is_err() && datagrams.recv_from(&mut [0]).is_err());
    // All of it was right: without the word it goes out.
    let mut open = Playground::with(&format!("user,dns=127.0.0.1:{port}"));
    for (ends, port) in ways_out(port).into_iter().take(2) {
        assert_eq!(tcp(&open.send(&call(ends, port))[0]).flags, SYN | ACK);
        assert!(listener.accept().is_ok());
        let mut frame = Vec::new();
        udp(&mut frame, MACS, ends, [7, port], b"out");
        open.send(&frame);
        assert!(datagrams.recv_from(&mut [0; 3]).is_ok());
    }
}

#[test]
fn restricted_guest_is_told_of_no_router_and_no_name_server() {
    for (word, router) in [("", true), (",restrict=yes", false)] {
        let mut playground = Playground::with(&format!("user{word}"));
        let mut frame = Vec::new();
        // A router solicitation (RFC 4861 4.1).
        icmp(&mut frame, MACS, [guest6(), "ff02::2".parse().unwrap()], &[133, 0, 0, 0, 0, 0, 0, 0]);
        let frames = playground.send(&frame);
        let advertisement = packet(&frames[0]).payload;
        assert_eq!(advertisement[6..8] != [0, 0], router, "its time as a router");
        // The option with resolvers (RFC 8106 5.1).
        assert_eq!(advertisement.windows(2).any(|option| option == [25, 3]), router);
    }
}

#[test]
fn forwarded_ports_lead_to_a_restricted_guest_and_its_answers_back() {
    let port = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let (stream_at, datagram_at): (SocketAddr, SocketAddr) = (port(), port());
    let spec = format!("user,restrict=yes,forward=tcp:{stream_at}:22,forward=udp:{datagram_at}:53");
    let mut playground = Playground::with(&spec);
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.send_to(b"question", datagram_at).unwrap();
    let frames = playground.turn();
    let asked = packet(&frames[0]).payload.to_vec();
    assert_eq!((&asked[2..4], &asked[8..]), (&[0, 53][..], &b"question"[..]));
    let mut frame = Vec::new();
    let back = u16::from_be_bytes([asked[0], asked[1]]);
    udp(&mut frame, MACS, [GUEST.into(), GATEWAY.into()], [53, back], b"answer");
    assert!(playground.send(&frame).is_empty());
    let mut buffer = [0; 20];
    assert_eq!(client.recv(&mut buffer).unwrap(), 6);
    // From another port of the guest's it is no answer, and goes nowhere.
    udp(&mut frame, MACS, [GUEST.into(), GATEWAY.into()], [54, back], b"other");
    playground.send(&frame);
    assert_eq!(playground.stack.counts()[1], 0);
    let _client = TcpStream::connect(stream_at).unwrap();
    let frames = playground.turn();
    let called = tcp(&frames[0]);
    assert_eq!((called.flags, called.destination), (SYN, 22));
}
