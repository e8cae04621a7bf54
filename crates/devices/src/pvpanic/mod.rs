//! pvpanic: how a guest says that its kernel has panicked.
//!
//! Source: QEMU's specification "PVPANIC DEVICE" (the ISA form). A guest finds it by the ACPI device `QEMU0001`.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use ringfence_engine::{BusDevice, Placement, SavedState, StateError, Stateful};
use serde::{Deserialize, Serialize};

use crate::device::ports;
use crate::platform::PVPANIC_PORT;
use crate::{PowerControl, PowerEvent};

const NAME: &str = "pvpanic";
const VERSION: u32 = 1;

/// The kernel has panicked. The only event offered: reading the port tells which are.
const PANICKED: u8 = 1;

#[derive(Serialize, Deserialize)]
struct State {}

/// The port.
pub struct PvPanic {
    power: Arc<dyn PowerControl>,
}

impl std::fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PvPanic")
    }
}

impl PvPanic {
    /// The port, which passes on panics to `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { power })
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.power.request(PowerEvent::GuestPanic);
        }
    }
}

impl crate::Device for PvPanic {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, PVPANIC_PORT, 1, self)]
    }

    fn reset(&self) {}
}

impl Stateful for PvPanic {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &State {})
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        saved.unpack::<State>(NAME, VERSION).map(|_| ())
    }
}
