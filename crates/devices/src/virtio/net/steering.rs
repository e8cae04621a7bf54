//! Which pair of queues a frame belongs to (5.1.6.5.6): a flow comes in by the pair by which the guest last sent it.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use ringfence_net::wire::VNET;

/// Flows that are remembered. Two that share a place are one here, which costs order between vCPUs and nothing else.
const PLACES: usize = 1024;
/// No frame of such a flow has gone out.
const UNKNOWN: u16 = u16::MAX;

/// A pair's queue for frames that come in (5.1.2).
pub(super) fn receive_queue(pair: u16) -> u16 {
    pair * 2
}

/// A pair's queue for frames that go out.
pub(super) fn transmit_queue(pair: u16) -> u16 {
    pair * 2 + 1
}

/// The pairs that the driver uses, and the flows.
#[derive(Debug)]
pub(super) struct Steering {
    /// Pairs that the device has.
    most: u16,
    pairs: RwLock<u16>,
    places: Box<[AtomicU16]>,
}

impl Steering {
    /// For `most` pairs, of which the driver uses the first.
    pub(super) fn new(most: u16) -> Self {
        let places = if most > 1 { PLACES } else { 0 };
        let places = (0..places).map(|_| AtomicU16::new(UNKNOWN)).collect();
        Self { most, pairs: RwLock::new(1), places }
    }

    pub(super) fn most(&self) -> u16 {
        self.most
    }

    /// How many pairs the driver uses. That does not change while the guard is held: the device may use no other queue once the
    /// driver has been told of a change (5.1.6.5.6.1).
    pub(super) fn pairs(&self) -> RwLockReadGuard<'_, u16> {
        self.pairs.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the device use `pairs` from now on. False if it cannot.
    pub(super) fn set(&self, pairs: u16) -> bool {
        let can = (1..=self.most).contains(&pairs);
        if can {
            *self.pairs.write().unwrap_or_else(PoisonError::into_inner) = pairs;
        }
        can
    }

    /// As for a driver that begins anew.
    pub(super) fn reset(&self) {
        self.set(1);
        self.places.iter().for_each(|place| place.store(UNKNOWN, Ordering::Relaxed));
    }

    fn place(&self, message: &[u8]) -> Option<(&AtomicU16, u64)> {
        let flow = flow(message.get(VNET..)?)?;
        Some((self.places.get((flow % PLACES as u64) as usize)?, flow))
    }

    /// The guest has sent a frame by `pair`.
    pub(super) fn sent(&self, message: &[u8], pair: u16) {
        if self.most > 1
            && let Some((place, _)) = self.place(message)
            && place.load(Ordering::Relaxed) != pair
        {
            place.store(pair, Ordering::Relaxed);
        }
    }

    /// The pair, one of `pairs`, by which a frame is to come in.
    pub(super) fn pair(&self, message: &[u8], pairs: u16) -> u16 {
        if pairs < 2 {
            return 0;
        }
        let Some((place, flow)) = self.place(message) else { return 0 };
        match place.load(Ordering::Relaxed) {
            pair if pair < pairs => pair,
            // Flows that the guest has not answered yet are spread.
            _ => (flow / PLACES as u64 % u64::from(pairs)) as u16,
        }
    }
}

/// A number for a frame's flow, the same in both directions. `None` for what is no IP packet.
fn flow(frame: &[u8]) -> Option<u64> {
    let ip = frame.get(14..)?;
    let (addresses, protocol, payload) = match (frame.get(12..14)?, ip.first()? >> 4) {
        ([0x08, 0], 4) => {
            // Pieces of a packet have no ports, but for the first, and all of them go the same way.
            let whole = ip.get(6)? & 0x3f == 0 && *ip.get(7)? == 0;
            let header = usize::from(ip.first()? & 15) * 4;
            (ip.get(12..20)?, *ip.get(9)?, ip.get(header..).filter(|_| whole))
        }
        ([0x86, 0xdd], 6) => (ip.get(8..40)?, *ip.get(6)?, ip.get(40..)),
        _ => return None,
    };
    let ports = payload.filter(|_| matches!(protocol, 6 | 17)).and_then(|payload| payload.get(..4));
    let (from, to) = addresses.split_at(addresses.len() / 2);
    let (from_port, to_port) = ports.map_or((&[][..], &[][..]), |ports| ports.split_at(2));
    // Adding makes it the same in both directions.
    let ends = end(from, from_port).wrapping_add(end(to, to_port));
    Some(mix(ends ^ u64::from(protocol)))
}

fn end(address: &[u8], port: &[u8]) -> u64 {
    address.iter().chain(port).fold(0xcbf2_9ce4_8422_2325, |hash, byte| mix(hash ^ u64::from(*byte)))
}

fn mix(value: u64) -> u64 {
    let value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ value >> 29
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(from: [u8; 6], to: [u8; 6], fragment: u8) -> Vec<u8> {
        let mut message = vec![0; VNET + 12];
        message.extend([8, 0, 0x45, 0, 0, 28, 0, 0, fragment, 0, 64, 17, 0, 0]);
        message.extend(&from[..4]);
        message.extend(&to[..4]);
        message.extend(&from[4..]);
        message.extend(&to[4..]);
        message.extend([0, 8, 0, 0]);
        message
    }

    const GUEST: [u8; 6] = [10, 0, 2, 15, 4, 1];
    const OTHER: [u8; 6] = [192, 0, 2, 1, 0, 80];

    #[test]
    fn answers_come_in_where_the_guest_sent_from() {
        let steering = Steering::new(4);
        assert!(steering.set(4) && !steering.set(5) && !steering.set(0));
        for pair in [3, 1, 2] {
            steering.sent(&message(GUEST, OTHER, 0), pair);
            assert_eq!(steering.pair(&message(OTHER, GUEST, 0), 4), pair);
            assert_eq!(steering.pair(&message(OTHER, GUEST, 0), 1), 0);
        }
        assert!(steering.pair(&message(OTHER, GUEST, 0), 2) < 2, "a pair that is not used any more");
        let spread: std::collections::HashSet<u16> =
            (0..100).map(|port| steering.pair(&message(OTHER, [10, 0, 2, 15, 9, port], 0), 4)).collect();
        assert_eq!(spread.len(), 4, "new flows go everywhere");
        steering.reset();
        assert_eq!(*steering.pairs(), 1);
    }

    #[test]
    fn pieces_of_a_packet_go_one_way_whatever_they_begin_with() {
        let steering = Steering::new(8);
        let pair = |port, fragment| steering.pair(&message([192, 0, 2, 1, 0, port], GUEST, fragment), 8);
        assert!((0..50).all(|port| pair(port, 0x20) == pair(0, 0x20)));
        assert!((0..50).all(|port| pair(port, 1) == pair(0, 0x20)));
        assert!((0..50).any(|port| pair(port, 0) != pair(0, 0)));
    }

    #[test]
    fn cut_frames_belong_to_the_first_pair_or_some_other() {
        let steering = Steering::new(3);
        let whole = message(GUEST, OTHER, 0);
        for len in 0..whole.len() {
            steering.sent(&whole[..len], 2);
            assert!(steering.pair(&whole[..len], 3) < 3, "{len}");
        }
        assert_eq!(steering.pair(&[0; 60], 3), 0);
    }
}
