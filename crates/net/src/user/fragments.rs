//! Packets in pieces: put together as they come from the guest, and cut where they are longer than its link takes.
//!
//! What is kept is bounded in packets, pieces, bytes and time. Pieces that overlap give their packet up, in IPv6 by rule
//! (RFC 8200 4.5) and in IPv4 because nobody but an attacker sends such.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::wire::{ETH, FRAGMENT, Fragment, IPV4, Packet, VNET, be16, sum};

/// Packets that are being put together; the oldest makes room for a new one.
const MAX: usize = 16;
/// Pieces of a packet: of 64 KiB in pieces of 576 bytes, as small as links have them, there are 119.
const PIECES: usize = 128;
/// The longest payload.
const LONGEST: usize = 65_535;
/// How long the rest of a packet is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the pieces of a packet have in common.
type Key = (IpAddr, IpAddr, u8, u32);

#[derive(Debug)]
struct Parts {
    begun: Instant,
    /// Offsets and bytes, in order.
    pieces: Vec<(usize, Vec<u8>)>,
    /// Bytes in all, once the last piece is there.
    len: Option<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct Fragments(HashMap<Key, Parts>);

impl Fragments {
    /// Takes a piece of a packet. Gives the payload when it is whole.
    pub(crate) fn add(&mut self, packet: &Packet<'_>, fragment: Fragment, now: Instant) -> Option<Vec<u8>> {
        self.0.retain(|_, parts| now.saturating_duration_since(parts.begun) < PATIENCE);
        let key = (packet.source, packet.destination, packet.protocol, fragment.id);
        if !self.0.contains_key(&key) && self.0.len() >= MAX {
            let oldest = self.0.iter().min_by_key(|(_, parts)| parts.begun).map(|(key, _)| *key);
            oldest.and_then(|key| self.0.remove(&key));
        }
        let parts = self.0.entry(key).or_insert(Parts { begun: now, pieces: Vec::new(), len: None });
        match parts.add(fragment, packet.payload) {
            Some(true) => self.0.remove(&key).map(Parts::join),
            Some(false) => None,
            None => {
                self.0.remove(&key);
                None
            }
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl Parts {
    /// Whether the packet is whole now; `None` if it cannot become one.
    fn add(&mut self, fragment: Fragment, bytes: &[u8]) -> Option<bool> {
        let (start, end) = (fragment.offset, fragment.offset + bytes.len());
        let at = self.pieces.partition_point(|(offset, _)| *offset < start);
        let before = at.checked_sub(1).and_then(|at| self.pieces.get(at));
        let after = self.pieces.get(at);
        // The same again is no harm.
        if after.is_some_and(|(offset, piece)| *offset == start && piece == bytes) {
            return Some(false);
        }
        let overlaps = before.is_some_and(|(offset, piece)| offset + piece.len() > start)
            || after.is_some_and(|(offset, _)| *offset < end);
        // All but the last are of eights, and nothing lies behind the last.
        let odd = fragment.more && (bytes.is_empty() || !bytes.len().is_multiple_of(8));
        let last = if fragment.more { self.len } else { Some(end) };
        let beyond = last.is_some_and(|len| end > len)
            || self.len.is_some_and(|len| !fragment.more && len != end)
            || last.is_some_and(|len| self.pieces.last().is_some_and(|(at, piece)| at + piece.len() > len));
        if overlaps || odd || beyond || end > LONGEST || self.pieces.len() >= PIECES {
            return None;
        }
        self.len = last;
        self.pieces.insert(at, (start, bytes.to_vec()));
        // Without overlaps the sum tells whether there is a gap.
        let have: usize = self.pieces.iter().map(|(_, piece)| piece.len()).sum();
        Some(self.len == Some(have))
    }

    fn join(self) -> Vec<u8> {
        self.pieces.into_iter().flat_map(|(_, piece)| piece).collect()
    }
}

/// Cuts a frame of ours with an IP packet that is longer than `mtu` into frames with pieces of it, numbered `id`.
pub(crate) fn cut(frame: &[u8], mtu: u16, id: u32) -> Vec<Vec<u8>> {
    let (ethernet, ip) = frame.split_at(VNET + ETH);
    let v4 = be16(frame, VNET + 12) == Some(IPV4);
    let (header, payload) = ip.split_at(if v4 { 20 } else { 40 });
    let room = (usize::from(mtu) - header.len() - if v4 { 0 } else { 8 }) & !7;
    let piece = |(at, bytes): (usize, &[u8])| {
        let offset = at * room;
        let more = offset + bytes.len() < payload.len();
        let mut piece = [ethernet, header].concat();
        let ip = VNET + ETH;
        if v4 {
            let place = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
            piece[ip + 2..ip + 4].copy_from_slice(&((20 + bytes.len()) as u16).to_be_bytes());
            piece[ip + 4..ip + 6].copy_from_slice(&(id as u16).to_be_bytes());
            piece[ip + 6..ip + 8].copy_from_slice(&place.to_be_bytes());
            piece[ip + 10..ip + 12].fill(0);
            let check = !(sum(&piece[ip..], 0) as u16);
            piece[ip + 10..ip + 12].copy_from_slice(&check.to_be_bytes());
        } else {
            piece[ip + 4..ip + 6].copy_from_slice(&((8 + bytes.len()) as u16).to_be_bytes());
            let protocol = std::mem::replace(&mut piece[ip + 6], FRAGMENT);
            piece.extend_from_slice(&[protocol, 0]);
            piece.extend_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
            piece.extend_from_slice(&id.to_be_bytes());
        }
        piece.extend_from_slice(bytes);
        piece
    };
    payload.chunks(room).enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    const MACS: [[u8; 6]; 2] = [[2; 6]; 2];

    fn ends(v4: bool) -> [IpAddr; 2] {
        let text = if v4 { ["10.0.2.2", "10.0.2.15"] } else { ["fd52:696e:6766::2", "fd52:696e:6766::15"] };
        text.map(|text| text.parse().unwrap())
    }

    fn packet(frame: &[u8]) -> Packet<'_> {
        Packet::read(be16(frame, VNET + 12).unwrap(), &frame[VNET + ETH..]).unwrap()
    }

    #[test]
    fn what_is_cut_is_put_together_in_any_order() {
        let now = Instant::now();
        for v4 in [true, false] {
            for len in [1473, 3000, 40_000, 65_507] {
                let body: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                let mut frame = Vec::new();
                wire::udp(&mut frame, MACS, ends(v4), [1, 2], &body);
                for turn in 0..3 {
                    let mut pieces = cut(&frame, 1500, 77);
                    assert!(pieces.iter().all(|piece| piece.len() <= VNET + ETH + 1500));
                    match turn {
                        1 => pieces.reverse(),
                        2 => pieces.rotate_left(1),
                        _ => {}
                    }
                    let mut fragments = Fragments::default();
                    let mut whole = None;
                    for piece in &pieces {
                        assert!(whole.is_none());
                        let packet = packet(piece);
                        whole = fragments.add(&packet, packet.fragment.unwrap(), now);
                    }
                    let payload = whole.unwrap();
                    let whole = Packet { payload: &payload, fragment: None, ..packet(&pieces[0]) };
                    assert!(whole.sum_is_right() && payload[8..] == body && fragments.len() == 0);
                }
            }
        }
    }

    fn feed(pieces: &[(usize, usize, bool)]) -> (Option<usize>, usize) {
        let ends = ends(true);
        let mut fragments = Fragments::default();
        let mut whole = None;
        for &(offset, len, more) in pieces {
            let bytes = vec![(offset / 8) as u8; len];
            let packet = Packet {
                source: ends[1],
                destination: ends[0],
                protocol: 17,
                payload: &bytes,
                hops: 64,
                fragment: None,
            };
            let fragment = Fragment { id: 5, offset, more };
            whole = whole.or(fragments.add(&packet, fragment, Instant::now()));
        }
        (whole.map(|payload| payload.len()), fragments.len())
    }

    #[test]
    fn pieces_that_contradict_each_other_make_nothing() {
        assert_eq!(feed(&[(0, 16, true), (16, 5, false)]), (Some(21), 0));
        assert_eq!(feed(&[(0, 16, true), (0, 16, true), (16, 5, false)]), (Some(21), 0), "twice the same");
        for pieces in [
            &[(0, 16, true), (8, 16, true)][..],
            &[(8, 16, true), (0, 16, true)],
            &[(0, 15, true)],
            &[(0, 0, true)],
            &[(65_528, 8, true)],
            &[(65_528, 100, false)],
            &[(16, 8, false), (24, 8, true)],
            &[(24, 8, true), (8, 8, false)],
            &[(16, 8, false), (32, 8, false)],
        ] {
            assert_eq!(feed(pieces), (None, 0), "{pieces:?}");
        }
        assert_eq!(feed(&[(0, 16, true), (24, 5, false)]), (None, 1), "a gap is waited for");
        let many: Vec<_> = (0..PIECES + 1).map(|i| (i * 16, 8, true)).collect();
        assert_eq!(feed(&many), (None, 0), "too many pieces");
    }

    #[test]
    fn flood_of_pieces_is_bounded_and_passes() {
        let (ends, mut fragments, now) = (ends(true), Fragments::default(), Instant::now());
        let mut add = |id, now| {
            let payload = &[1; 1400];
            let [destination, source] = ends;
            let packet = Packet { source, destination, protocol: 17, payload, hops: 1, fragment: None };
            fragments.add(&packet, Fragment { id, offset: 0, more: true }, now);
            fragments.len()
        };
        for id in 0..10_000 {
            assert!(add(id, now) <= MAX);
        }
        assert_eq!(add(0, now + PATIENCE), 1, "the rest has waited too long");
    }
}
