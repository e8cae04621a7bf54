//! How the line is kept close to the host's clock.
//!
//! Every tenth of a second or so the two are compared, and the line goes on from where it is, at the rate that was found since the
//! time before and a little more or less, so that it meets the clock by the next time. It is never put back. What takes it away from the clock
//! meanwhile is how much the rate changes (Linux corrects its own by up to 500 ppm) and some ten nanoseconds of each comparison.

use std::time::Instant;

use super::counter;
use super::line::Line;

/// Ticks for which nobody looks whether the line is right.
pub(super) const FRESH: u64 = 1 << 27;
/// Ticks from one comparison to the next, at least: a few milliseconds.
const LEAST: u64 = 1 << 23;
/// A line that is so many nanoseconds late is put forward at once: this thread, or the machine, has not run for long.
const LATE: u64 = 1_000_000;
/// The rate is changed by at most one part of so many. In the time that a processor may take to execute two instructions in another order
/// than the program's, two lines then differ by less than a nanosecond.
pub(super) const BEND: u64 = 256;
/// Ticks between two reads of the counter within which the clock can be taken to have been read at once.
const NARROW: u64 = 1 << 10;

/// The counter, and the host's clock at that moment or a little later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) counter: u64,
    /// Nanoseconds since the clock was made.
    pub(super) host: u64,
}

impl Sample {
    /// Reads both. Where something came between, it is tried again.
    pub(super) fn take(origin: Instant) -> Self {
        let mut best = (u64::MAX, Self { counter: 0, host: 0 });
        for _ in 0..8 {
            let counter = counter::read();
            let host = super::nanoseconds_since(origin);
            let width = counter::read().wrapping_sub(counter);
            if width < best.0 {
                best = (width, Self { counter, host });
            }
            if width < NARROW {
                break;
            }
        }
        best.1
    }
}

/// What is known from before.
#[derive(Debug)]
pub(super) struct Steering {
    last: Sample,
}

impl Steering {
    pub(super) fn new(first: Sample) -> Self {
        Self { last: first }
    }

    /// Compares: where the line has to go from here. `None` if it is too soon to tell. `aim` is the virtual time at the sample.
    pub(super) fn course(&mut self, sample: Sample, aim: u64) -> Option<Course> {
        let Some(ticks) = sample.counter.checked_sub(self.last.counter) else {
            // The counter has been set back: the host has slept, or is another one now.
            self.last = sample;
            return None;
        };
        if ticks < LEAST {
            return None;
        }
        let elapsed = u128::from(sample.host.saturating_sub(self.last.host));
        let rate = u64::try_from((elapsed << 32) / u128::from(ticks)).unwrap_or(u64::MAX);
        self.last = sample;
        Some(Course { aim: Line { start: sample.counter, time: aim, rate } })
    }
}

/// Where the line should be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course {
    aim: Line,
}

impl Course {
    /// The line that goes on from an old one, if there is one, when the counter is at `counter`.
    pub(super) fn from(&self, old: Option<Line>, counter: u64) -> Line {
        let rate = self.aim.rate;
        let target = self.aim.latest(counter);
        let here = match old.map(|old| old.latest(counter)) {
            Some(here) if target.saturating_sub(here) <= LATE => here,
            _ => return Line { start: counter, time: target, rate },
        };
        let most = i128::from(rate / BEND);
        let error = i128::from(target) - i128::from(here);
        let bend = ((error << 32) / i128::from(FRESH)).clamp(-most, most);
        // Between 0 and twice the rate.
        let rate = u64::try_from(i128::from(rate) + bend).unwrap_or(rate);
        Line { start: counter, time: here, rate }
    }
}
