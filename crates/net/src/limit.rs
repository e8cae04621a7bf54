//! Limits of bytes and packets per second in one direction.

use std::time::{Duration, Instant};

use ringfence_rate::Limiter as Rates;
use rustix::event::Timespec;

/// Both limits, where set.
#[derive(Debug)]
pub(crate) struct Limiter(Rates);

/// What a large frame counts as: as many packets as the wire would have had.
const PACKET: usize = 1514;

impl Limiter {
    pub(crate) fn new(bytes: Option<u64>, packets: Option<u64>) -> Self {
        Self(Rates::new(bytes, packets, Instant::now()))
    }

    /// Whether a frame may pass now. If not, `retry` becomes the time to ask again.
    pub(crate) fn passes(&mut self, now: Instant, retry: &mut Option<Instant>) -> bool {
        let wait = self.0.wait(now);
        if !wait.is_zero() {
            *retry = Some(now + wait);
        }
        wait.is_zero()
    }

    /// A frame of `len` bytes has passed.
    pub(crate) fn take(&mut self, len: usize) {
        self.0.take(len as u64, len.div_ceil(PACKET) as u64);
    }
}

/// How long to wait from `now` to `at`, for the kernel: in whole milliseconds, not less.
pub(crate) fn time_until(at: Instant, now: Instant) -> Timespec {
    let left = match at.saturating_duration_since(now) {
        Duration::ZERO => Duration::ZERO,
        left => left + Duration::from_micros(999),
    };
    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_millis()) * 1_000_000 }
}
