//! Virtual time as a straight line through the host's time-stamp counter.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A line: where it starts, and how steep it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// The counter at its start.
    pub(super) start: u64,
    /// Virtual nanoseconds at its start.
    pub(super) time: u64,
    /// Nanoseconds for each tick, with 32 fractional bits.
    pub(super) rate: u64,
}

impl Line {
    fn after(&self, ticks: u64) -> u64 {
        self.time.wrapping_add(((u128::from(ticks) * u128::from(self.rate)) >> 32) as u64)
    }

    /// The time on the line where the counter is at `counter`, and how many ticks that is behind the start. `None` before the
    /// start, and beyond [`HostLine::REACH`].
    pub(super) fn at(&self, counter: u64) -> Option<(u64, u64)> {
        let age = counter.wrapping_sub(self.start);
        (age <= HostLine::REACH).then(|| (self.after(age), age))
    }

    /// The latest time that anybody who has read the counter up to `counter` can have got from the line.
    pub(super) fn latest(&self, counter: u64) -> u64 {
        self.after(counter.saturating_sub(self.start).min(HostLine::REACH))
    }
}

/// A line that threads share: virtual time, which is also the TSC before any guest-written offset, as a function of the host's
/// time-stamp counter.
///
/// Whoever wants the time reads [`HostLine::VERSION`], then the counter and the other fields, then the version again. If that is
/// still the same and even, and the counter is up to [`HostLine::REACH`] ticks behind [`HostLine::START`] (and not before it), the time is
/// [`HostLine::TIME`] and as many nanoseconds more as ticks times [`HostLine::RATE`] is, which has 32 fractional bits. Otherwise the clock must
/// be asked. All that get a time so, on any processor, see it go forward only: a line starts where the one before was left, or later.
#[derive(Debug)]
#[repr(C)]
pub struct HostLine {
    /// Odd while the rest changes, and where there is no line.
    version: AtomicU64,
    start: AtomicU64,
    time: AtomicU64,
    rate: AtomicU64,
}

impl HostLine {
    /// Where the version is, in bytes, as are the others.
    pub const VERSION: usize = offset_of!(Self, version);
    /// Where the counter is that the line starts at.
    pub const START: usize = offset_of!(Self, start);
    /// Where the time is that the line starts at.
    pub const TIME: usize = offset_of!(Self, time);
    /// Where the nanoseconds for each tick are.
    pub const RATE: usize = offset_of!(Self, rate);
    /// Ticks for which a line holds: about a second.
    pub const REACH: u64 = i32::MAX as u64;

    /// Whether there is a line, which may be changing at the moment otherwise.
    pub fn exists(&self) -> bool {
        self.version.load(Ordering::Relaxed) & 1 == 0
    }

    /// The line, if there is one and it does not change at the moment.
    fn read(&self) -> Option<Line> {
        let version = self.version.load(Ordering::Acquire);
        let line = self.fields();
        fence(Ordering::Acquire);
        (version & 1 == 0 && self.version.load(Ordering::Relaxed) == version).then_some(line)
    }

    pub(super) fn fields(&self) -> Line {
        let [start, time, rate] = [&self.start, &self.time, &self.rate].map(|f| f.load(Ordering::Relaxed));
        Line { start, time, rate }
    }

    /// See [`Line::at`].
    #[inline]
    pub(super) fn at(&self, counter: u64) -> Option<(u64, u64)> {
        self.read()?.at(counter)
    }

    /// Replaces the line by what `change` makes of the one that there is. No other thread is here, and nobody gets the time
    /// from the line while `change` runs, so that the counter as it is then is ahead of all that have.
    pub(super) fn change(&self, change: impl FnOnce(Option<Line>) -> Line) {
        let version = self.version.load(Ordering::Relaxed);
        let old = (version & 1 == 0).then(|| self.fields());
        let busy = version | 1;
        self.version.store(busy, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let Line { start, time, rate } = change(old);
        self.start.store(start, Ordering::Relaxed);
        self.time.store(time, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
        self.version.store(busy.wrapping_add(1), Ordering::Release);
    }

    /// Likewise, if there is one.
    pub(super) fn change_existing(&self, change: impl FnOnce(Line) -> Line) {
        if self.exists() {
            self.change(|old| change(old.unwrap_or(Line { start: 0, time: 0, rate: 0 })));
        }
    }
}

impl Default for HostLine {
    /// No line.
    fn default() -> Self {
        Self {
            version: AtomicU64::new(1),
            start: AtomicU64::new(0),
            time: AtomicU64::new(0),
            rate: AtomicU64::new(0),
        }
    }
}
