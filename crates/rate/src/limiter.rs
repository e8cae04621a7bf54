//! Limits of bytes and events per second.

use std::time::{Duration, Instant};

use crate::Bucket;

/// Both limits, where set.
#[derive(Clone, Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    events: Option<Bucket>,
}

impl Limiter {
    /// Limits in bytes and events per second, with full buckets.
    pub fn new(bytes: Option<u64>, events: Option<u64>, now: Instant) -> Self {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, now));
        Self { bytes: bucket(bytes), events: bucket(events) }
    }

    /// How long from `now` until something may pass; zero if at once. What does goes into debt if it is large, so its
    /// size does not matter yet.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let waits = [&mut self.bytes, &mut self.events].into_iter().flatten().map(|b| b.wait(1, now));
        waits.max().unwrap_or_default()
    }

    /// Something has passed, of so many bytes, which counts as so many events.
    pub fn take(&mut self, bytes: u64, events: u64) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.events, events)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of `len` bytes that pass in `seconds` when more are always waiting.
    fn passed(mut limiter: Limiter, start: Instant, len: u64, seconds: u64) -> u64 {
        let (mut now, mut count) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match limiter.wait(now) {
                Duration::ZERO => {
                    limiter.take(len, 1);
                    count += 1;
                }
                wait => now += wait,
            }
        }
        count
    }

    #[test]
    fn the_tighter_limit_counts() {
        let start = Instant::now();
        let limiter = |bytes, events| Limiter::new(bytes, events, start);
        let close = |count: u64, expected: u64| count.abs_diff(expected) <= 1;
        // A second's worth passes at once, and the last one goes into debt.
        assert!(close(passed(limiter(None, Some(3)), start, 4096, 100), 303));
        assert!(close(passed(limiter(Some(4096), None), start, 4096, 100), 102));
        assert!(close(passed(limiter(Some(4096), Some(3)), start, 4096, 100), 102));
        assert!(close(passed(limiter(Some(1 << 20), Some(3)), start, 4096, 100), 303));
        // One piece a thousand times the rate passes, and delays the next for as long as it is worth.
        assert!(close(passed(limiter(Some(1000), None), start, 1_000_000, 10_000), 11));
    }

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = Limiter::new(None, None, Instant::now());
        limiter.take(u64::MAX, u64::MAX);
        assert!(limiter.wait(Instant::now()).is_zero());
    }
}
