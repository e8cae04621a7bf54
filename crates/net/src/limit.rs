//! Limits of bytes and packets per second in one direction.

use std::time::Instant;

use crate::bucket::Bucket;

/// Both limits, where set.
#[derive(Debug)]
pub(crate) struct Limiter {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

/// What a large frame counts as: as many packets as the wire would have had.
const PACKET: usize = 1514;

impl Limiter {
    pub(crate) fn new(bytes: Option<u64>, packets: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            bytes: bytes.map(|rate| Bucket::new(rate, now)),
            packets: packets.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Whether a frame may pass now. If not, `retry` becomes the time to ask again.
    pub(crate) fn passes(&mut self, now: Instant, retry: &mut Option<Instant>) -> bool {
        let waits = [&mut self.bytes, &mut self.packets].into_iter().flatten().map(|b| b.wait(1, now));
        match waits.max() {
            Some(wait) if !wait.is_zero() => {
                *retry = Some(now + wait);
                false
            }
            _ => true,
        }
    }

    /// A frame of `len` bytes has passed.
    pub(crate) fn take(&mut self, len: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(len as u64);
        }
        if let Some(bucket) = &mut self.packets {
            bucket.take(len.div_ceil(PACKET) as u64);
        }
    }
}
