//! The real-time clock and its CMOS memory.
//!
//! Sources: Motorola MC146818A data sheet ("Time, Calendar, and Alarm Locations", "Interrupts", "Registers"),
//! and the layout of CMOS memory in the IBM PC/AT Technical Reference.
//!
//! The time of day follows the machine's clock from a wall-clock time given at the start; nothing looks at the
//! host's clock afterwards, so a run in counted mode repeats. Flags of events that nobody is to be interrupted
//! for are worked out when they are looked at; a timer runs only towards the next enabled interrupt.

mod calendar;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringfence_engine::{
    BusDevice, IrqLine, Placement, SavedState, StateError, Stateful, Timer, TimerQueue, VirtualClock,
};

use crate::device::{Wire, lock, ports, read_bytes, write_bytes};
use crate::platform::RTC_PORT;
use state::State;

const NAME: &str = "rtc";
const VERSION: u32 = 1;

/// Bytes of CMOS memory, registers included.
const MEMORY: usize = 128;

/// Indices of registers and of CMOS bytes with a meaning.
mod index {
    pub(super) const SECOND: u8 = 0x00;
    pub(super) const SECOND_ALARM: u8 = 0x01;
    pub(super) const MINUTE: u8 = 0x02;
    pub(super) const MINUTE_ALARM: u8 = 0x03;
    pub(super) const HOUR: u8 = 0x04;
    pub(super) const HOUR_ALARM: u8 = 0x05;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const EQUIPMENT: u8 = 0x14;
    pub(super) const BASE_MEMORY: u8 = 0x15;
    pub(super) const EXTENDED_MEMORY: u8 = 0x17;
    pub(super) const CHECKSUM: u8 = 0x2e;
    pub(super) const EXTENDED_MEMORY_AGAIN: u8 = 0x30;
    pub(super) const CENTURY: u8 = crate::platform::RTC_CENTURY;
    pub(super) const MEMORY_ABOVE_16M: u8 = 0x34;
    pub(super) const MEMORY_ABOVE_4G: u8 = 0x5b;
}

/// How a clock starts.
#[derive(Clone, Copy, Debug)]
pub struct RtcConfig {
    /// Time since the start of 1970 (UTC) when the clock is made. See [`host_wall_clock`]; a constant for runs
    /// that repeat.
    pub wall_clock: Duration,
    /// Bytes of RAM below 4 GiB, for the CMOS bytes that tell firmware.
    pub memory_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub memory_above_4g: u64,
}

/// The host's wall-clock time since the start of 1970; zero if the host thinks it is earlier.
pub fn host_wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The clock.
pub struct Rtc {
    clock: Arc<VirtualClock>,
    irq: Wire,
    timer: Timer,
    state: Mutex<State>,
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rtc").field(&*lock(&self.state)).finish()
    }
}

impl Rtc {
    /// A running clock with all interrupts off.
    pub fn new(
        clock: Arc<VirtualClock>,
        timers: &Arc<TimerQueue>,
        irq: IrqLine,
        config: RtcConfig,
    ) -> Arc<Self> {
        let state = State::new(&config, clock.now());
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = Weak::clone(weak);
            let timer = timers.add(move |_| {
                if let Some(rtc) = weak.upgrade() {
                    rtc.with_state(|_| ());
                }
            });
            Self { clock, irq: Wire::new(irq), timer, state: Mutex::new(state) }
        })
    }

    /// Sets a byte of CMOS memory, as firmware would have. Registers (below 0x0e), the century and bytes past
    /// the end are not memory: no effect.
    pub fn set_memory(&self, index: u8, value: u8) {
        self.with_state(|state| state.set_memory(index, value));
    }

    /// Brings the flags up to date, calls `f`, and then drives the interrupt and arms the timer by what the
    /// registers say.
    fn with_state<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.state);
        let now = self.clock.now();
        state.catch_up(now);
        let result = f(&mut state);
        self.irq.set(state.interrupts());
        match state.next_interrupt() {
            Some(time) => self.timer.arm(time),
            None => self.timer.cancel(),
        }
        result
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The index port is write-only.
        read_bytes(offset, data, |offset| match offset {
            1 => self.with_state(State::read),
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            self.with_state(|state| match offset {
                // Bit 7 would mask NMIs; no device raises one.
                0 => state.index = value & 0x7f,
                1 => state.write(value),
                _ => (),
            });
        });
    }
}

impl crate::Device for Rtc {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, RTC_PORT, 2, self)]
    }

    fn reset(&self) {
        self.with_state(State::reset);
    }
}

impl Stateful for Rtc {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        self.with_state(|state| SavedState::pack(NAME, VERSION, state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let new: State = saved.unpack(NAME, VERSION)?;
        new.check()?;
        let mut state = lock(&self.state);
        *state = new;
        self.irq.drive(state.interrupts());
        drop(state);
        self.with_state(|_| ());
        Ok(())
    }
}
