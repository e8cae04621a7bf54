//! Counted time: the clock follows the count of retired instructions.

use ringfence_engine::{ClockMode, VirtualTime};

use super::cpu::Cpu;

impl Cpu {
    /// Brings the clock up to the instructions retired so far. To be called before anything looks at the time or may:
    /// devices, timers, the time-stamp counter.
    #[inline]
    pub fn sync_clock(&self) {
        if self.clock.mode() == ClockMode::Counted {
            self.clock.advance_to(VirtualTime(self.retired + self.idle));
        }
    }

    /// Skips the idle time up to `deadline`. Only for counted time.
    pub fn skip_to(&mut self, deadline: VirtualTime) {
        self.idle += deadline.since(VirtualTime(self.retired + self.idle));
        self.sync_clock();
    }
}
