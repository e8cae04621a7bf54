//! A port that ends the run with a status of the guest's choosing, as QEMU's `isa-debug-exit` does.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use ringfence_engine::{BusDevice, Placement, SavedState, StateError, Stateful};
use serde::{Deserialize, Serialize};

use crate::device::ports;
use crate::{PowerControl, PowerEvent};

const NAME: &str = "debug-exit";
const VERSION: u32 = 1;
const PORT_COUNT: u16 = 4;

#[derive(Serialize, Deserialize)]
struct State {}

/// The port. A write of 1, 2 or 4 bytes asks for [`PowerEvent::DebugExit`]; reads give zero.
pub struct DebugExit {
    port: u16,
    power: Arc<dyn PowerControl>,
}

impl std::fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DebugExit({:#x})", self.port)
    }
}

impl DebugExit {
    /// A device at `port` and the three ports after it. Whether that is free, the bus says.
    pub fn new(port: u16, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { port, power })
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        let value = data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        self.power.request(PowerEvent::DebugExit(value));
    }
}

impl crate::Device for DebugExit {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, self.port, PORT_COUNT, self)]
    }

    fn reset(&self) {}
}

impl Stateful for DebugExit {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &State {})
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        saved.unpack::<State>(NAME, VERSION).map(|_| ())
    }
}
