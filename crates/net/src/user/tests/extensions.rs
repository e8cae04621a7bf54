//! Extension headers of IPv6: skipped as every host does, or a reason to drop the packet.

use std::net::{IpAddr, Ipv6Addr};

use super::packets::{join, packet};
use super::*;
use crate::user::addresses::GATEWAY6;
use crate::user::fragments::cut;
use crate::wire::extensions::{HOP_OPTIONS, OPTIONS, ROUTING};
use crate::wire::{FRAGMENT, ICMP6, icmp, sum};

const IP: usize = VNET + ETH;
/// Six bytes of padding (RFC 8200 4.2), and an option that may be skipped with two bytes of it.
const PADDED: [u8; 6] = [1, 4, 0, 0, 0, 0];
const UNKNOWN: [u8; 6] = [0x3e, 2, 9, 9, 0, 0];

fn guest() -> IpAddr {
    Ipv6Addr::from([0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 15]).into()
}

/// An echo request to the gateway with so many bytes.
fn ping(len: usize) -> Vec<u8> {
    let message = [&[128, 0, 0, 0, 1, 2, 0, 1][..], &vec![5; len]].concat();
    let mut frame = Vec::new();
    icmp(&mut frame, MACS, [guest(), GATEWAY6.into()], &message);
    frame
}

/// The frame with extension headers before what it carries: the kind of each, and what is behind kind and length.
fn extended(frame: &[u8], extensions: &[(u8, &[u8])]) -> Vec<u8> {
    let (head, payload) = frame.split_at(IP + 40);
    let (mut head, mut behind) = (head.to_vec(), Vec::new());
    let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).chain([head[IP + 6]]).collect();
    head[IP + 6] = kinds[0];
    for ((_, body), next) in extensions.iter().zip(&kinds[1..]) {
        behind.extend([*next, ((body.len() + 2) / 8 - 1) as u8]);
        behind.extend_from_slice(body);
    }
    let len = (behind.len() + payload.len()) as u16;
    head[IP + 4..IP + 6].copy_from_slice(&len.to_be_bytes());
    [&head, &behind[..], payload].concat()
}

fn is_answered(extensions: &[(u8, &[u8])]) -> bool {
    let frames = Playground::new().send(&extended(&ping(40), extensions));
    let answered = frames.len() == 1;
    assert!(!answered || packet(&frames[0]).payload[0] == 129);
    answered
}

#[test]
fn headers_that_hosts_skip_are_skipped() {
    for extensions in [
        &[(OPTIONS, &PADDED[..])][..],
        &[(OPTIONS, &UNKNOWN)],
        &[(OPTIONS, &[0; 6])],
        &[(OPTIONS, &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
        &[(HOP_OPTIONS, &PADDED)],
        // What goes with reports of groups: the routers are to look at it (RFC 2711).
        &[(HOP_OPTIONS, &[5, 2, 0, 0, 1, 0])],
        &[(ROUTING, &[77, 0, 0, 0, 0, 0])],
        // All there can be, in the order in which they come (RFC 8200 4.1).
        &[(HOP_OPTIONS, &PADDED), (OPTIONS, &UNKNOWN), (ROUTING, &[0; 6]), (OPTIONS, &PADDED)],
        // A piece that is all of the packet.
        &[(OPTIONS, &PADDED), (FRAGMENT, &[0, 0, 0, 0, 0, 9]), (OPTIONS, &PADDED)],
    ] {
        assert!(is_answered(extensions), "{extensions:?}");
    }
}

#[test]
fn headers_that_ask_for_more_or_are_none_drop_the_packet() {
    for extensions in [
        // Options that nobody may skip who does not know them.
        &[(OPTIONS, &[0x40, 4, 0, 0, 0, 0][..])][..],
        &[(OPTIONS, &[0x80, 4, 0, 0, 0, 0])],
        &[(OPTIONS, &[0xc2, 4, 0, 1, 0, 0])],
        &[(HOP_OPTIONS, &[0, 0, 0, 0, 0xff, 0])],
        // One that ends behind its header, and one that has no length.
        &[(OPTIONS, &[1, 5, 0, 0, 0, 0])],
        &[(OPTIONS, &[1, 3, 0, 0, 0, 1])],
        // Somewhere else to go, and options for each hop behind something else.
        &[(ROUTING, &[0, 1, 0, 0, 0, 0])],
        &[(OPTIONS, &PADDED), (HOP_OPTIONS, &PADDED)],
        &[(HOP_OPTIONS, &PADDED), (HOP_OPTIONS, &PADDED)],
        // Authentication, encryption, mobility, no more.
        &[(51, &PADDED)],
        &[(50, &PADDED)],
        &[(135, &PADDED)],
        &[(59, &PADDED)],
    ] {
        assert!(!is_answered(extensions), "{extensions:?}");
    }
    // Cut anywhere, and a length past the end.
    let whole = extended(&ping(0), &[(HOP_OPTIONS, &PADDED), (ROUTING, &[0; 6]), (OPTIONS, &PADDED)]);
    for len in IP..whole.len() {
        let mut cut = whole[..len].to_vec();
        if len >= IP + 40 {
            cut[IP + 4..IP + 6].copy_from_slice(&((len - IP - 40) as u16).to_be_bytes());
        }
        assert!(Playground::new().send(&cut).is_empty(), "{len}");
    }
    for header in 0..3 {
        let mut long = whole.clone();
        long[IP + 40 + header * 8 + 1] = 0xff;
        assert!(Playground::new().send(&long).is_empty(), "{header}");
    }
}

#[test]
fn packet_in_pieces_has_such_headers_before_and_inside() {
    let mut playground = Playground::new();
    let inside = extended(&ping(4000), &[(OPTIONS, &PADDED)]);
    let pieces: Vec<Vec<u8>> =
        cut(&inside, 1280, 9).iter().map(|piece| extended(piece, &[(OPTIONS, &UNKNOWN)])).collect();
    assert!(pieces.len() > 3);
    let frames: Vec<_> = pieces.iter().flat_map(|piece| playground.send(piece)).collect();
    let answer = join(&frames);
    assert_eq!((answer[0], answer.len()), (129, 4008));
    // Pieces inside of pieces are nothing.
    let nested = extended(&ping(4000), &[(OPTIONS, &PADDED), (FRAGMENT, &[0, 1, 0, 0, 0, 9])]);
    assert!(cut(&nested, 1280, 10).iter().all(|piece| playground.send(piece).is_empty()));
}

#[test]
fn checksum_is_that_of_what_is_behind_the_headers() {
    let frame = extended(&ping(40), &[(OPTIONS, &PADDED)]);
    let whole = packet(&frame);
    assert_eq!((whole.protocol, whole.payload.len()), (ICMP6, 48));
    assert!(whole.sum_is_right() && sum(whole.payload, 0) != 0xffff);
    for at in IP + 48..frame.len() {
        let mut wrong = frame.clone();
        wrong[at] ^= 0x40;
        assert!(Playground::new().send(&wrong).is_empty(), "{at}");
    }
}
