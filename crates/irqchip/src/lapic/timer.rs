//! The timer of a local APIC (SDM 3A 10.5.4).
//!
//! Nothing counts: the timer knows when it will expire, and the current count follows from the time.

use ringfence_engine::{VirtualClock, VirtualTime};

/// One count before division takes a nanosecond: the timer's input clock runs at 1 GHz, as KVM's does.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// Bits 18:17 of the timer's LVT entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TimerMode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: stands still.
    Reserved,
}

impl TimerMode {
    pub(crate) fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The timer's registers and when it expires.
#[derive(Clone, Debug)]
pub(crate) struct ApicTimer {
    pub(super) mode: TimerMode,
    pub(super) initial: u32,
    /// Divide configuration register: bits 3, 1, 0.
    pub(super) divide: u32,
    /// [`VirtualTime::NEVER`] while it stands still.
    pub(super) deadline: VirtualTime,
    /// Value of IA32_TSC_DEADLINE; 0 is disarmed.
    pub(super) tsc_deadline: u64,
    /// What the guest's TSC is ahead of the clock's.
    pub(super) tsc_offset: i64,
}

impl Default for ApicTimer {
    fn default() -> Self {
        Self {
            mode: TimerMode::OneShot,
            initial: 0,
            divide: 0,
            deadline: VirtualTime::NEVER,
            tsc_deadline: 0,
            tsc_offset: 0,
        }
    }
}

/// SDM 3A figure 10-10: bits 3, 1, 0 as a number 0 to 7 are 2, 4, 8, 16, 32, 64, 128, 1.
pub(super) fn divisor(divide: u32) -> u64 {
    let code = (divide & 3) | (divide >> 1 & 4);
    1 << ((code + 1) & 7)
}

impl ApicTimer {
    /// Nanoseconds from loading the initial count to zero.
    fn period(&self) -> u64 {
        u64::from(self.initial) * divisor(self.divide)
    }

    fn stop(&mut self) {
        self.deadline = VirtualTime::NEVER;
        self.tsc_deadline = 0;
    }

    /// The LVT entry's mode is written. Changing to or from TSC-deadline mode disarms (SDM 3A 10.5.4.1).
    pub(super) fn set_mode(&mut self, mode: TimerMode) {
        if mode != self.mode && !(mode.counts() && self.mode.counts()) {
            self.initial = 0;
            self.stop();
        }
        self.mode = mode;
    }

    /// Loads the initial count and starts; 0 stops. Ignored in TSC-deadline mode.
    pub(super) fn write_initial(&mut self, now: VirtualTime, value: u32) {
        if !self.mode.counts() {
            return;
        }
        self.initial = value;
        self.deadline = if value == 0 { VirtualTime::NEVER } else { now.after(self.period()) };
    }

    /// Nanoseconds to the end of the present period, at most a period.
    fn remaining(&self, now: VirtualTime) -> u64 {
        if self.deadline == VirtualTime::NEVER {
            0
        } else if now < self.deadline {
            self.deadline.since(now)
        } else if self.mode == TimerMode::Periodic && self.period() != 0 {
            self.period() - now.since(self.deadline) % self.period()
        } else {
            0
        }
    }

    /// The current count.
    pub(super) fn current(&self, now: VirtualTime) -> u32 {
        if !self.mode.counts() {
            return 0;
        }
        u32::try_from(self.remaining(now).div_ceil(divisor(self.divide))).unwrap_or(u32::MAX)
    }

    /// A running count goes on at the new rate.
    pub(super) fn write_divide(&mut self, now: VirtualTime, value: u32) {
        let value = value & 0xb;
        if value == self.divide {
            return;
        }
        let count = u64::from(self.current(now));
        let running = self.mode.counts() && self.deadline != VirtualTime::NEVER && self.deadline > now;
        self.divide = value;
        if running {
            self.deadline = now.after(count * divisor(value));
        }
    }

    /// Writes IA32_TSC_DEADLINE; ignored in other modes.
    pub(super) fn write_tsc_deadline(&mut self, clock: &VirtualClock, value: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = value;
            self.arm_tsc(clock);
        }
    }

    /// The guest's TSC is now `offset` ahead of the clock's.
    pub(super) fn set_tsc_offset(&mut self, clock: &VirtualClock, offset: i64) {
        self.tsc_offset = offset;
        if self.mode == TimerMode::TscDeadline {
            self.arm_tsc(clock);
        }
    }

    pub(super) fn arm_tsc(&mut self, clock: &VirtualClock) {
        let target = i128::from(self.tsc_deadline) - i128::from(self.tsc_offset);
        self.deadline = match u64::try_from(target) {
            _ if self.tsc_deadline == 0 => VirtualTime::NEVER,
            Ok(target) => clock.time_at_tsc(target),
            Err(_) if target < 0 => VirtualTime(0),
            Err(_) => VirtualTime::NEVER,
        };
    }

    /// Whether the timer has expired by `now`; if so, it is ready for the next time. Periods that were missed
    /// are one expiry.
    pub(super) fn run(&mut self, now: VirtualTime) -> bool {
        if now < self.deadline || self.deadline == VirtualTime::NEVER {
            return false;
        }
        match self.mode {
            TimerMode::Periodic if self.period() != 0 => {
                self.deadline = now.after(self.remaining(now));
            }
            _ => self.stop(),
        }
        true
    }
}
