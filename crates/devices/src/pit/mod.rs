//! The 8254 programmable interval timer and system control port B.
//!
//! Sources: Intel 82C54 data sheet (231244), "Programming the 82C54" and "Mode Definitions"; for port 0x61 the
//! ICH9 data sheet 13.7.1 (NMI_SC).
//!
//! Nothing here counts: a channel's count and output follow from the number of clock ticks since it was loaded,
//! and a timer is armed for the next rising edge of channel 0's output only. Edges that came and went while the
//! host was busy merge into one, as they do on an edge-triggered input whose interrupt is still waiting; the edges
//! that follow keep to their original times.

mod channel;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};

use ringfence_engine::{
    BusDevice, IrqLine, Placement, SavedState, StateError, Stateful, Timer, TimerQueue, VirtualClock,
    VirtualTime,
};
use serde::{Deserialize, Serialize};

use crate::device::{invalid, lock, more_ports, ports, read_bytes, write_bytes};
use crate::platform::{PIT_PORT, SYSTEM_CONTROL_B_PORT};
use crate::rate::Rate;
use channel::Channel;

const NAME: &str = "pit";
const VERSION: u32 = 1;

/// Input clock of all channels: a third of the NTSC colour subcarrier's fourfold.
pub const PIT_HZ: u32 = 1_193_182;

const RATE: Rate = Rate(PIT_HZ);
const CONTROL: u64 = 3;
const PORT_B: u64 = (SYSTEM_CONTROL_B_PORT - PIT_PORT) as u64;
/// Half a period of the refresh request that bit 4 of port 0x61 shows, in ns.
const REFRESH_NS: u64 = 15_085;

#[derive(Clone, Serialize, Deserialize)]
struct State {
    channels: [Channel; 3],
    /// Bits 0 to 3 of port 0x61 as written.
    port_b: u8,
    /// Level last driven on the interrupt line.
    line: bool,
}

impl State {
    fn power_on() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            port_b: 0,
            line: false,
        }
    }
}

/// The timer. Channel 0 drives the interrupt line, channel 2 is gated and seen through port 0x61.
#[derive(Debug)]
pub struct Pit {
    clock: Arc<VirtualClock>,
    irq: IrqLine,
    edge: Timer,
    state: Mutex<State>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.channels).finish()
    }
}

impl Pit {
    /// A timer whose channels have not been programmed yet: no interrupt until they are.
    pub fn new(clock: Arc<VirtualClock>, timers: &Arc<TimerQueue>, irq: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = Weak::clone(weak);
            let edge = timers.add(move |now| {
                if let Some(pit) = weak.upgrade() {
                    pit.edge_due(now);
                }
            });
            Self { clock, irq, edge, state: Mutex::new(State::power_on()) }
        })
    }

    fn tick(time: VirtualTime) -> i64 {
        // 2^63 ticks are 245,000 years.
        RATE.ticks(time) as i64
    }

    fn edge_due(&self, now: VirtualTime) {
        let mut state = lock(&self.state);
        let tick = Self::tick(now);
        self.drive(&mut state, false);
        self.drive(&mut state, true);
        self.arm(&mut state, tick);
    }

    fn drive(&self, state: &mut State, level: bool) {
        if state.line != level {
            state.line = level;
            self.irq.set(level);
        }
    }

    /// Arms the timer for the first rising edge after `tick`.
    fn arm(&self, state: &mut State, tick: i64) {
        state.channels[0].settle(tick);
        match state.channels[0].next_rise(tick) {
            Some(rise) => self.edge.arm(RATE.time(rise.max(0) as u64)),
            None => self.edge.cancel(),
        }
    }

    /// Brings the interrupt line and the timer in step after channel 0 was written to.
    fn refresh(&self, state: &mut State, tick: i64) {
        let level = state.channels[0].output(tick);
        self.drive(state, level);
        self.arm(state, tick);
    }

    fn read_register(&self, offset: u64) -> u8 {
        let now = self.clock.now();
        let tick = Self::tick(now);
        let mut state = lock(&self.state);
        match offset {
            0..=2 => state.channels[offset as usize].read(tick),
            PORT_B => {
                let refresh = ((now.0 / REFRESH_NS) & 1) as u8;
                state.channels[2].settle(tick);
                let output = u8::from(state.channels[2].output(tick));
                state.port_b | refresh << 4 | output << 5
            }
            _ => 0xff,
        }
    }

    fn write_register(&self, offset: u64, value: u8) {
        let tick = Self::tick(self.clock.now());
        let mut state = lock(&self.state);
        match offset {
            0..=2 => {
                state.channels[offset as usize].write(tick, value);
                if offset == 0 {
                    self.refresh(&mut state, tick);
                }
            }
            CONTROL => match value >> 6 {
                3 => read_back(&mut state.channels, tick, value),
                channel if value & 0x30 == 0 => state.channels[usize::from(channel)].latch_count(tick),
                channel => {
                    state.channels[usize::from(channel)].program(value);
                    if channel == 0 {
                        self.refresh(&mut state, tick);
                    }
                }
            },
            PORT_B => {
                state.port_b = value & 0x0f;
                state.channels[2].set_gate(tick, value & 1 != 0);
            }
            _ => (),
        }
    }
}

/// The read-back command: bit 5 clear latches counts, bit 4 clear latches status, bits 1 to 3 select channels.
fn read_back(channels: &mut [Channel; 3], tick: i64, value: u8) {
    for (i, channel) in channels.iter_mut().enumerate() {
        if value & (2 << i) == 0 {
            continue;
        }
        if value & 0x20 == 0 {
            channel.latch_count(tick);
        }
        if value & 0x10 == 0 {
            channel.latch_status(tick);
        }
    }
}

impl BusDevice for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| self.read_register(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| self.write_register(offset, value));
    }
}

impl crate::Device for Pit {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![
            ports("pit", PIT_PORT, 4, Arc::clone(&self) as _),
            more_ports("port61", SYSTEM_CONTROL_B_PORT, 1, self, PIT_PORT),
        ]
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        self.drive(&mut state, false);
        *state = State::power_on();
        self.edge.cancel();
    }
}

impl Stateful for Pit {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        let mut state = lock(&self.state);
        let tick = Self::tick(self.clock.now());
        state.channels.iter_mut().for_each(|channel| channel.settle(tick));
        SavedState::pack(NAME, VERSION, &*state)
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let new: State = saved.unpack(NAME, VERSION)?;
        if new.port_b > 0x0f || !new.channels.iter().all(Channel::is_valid) {
            return Err(invalid(NAME, "a channel's mode, count or time is out of range"));
        }
        let mut state = lock(&self.state);
        *state = new;
        let tick = Self::tick(self.clock.now());
        state.channels.iter_mut().for_each(|channel| channel.settle(tick));
        self.irq.set(state.line);
        self.arm(&mut state, tick);
        Ok(())
    }
}
