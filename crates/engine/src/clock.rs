//! The guest's time.
//!
//! On hosts whose time-stamp counter is fit for it ([`counter`]) the host's monotonic clock is followed by a straight line through
//! that counter ([`line`](mod@line)), which can be read without the host's kernel, and by translated code too. [`steer`] keeps the line close
//! to the clock.

mod counter;
mod line;
mod steer;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use line::HostLine;
use line::Line;
use steer::{FRESH, Sample, Steering};

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

/// The frequency at which the TSC counts nanoseconds.
const NANOSECONDS_KHZ: u32 = 1_000_000;

/// Nanoseconds of the host's clock since `origin`.
fn nanoseconds_since(origin: Instant) -> u64 {
    u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The machine's clock: virtual time and the time-stamp counter, which advance together.
///
/// The TSC is derived from virtual time, so both agree for ever whatever the host's TSC is; its frequency is
/// chosen when the clock is made.
#[derive(Debug)]
pub struct VirtualClock {
    mode: ClockMode,
    tsc_khz: u32,
    origin: Instant,
    /// Counted: nanoseconds passed. Host: nanoseconds to subtract from the host's time (paused periods), modulo
    /// 2^64, since a restored machine can be older than this process.
    value: AtomicU64,
    /// Time as the host's counter tells it, once it does.
    line: HostLine,
    /// What changes the line; `None` where the host's counter is not used.
    steering: Option<Mutex<Steering>>,
}

impl VirtualClock {
    /// The TSC frequency in counted mode: one tick an instruction.
    pub const COUNTED_TSC_KHZ: u32 = 1_000_000;

    /// The time of day, since the start of 1970 (UTC), at which every counted run starts: 2026-01-01.
    pub const COUNTED_EPOCH: Duration = Duration::from_secs(1_767_225_600);

    /// A clock that starts at zero. `tsc_khz` is the TSC's frequency (in counted mode always
    /// [`VirtualClock::COUNTED_TSC_KHZ`]).
    pub fn new(mode: ClockMode, tsc_khz: u32) -> Self {
        Self::with_counter(mode, tsc_khz, mode == ClockMode::Host && counter::is_fit())
    }

    /// Likewise; `counter` says whether it may follow the host's time-stamp counter.
    fn with_counter(mode: ClockMode, tsc_khz: u32, counter: bool) -> Self {
        let tsc_khz = if mode == ClockMode::Counted { Self::COUNTED_TSC_KHZ } else { tsc_khz.max(1) };
        let origin = Instant::now();
        // Who reads the line takes its nanoseconds for ticks.
        let steering =
            (counter && tsc_khz == NANOSECONDS_KHZ).then(|| Mutex::new(Steering::new(Sample::take(origin))));
        let (value, line) = (AtomicU64::new(0), HostLine::default());
        Self { mode, tsc_khz, origin, value, line, steering }
    }

    /// What makes this clock advance.
    pub fn mode(&self) -> ClockMode {
        self.mode
    }

    /// The line by which the host's time-stamp counter tells this clock's time. There is none in counted mode, on hosts
    /// where it does not, and in a clock's first milliseconds.
    pub fn line(&self) -> &HostLine {
        &self.line
    }

    /// Now.
    pub fn now(&self) -> VirtualTime {
        match self.mode {
            ClockMode::Counted => VirtualTime(self.value.load(Ordering::Acquire)),
            ClockMode::Host => self.host_now(),
        }
    }

    fn host_now(&self) -> VirtualTime {
        let Some(steering) = &self.steering else { return self.at_host(nanoseconds_since(self.origin)) };
        let Some((time, age)) = self.line.at(counter::read()) else { return self.now_without_line() };
        // One thread steers; the others go on with the line that there is.
        if age > FRESH
            && let Ok(mut steering) = steering.try_lock()
        {
            self.steer(&mut steering);
        }
        VirtualTime(time)
    }

    /// Now, where there is no line yet, it changes, or it has been left alone for too long.
    #[cold]
    fn now_without_line(&self) -> VirtualTime {
        let steering = self.lock_steering();
        // Somebody else may have been here meanwhile.
        let time = || self.line.at(counter::read()).map(|(time, _)| time);
        if let Some(time) = time() {
            return VirtualTime(time);
        }
        if let Some(mut steering) = steering {
            self.steer(&mut steering);
        }
        time().map_or_else(|| self.at_host(nanoseconds_since(self.origin)), VirtualTime)
    }

    fn lock_steering(&self) -> Option<MutexGuard<'_, Steering>> {
        Some(self.steering.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has the line go where the host's clock is, or makes it.
    fn steer(&self, steering: &mut Steering) {
        let sample = Sample::take(self.origin);
        if let Some(course) = steering.course(sample, self.at_host(sample.host).0) {
            self.line.change(|old| course.from(old, counter::read()));
        }
    }

    /// The time where the host's clock shows so many nanoseconds since this one was made.
    fn at_host(&self, host: u64) -> VirtualTime {
        let time = host.wrapping_sub(self.value.load(Ordering::Acquire));
        // The top half stands for times before the start.
        VirtualTime(if time > u64::MAX / 2 { 0 } else { time })
    }

    /// Makes it `time` now, in either mode: for a machine that is loaded from saved state, before it runs.
    pub fn set(&self, time: VirtualTime) {
        if self.mode == ClockMode::Counted {
            return self.value.store(time.0, Ordering::Release);
        }
        let _steering = self.lock_steering();
        self.value.store(nanoseconds_since(self.origin).wrapping_sub(time.0), Ordering::Release);
        self.line.change_existing(|old| Line { start: counter::read(), time: time.0, ..old });
    }

    /// Sets the time in counted mode: called by the engine as instructions retire, and to skip an idle period.
    /// Time never goes back. No effect in host mode.
    pub fn advance_to(&self, time: VirtualTime) {
        if self.mode == ClockMode::Counted {
            self.value.fetch_max(time.0, Ordering::AcqRel);
        }
    }

    /// Leaves a period of `paused` out of the guest's time: for a machine that stands still. No effect in counted mode.
    pub fn skip(&self, paused: Duration) {
        if self.mode == ClockMode::Counted {
            return;
        }
        let paused = u64::try_from(paused.as_nanos()).unwrap_or(u64::MAX);
        let mut steering = self.lock_steering();
        if let Some(steering) = &mut steering {
            // Nobody may have asked for the time during that period.
            self.steer(steering);
        }
        self.value.fetch_add(paused, Ordering::AcqRel);
        self.line.change_existing(|old| {
            let start = counter::read();
            Line { start, time: old.latest(start).saturating_sub(paused), ..old }
        });
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
        if self.tsc_khz == NANOSECONDS_KHZ {
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
