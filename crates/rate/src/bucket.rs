//! Rate limits: token buckets that are right at low rates too.

use std::time::{Duration, Instant};

/// A bucket that fills at a fixed rate and holds one second's worth.
///
/// The level is counted in billionths of a token, so no part of a token is lost however often it is asked. A taking that
/// finds too little leaves a debt, so that one large frame under a low limit delays the next instead of never passing.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    level: i128,
    filled: Instant,
}

const PART: i128 = 1_000_000_000;

impl Bucket {
    /// A full bucket of `rate` tokens a second, at least one.
    pub fn new(rate: u64, now: Instant) -> Self {
        let rate = rate.max(1);
        Self { rate, level: i128::from(rate) * PART, filled: now }
    }

    /// How long from `now` until `tokens` (at most a second's worth) can be taken; zero if at once.
    pub fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_nanos().min(1 << 62);
        self.filled = self.filled.max(now);
        let rate = i128::from(self.rate);
        self.level = self.level.saturating_add((passed as i128).saturating_mul(rate)).min(rate * PART);
        let lacking = i128::from(tokens.min(self.rate)) * PART - self.level;
        if lacking <= 0 {
            return Duration::ZERO;
        }
        Duration::from_nanos(u64::try_from((lacking + rate - 1) / rate).unwrap_or(u64::MAX))
    }

    /// Takes `tokens`, into debt if there are not as many: for whoever has asked [`Self::wait`] first.
    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * PART;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens that pass in `seconds` when units of `unit` are wanted all the time.
    fn passed(rate: u64, unit: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let (mut now, mut sum) = (start, 0);
        let mut bucket = Bucket::new(rate, start);
        while now < start + Duration::from_secs(seconds) {
            match bucket.wait(1, now) {
                Duration::ZERO => {
                    bucket.take(unit);
                    sum += unit;
                }
                wait => now += wait,
            }
        }
        sum
    }

    #[test]
    fn rate_holds_over_time_and_for_units_larger_than_the_bucket() {
        for (rate, unit) in [(1, 1), (3, 1), (1000, 1514), (1_000_000, 64 << 10), (7, 100)] {
            let sum = passed(rate, unit, 1000);
            let most = rate * 1001 + unit;
            assert!(sum <= most && sum + unit >= rate * 1000, "{rate}/s in units of {unit}: {sum}");
        }
    }

    #[test]
    fn asking_often_loses_nothing() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1, start);
        bucket.take(1);
        for ms in 1..1000 {
            assert!(!bucket.wait(1, start + Duration::from_millis(ms)).is_zero());
        }
        assert!(bucket.wait(1, start + Duration::from_secs(1)).is_zero());
    }
}
