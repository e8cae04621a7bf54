//! System control port A: the fast A20 gate and the fast reset.
//!
//! Source: ICH9 data sheet 13.7.3 (PORT92). The A20 gate itself is the keyboard controller's to save
//! ([`crate::i8042`]); whoever wrote last has opened or closed it.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use ringfence_engine::{BusDevice, Placement, SavedState, StateError, Stateful};
use ringfence_memory::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::device::{ports, read_bytes, write_bytes};
use crate::platform::SYSTEM_CONTROL_A_PORT;
use crate::{PowerControl, PowerEvent};

const NAME: &str = "port92";
const VERSION: u32 = 1;
const RESET: u8 = 1;
const A20: u8 = 2;

#[derive(Serialize, Deserialize)]
struct State {}

/// The port.
pub struct Port92 {
    memory: Arc<GuestMemory>,
    power: Arc<dyn PowerControl>,
}

impl std::fmt::Debug for Port92 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Port92")
    }
}

impl Port92 {
    /// The port, with the A20 gate of `memory`.
    pub fn new(memory: Arc<GuestMemory>, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { memory, power })
    }
}

impl BusDevice for Port92 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |_| if self.memory.a20_mask() == !0 { A20 } else { 0 });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |_, value| {
            self.memory.set_a20(value & A20 != 0);
            if value & RESET != 0 {
                self.power.request(PowerEvent::Reset);
            }
        });
    }
}

impl crate::Device for Port92 {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, SYSTEM_CONTROL_A_PORT, 1, self)]
    }

    fn reset(&self) {}
}

impl Stateful for Port92 {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &State {})
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        saved.unpack::<State>(NAME, VERSION).map(|_| ())
    }
}
