//! The guest's time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nanoseconds since the machine was switched on, by its own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct VirtualTime(pub u64);

impl VirtualTime {
    /// A time that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// `nanoseconds` later, never past [`VirtualTime::NEVER`].
    pub const fn after(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }

    /// Nanoseconds from `earlier` to this time, zero if it is not earlier.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What makes time pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockMode {
    /// The host's monotonic clock, without the times the machine was paused.
    Host,
    /// The count of retired instructions: one nanosecond each. A run repeats exactly.
    Counted,
}

/// The machine's clock: virtual time and the time-stamp counter, which advance together.
///
/// The TSC is derived from virtual time, so both agree for ever and no host TSC is needed; its frequency is
/// chosen when the clock is made.
#[derive(Debug)]
pub struct VirtualClock {
    mode: ClockMode,
    tsc_khz: u32,
    origin: Instant,
    /// Counted: nanoseconds passed. Host: nanoseconds to subtract from the host's time (paused periods), modulo
    /// 2^64, since a restored machine can be older than this process.
    value: AtomicU64,
}

impl VirtualClock {
    /// The TSC frequency in counted mode: one tick an instruction.
    pub const COUNTED_TSC_KHZ: u32 = 1_000_000;

    /// The time of day, since the start of 1970 (UTC), at which every counted run starts: 2026-01-01.
    pub const COUNTED_EPOCH: Duration = Duration::from_secs(1_767_225_600);

    /// A clock that starts at zero. `tsc_khz` is the TSC's frequency (in counted mode always
    /// [`VirtualClock::COUNTED_TSC_KHZ`]).
    pub fn new(mode: ClockMode, tsc_khz: u32) -> Self {
        let tsc_khz = if mode == ClockMode::Counted { Self::COUNTED_TSC_KHZ } else { tsc_khz.max(1) };
        Self { mode, tsc_khz, origin: Instant::now(), value: AtomicU64::new(0) }
    }

    /// What makes this clock advance.
    pub fn mode(&self) -> ClockMode {
        self.mode
    }

    /// Now.
    pub fn now(&self) -> VirtualTime {
        let value = self.value.load(Ordering::Acquire);
        match self.mode {
            ClockMode::Counted => VirtualTime(value),
            ClockMode::Host => {
                let time = self.host().wrapping_sub(value);
                // The top half stands for times before the start.
                VirtualTime(if time > u64::MAX / 2 { 0 } else { time })
            }
        }
    }

    /// Nanoseconds of the host's clock since this one was made.
    fn host(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Makes it `time` now, in either mode: for a machine that is loaded from saved state, before it runs.
    pub fn set(&self, time: VirtualTime) {
        let value = match self.mode {
            ClockMode::Counted => time.0,
            ClockMode::Host => self.host().wrapping_sub(time.0),
        };
        self.value.store(value, Ordering::Release);
    }

    /// Sets the time in counted mode: called by the engine as instructions retire, and to skip an idle period.
    /// Time never goes back. No effect in host mode.
    pub fn advance_to(&self, time: VirtualTime) {
        if self.mode == ClockMode::Counted {
            self.value.fetch_max(time.0, Ordering::AcqRel);
        }
    }

    /// Leaves a period of `paused` out of the guest's time. No effect in counted mode.
    pub fn skip(&self, paused: Duration) {
        if self.mode == ClockMode::Host {
            let paused = u64::try_from(paused.as_nanos()).unwrap_or(u64::MAX);
            self.value.fetch_add(paused, Ordering::AcqRel);
        }
    }

    /// The TSC's frequency in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The time-stamp counter now, before any guest-written offset.
    pub fn tsc(&self) -> u64 {
        self.tsc_at(self.now())
    }

    /// The time-stamp counter at a time.
    pub fn tsc_at(&self, time: VirtualTime) -> u64 {
        if self.tsc_khz == 1_000_000 {
            // The usual frequency: one tick a nanosecond. Wide division takes longer than all the rest of RDTSC.
            return time.0;
        }
        (u128::from(time.0) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// The first time at which the counter has reached `tsc`.
    pub fn time_at_tsc(&self, tsc: u64) -> VirtualTime {
        let ns = (u128::from(tsc) * 1_000_000).div_ceil(u128::from(self.tsc_khz));
        VirtualTime(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_time_moves_only_when_told() {
        let clock = VirtualClock::new(ClockMode::Counted, 0);
        assert_eq!(clock.now(), VirtualTime(0));
        clock.advance_to(VirtualTime(1234));
        clock.advance_to(VirtualTime(1000));
        assert_eq!((clock.now(), clock.tsc()), (VirtualTime(1234), 1234));
    }

    #[test]
    fn tsc_and_time_convert_without_drift() {
        let clock = VirtualClock::new(ClockMode::Host, 2_596_143);
        for tsc in [1, 999, 2_596_143, 10_u64.pow(15) + 7] {
            let time = clock.time_at_tsc(tsc);
            assert!(clock.tsc_at(time) >= tsc);
            assert!(clock.tsc_at(VirtualTime(time.0 - 1)) < tsc);
        }
    }

    #[test]
    fn clock_goes_on_from_where_it_was_set() {
        for mode in [ClockMode::Host, ClockMode::Counted] {
            let clock = VirtualClock::new(mode, 1_000_000);
            clock.set(VirtualTime(3_600_000_000_000));
            let now = clock.now().0;
            assert!((3_600_000_000_000..3_700_000_000_000).contains(&now), "{mode:?}: {now}");
        }
    }

    #[test]
    fn skipped_period_is_left_out() {
        let clock = VirtualClock::new(ClockMode::Host, 1_000_000);
        std::thread::sleep(Duration::from_millis(20));
        clock.skip(Duration::from_millis(20));
        assert!(clock.now().0 < 20_000_000);
    }
}
