//! The watchdog: a timer that the guest has to start afresh again and again, to show that it is not stuck.
//!
//! The guest finds it by the ACPI table WDAT, which says how to work it, so that its registers are ours to choose. Source: Microsoft,
//! "Hardware Watchdog Timers Design Specification" 1.01, "Hardware Watchdog Timer Requirements" and "Watchdog Action Table". All are of
//! two bytes:
//!
//! | offset | register |
//! |---|---|
//! | 0 | what the timer is set to, in periods of 100 ms; counts from the next start |
//! | 2 | what is left of that; a write starts the timer afresh |
//! | 4 | bit 0: it runs |
//! | 6 | bit 0: it was neglected; survives a reset, and is cleared by writing 0 |
//!
//! Time is the guest's: a machine that is paused is not neglecting anything, and in counted mode it expires at the same instruction in
//! every run.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};

use ringfence_engine::{
    BusDevice, Placement, SavedState, StateError, Stateful, Timer, TimerQueue, VirtualClock, VirtualTime,
};
use serde::{Deserialize, Serialize};

use crate::device::{lock, ports};
use crate::platform::WATCHDOG_PORT;

const NAME: &str = "watchdog";
const VERSION: u32 = 1;
const PORT_COUNT: u16 = 8;

/// Milliseconds that the timer counts by.
pub const PERIOD_MS: u32 = 100;
const PERIOD_NS: u64 = PERIOD_MS as u64 * 1_000_000;
/// What the timer is set to before the guest sets it: a minute.
const FIRST_PRESET: u16 = 600;

/// Offset of what the timer is set to.
pub const PRESET: u64 = 0;
/// Offset of what is left.
pub const LEFT: u64 = 2;
/// Offset of control.
pub const CONTROL: u64 = 4;
/// Offset of status.
pub const STATUS: u64 = 6;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    preset: u16,
    /// When it expires, in nanoseconds of guest time, if it runs.
    deadline: Option<u64>,
    /// It was neglected.
    neglected: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { preset: FIRST_PRESET, deadline: None, neglected: false }
    }
}

/// The watchdog.
pub struct Watchdog {
    clock: Arc<VirtualClock>,
    timer: Timer,
    expired: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watchdog({:?})", lock(&self.state))
    }
}

impl Watchdog {
    /// A watchdog that does not run yet. `expired` is called on a vCPU's thread each time that it has been neglected.
    pub fn new(
        clock: Arc<VirtualClock>,
        timers: &Arc<TimerQueue>,
        expired: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = Weak::clone(weak);
            let timer = timers.add_vital(move |now| {
                if let Some(watchdog) = weak.upgrade() {
                    watchdog.due(now);
                }
            });
            Self { clock, timer, expired: Box::new(expired), state: Mutex::default() }
        })
    }

    fn due(&self, now: VirtualTime) {
        let mut state = lock(&self.state);
        // It may have been started afresh just now.
        if state.deadline.is_none_or(|deadline| deadline > now.0) {
            return;
        }
        state.deadline = None;
        state.neglected = true;
        drop(state);
        (self.expired)();
    }

    fn start(&self, state: &mut State) {
        let deadline = self.clock.now().0.saturating_add(u64::from(state.preset.max(1)) * PERIOD_NS);
        state.deadline = Some(deadline);
        self.arm(state);
    }

    fn arm(&self, state: &State) {
        match state.deadline {
            Some(deadline) => self.timer.arm(VirtualTime(deadline)),
            None => self.timer.cancel(),
        }
    }

    fn register(&self, register: u64) -> u16 {
        let state = lock(&self.state);
        let left = state.deadline.map(|deadline| deadline.saturating_sub(self.clock.now().0));
        match register {
            PRESET => state.preset,
            LEFT => left.map_or(state.preset, |left| left.div_ceil(PERIOD_NS) as u16),
            CONTROL => left.is_some().into(),
            STATUS => state.neglected.into(),
            _ => 0,
        }
    }

    fn set(&self, register: u64, value: u16) {
        let mut state = lock(&self.state);
        match register {
            PRESET => state.preset = value,
            LEFT if state.deadline.is_some() => self.start(&mut state),
            CONTROL if value & 1 == 0 => {
                state.deadline = None;
                self.arm(&state);
            }
            CONTROL if state.deadline.is_none() => self.start(&mut state),
            STATUS => state.neglected &= value & 1 != 0,
            _ => {}
        }
    }
}

impl BusDevice for Watchdog {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.register(at & !1).to_le_bytes()[usize::from(at & 1 != 0)];
        }
    }

    /// Registers are written as a whole; other accesses mean nothing.
    fn write(&self, offset: u64, data: &[u8]) {
        if let ([low, high], 0) = (data, offset & 1) {
            self.set(offset, u16::from_le_bytes([*low, *high]));
        }
    }
}

impl crate::Device for Watchdog {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, WATCHDOG_PORT, PORT_COUNT, self)]
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State { neglected: state.neglected, ..State::default() };
        self.arm(&state);
    }
}

impl Stateful for Watchdog {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &*lock(&self.state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let new: State = saved.unpack(NAME, VERSION)?;
        let mut state = lock(&self.state);
        *state = new;
        self.arm(&state);
        Ok(())
    }
}
