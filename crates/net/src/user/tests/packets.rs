//! Packets that are longer than the link, in pieces, or not what their checksums say.

use std::net::{IpAddr, Ipv6Addr};

use super::*;
use crate::user::addresses::GATEWAY6;
use crate::user::fragments::{Fragments, cut};
use crate::wire::{Packet, be16, icmp, sum};

/// The packet in frames of pieces: its payload.
pub(super) fn join(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut fragments = Fragments::default();
    let mut whole = None;
    for frame in frames {
        assert!(frame.len() <= VNET + ETH + 1500, "{}", frame.len());
        let packet = Packet::read(be16(frame, VNET + 12).unwrap(), &frame[VNET + ETH..]).unwrap();
        whole = fragments.add(&packet, packet.fragment.unwrap(), Instant::now());
    }
    whole.unwrap()
}

/// What comes out of the stack when pieces of `frame` go in.
fn send_in_pieces(playground: &mut Playground, frame: &[u8]) -> Vec<Vec<u8>> {
    cut(frame, 1500, 9).iter().flat_map(|piece| playground.send(piece)).collect()
}

#[test]
fn long_datagrams_go_out_whole_and_answers_come_in_pieces() {
    for (v6, len) in [(false, 1473), (false, 9000), (false, 65_507), (true, 1453), (true, 65_507)] {
        let guest: IpAddr =
            if v6 { Ipv6Addr::from([0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 15]).into() } else { GUEST.into() };
        let gateway: IpAddr = if v6 { GATEWAY6.into() } else { GATEWAY.into() };
        let Ok(server) = UdpSocket::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }) else {
            eprintln!("skipped: this host has no {}", if v6 { "IPv6" } else { "IPv4" });
            continue;
        };
        let to = server.local_addr().unwrap().port();
        let mut playground = Playground::new();
        let body: Vec<u8> = (0..len).map(|i| (i % 249) as u8).collect();
        let mut frame = Vec::new();
        udp(&mut frame, MACS, [guest, gateway], [7, to], &body);
        send_in_pieces(&mut playground, &frame);
        let mut buffer = vec![0; 70_000];
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (got, from) = server.recv_from(&mut buffer).unwrap();
        assert!(buffer[..got] == body, "{len}");
        server.send_to(&buffer[..got], from).unwrap();
        let frames = playground.turn();
        assert!(frames.len() > 1);
        let payload = join(&frames);
        assert!(payload[8..] == body);
        let whole = Packet { payload: &payload, source: gateway, destination: guest, ..packet(&frames[0]) };
        assert!(whole.sum_is_right());
    }
}

pub(super) fn packet(frame: &[u8]) -> Packet<'_> {
    Packet::read(be16(frame, VNET + 12).unwrap(), &frame[VNET + ETH..]).unwrap()
}

#[test]
fn datagram_longer_than_ipv4_has_them_is_not_sent_to_the_guest() {
    let mut playground = Playground::new();
    let ips = [GATEWAY.into(), GUEST.into()];
    playground.stack.out.udp(ips, [1, 2], &[0; 65_508]);
    assert!(playground.turn().is_empty());
    playground.stack.out.udp(ips, [1, 2], &[0; 65_507]);
    assert_eq!(playground.turn().len(), 45);
}

#[test]
fn call_in_pieces_is_a_call_and_one_with_a_wrong_sum_is_not() {
    let mut playground = Playground::new();
    let mut frame = Peer::calling(1, playground.port()).frame(SYN, &[5; 1600]);
    // Its checksum leaves the pieces to the card, which cannot finish that.
    frame[0] = NEEDS_CSUM;
    assert_eq!(tcp(&send_in_pieces(&mut playground, &frame)[0]).flags, SYN | ACK);
    frame[VNET + ETH + 20 + 100] ^= 1;
    frame[VNET + ETH + 20 + 1] = 2;
    assert!(send_in_pieces(&mut playground, &frame).is_empty());
    assert_eq!(playground.connections(), 1);
}

/// An echo request to the gateway.
fn ping(len: usize) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend((0..len).map(|i| i as u8));
    let mut frame = Vec::new();
    icmp(&mut frame, MACS, [GUEST.into(), GATEWAY.into()], &message);
    frame
}

#[test]
fn echo_is_answered_when_its_sum_is_right_however_long_it_is() {
    let mut playground = Playground::new();
    let frames = playground.send(&ping(56));
    let answer = packet(&frames[0]).payload;
    assert_eq!((&answer[..2], sum(answer, 0)), (&[0, 0][..], 0xffff));
    for at in VNET + ETH + 20..ping(56).len() {
        let mut frame = ping(56);
        frame[at] ^= 0x40;
        assert!(playground.send(&frame).is_empty(), "{at}");
    }
    let frame = ping(5000);
    let mut answer = join(&send_in_pieces(&mut playground, &frame));
    assert_eq!(sum(&answer, 0), 0xffff);
    answer[0] = 8;
    assert_eq!(answer[4..], frame[VNET + ETH + 20 + 4..]);
}

#[test]
fn guest_that_claims_to_take_long_segments_gets_none_longer_than_its_link() {
    for (spec, most) in [("user", 1460), ("user,mtu=1280", 1240), ("user,mtu=9000", 8960)] {
        let mut playground = Playground::with(spec);
        let mut peer = Peer { window: 60_000, ..Peer::calling(1, playground.port()) };
        let mut frame = peer.frame(SYN, &[]);
        let option = frame.windows(4).position(|bytes| bytes == [2, 4, 0x05, 0xb4]).unwrap();
        frame[option + 2..option + 4].copy_from_slice(&65_535_u16.to_be_bytes());
        // The checksum is not what this is about.
        frame[0] = NEEDS_CSUM;
        let frames = playground.send(&frame);
        (peer.seq, peer.ack) = (1001, tcp(&frames[0]).seq.wrapping_add(1));
        playground.send(&peer.frame(ACK, &[]));
        let (mut host, _) = playground.listener.accept().unwrap();
        let frames = says(&mut playground, &mut host, &[9; 30_000]);
        let longest = frames.iter().map(|frame| tcp(frame).payload.len()).max();
        assert_eq!(longest, Some(most), "{spec}");
    }
}

#[test]
fn headers_of_all_kinds_before_a_frame_change_nothing_but_the_trust_in_its_sum() {
    let mut playground = Playground::new();
    let mut seed = 7_u32;
    for port in 1..300 {
        let mut frame = Peer::calling(port, playground.port()).frame(SYN, &[]);
        for byte in &mut frame[1..VNET] {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = if seed & 0x300_0000 == 0 { 0xff } else { (seed >> 24) as u8 };
        }
        assert_eq!(tcp(&playground.send(&frame)[0]).flags, SYN | ACK);
    }
}
