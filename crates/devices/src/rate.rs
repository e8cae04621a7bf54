//! Counters of a fixed frequency.

use ringfence_engine::VirtualTime;

const NS: u128 = 1_000_000_000;

/// A clock signal that has run since virtual time zero. Ticks and times convert through exact products, so
/// nothing drifts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate(pub(crate) u32);

impl Rate {
    /// Ticks that have passed at `time`.
    pub(crate) const fn ticks(self, time: VirtualTime) -> u64 {
        (time.0 as u128 * self.0 as u128 / NS) as u64
    }

    /// The first nanosecond at which `ticks` have passed.
    pub(crate) const fn time(self, ticks: u64) -> VirtualTime {
        let ns = (ticks as u128 * NS).div_ceil(self.0 as u128);
        if ns > u64::MAX as u128 { VirtualTime::NEVER } else { VirtualTime(ns as u64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tick_has_passed_at_its_time_and_not_before() {
        for rate in [Rate(1_193_182), Rate(3_579_545), Rate(32_768)] {
            for tick in [1, 2, 1_193_182, 77_777_777_777] {
                let time = rate.time(tick);
                assert_eq!(rate.ticks(time), tick);
                assert_eq!(rate.ticks(VirtualTime(time.0 - 1)), tick - 1);
            }
        }
    }
}
