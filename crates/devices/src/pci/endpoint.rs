//! What every function with registers in memory and interrupts has in common. A device owns an [`Endpoint`] and
//! passes its configuration accesses on.

use std::sync::{Arc, Mutex, OnceLock};

use ringfence_engine::{BusDevice, InterruptSink};
use serde::{Deserialize, Serialize};

use super::config::{ConfigSpace, Identity, command, register, status};
use super::decode::RegionId;
use super::msix::{self, Msix, MsixState};
use super::{PciError, Slot};
use crate::device::lock;

/// Identifiers of capabilities.
mod capability {
    pub(super) const POWER: u8 = 0x01;
    pub(super) const EXPRESS: u8 = 0x10;
    pub(super) const MSIX: u8 = 0x11;
}

/// The base address register of the MSI-X table. NVMe allows 0, 4 and 5 (NVMe 1.4, 2.4).
const MSIX_BAR: u8 = 4;
/// Type bits of a memory base address register: 64 bits wide.
const WIDE: u32 = 0b100;

/// Registers in memory that a function has, behind base address register 0.
#[derive(Clone)]
pub struct Registers {
    /// For diagnostics.
    pub name: &'static str,
    /// Bytes, a power of two from 4096 to 256 MiB.
    pub size: u64,
    /// Who answers.
    pub device: Arc<dyn BusDevice>,
}

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {:#x} bytes", self.name, self.size)
    }
}

#[derive(Debug)]
struct Bar {
    register: u16,
    size: u64,
    region: RegionId,
    /// Where it was put before any software ran.
    first: u64,
}

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    /// What the device signals on its pin.
    interrupt: bool,
}

/// A type 0 function with one range of registers, MSI-X and a pin, as an integrated PCI Express endpoint.
#[derive(Debug)]
pub struct Endpoint {
    state: Mutex<State>,
    msix: Arc<Msix>,
    /// Where the power-management and MSI-X capabilities are.
    power_at: u16,
    msix_at: u16,
    place: OnceLock<(Slot, Vec<Bar>)>,
}

/// What an endpoint saves; part of its device's section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointState {
    config: Vec<u32>,
    msix: MsixState,
    interrupt: bool,
}

impl Endpoint {
    /// An endpoint with `vectors` MSI-X vectors (1 to [`MAX_VECTORS`](msix::MAX_VECTORS)).
    pub fn new(identity: &Identity, vectors: u16, interrupts: &Arc<dyn InterruptSink>) -> Self {
        let msix = Arc::new(Msix::new(vectors, Arc::clone(interrupts)));
        let mut config = ConfigSpace::new(identity);
        config.set(register::INTERRUPT_PIN, &[1], &[]);
        // Power management 1.2, 3.2: version 3, no power states but D0 and D3, which keeps the registers.
        let power_at = config.add_capability(capability::POWER, &[3, 0, 8, 0, 0, 0], &[0, 0, 3]);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(MSIX_BAR).to_le_bytes());
        body[6..].copy_from_slice(&(msix::PENDING as u32 | u32::from(MSIX_BAR)).to_le_bytes());
        let enable = (msix::control::ENABLE | msix::control::FUNCTION_MASK).to_le_bytes();
        let msix_at = config.add_capability(capability::MSIX, &body, &enable);
        // PCI Express Base 4.0, 7.5.3: version 2, root complex integrated endpoint (no link), role-based error
        // reporting. Device control can be written and means nothing here.
        let mut body = [0; 58];
        body[..6].copy_from_slice(&[0x92, 0, 0, 0x80, 0, 0]);
        config.add_capability(capability::EXPRESS, &body, &[0, 0, 0, 0, 0, 0, 0xff, 0x7f]);
        let state = Mutex::new(State { config, interrupt: false });
        Self { state, msix, power_at, msix_at, place: OnceLock::new() }
    }

    /// Gives the endpoint its place: its registers get addresses, which are decoded once software says so.
    ///
    /// # Errors
    /// [`PciError`] if it has a place already or there is no room for its registers.
    pub fn plug(&self, slot: Slot, registers: &Registers) -> Result<(), PciError> {
        let mut state = lock(&self.state);
        let mut bars = Vec::new();
        let msix = Arc::clone(&self.msix) as Arc<dyn BusDevice>;
        let parts = [
            (0, registers.name, registers.size, Arc::clone(&registers.device)),
            (MSIX_BAR, "msix", msix::SIZE, msix),
        ];
        for (index, name, size, device) in parts {
            let first = slot.decoder.allocate(size)?;
            let region = slot.decoder.add(name, size, device);
            bars.push(Bar { register: register::BAR + u16::from(index) * 4, size, region, first });
        }
        for bar in &bars {
            let mask = !(bar.size - 1);
            state.config.set(bar.register, &u64::from(WIDE).to_le_bytes(), &mask.to_le_bytes());
            state.config.write(bar.register, &bar.first.to_le_bytes());
        }
        state.config.write(register::INTERRUPT_LINE, &[slot.pin.gsi() as u8]);
        self.place.set((slot, bars)).map_err(|(slot, _)| PciError::Taken(slot.address))
    }

    /// What [`PciFunction::config_read`](super::PciFunction::config_read) gives.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = lock(&self.state);
        state.config.read(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            if at == register::STATUS && state.interrupt {
                *byte |= status::INTERRUPT;
            }
        }
    }

    /// Takes over what [`PciFunction::config_write`](super::PciFunction::config_write) brings. Returns whether
    /// the function has just become bus master and can go on with what it could not do before.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut state = lock(&self.state);
        let before = state.bus_master();
        state.config.write(offset, data);
        self.apply(&state);
        !before && state.bus_master()
    }

    /// Whether the function may access memory.
    pub fn is_bus_master(&self) -> bool {
        lock(&self.state).bus_master()
    }

    /// Whether interrupts are messages; else they are levels on the pin.
    pub fn uses_messages(&self) -> bool {
        lock(&self.state).config.u16(self.msix_at + 2) & msix::control::ENABLE != 0
    }

    /// Signals a vector, if MSI-X is on.
    pub fn notify(&self, vector: u16) {
        self.msix.notify(vector);
    }

    /// Sets the level of the pin. It gets through while MSI-X is off and the pin is not disabled.
    pub fn set_interrupt(&self, level: bool) {
        let mut state = lock(&self.state);
        if state.interrupt != level {
            state.interrupt = level;
            self.drive(&state);
        }
    }

    /// As after power on.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        let zeroes = [0; 256];
        state.config.write(0, &zeroes);
        if let Some((slot, bars)) = self.place.get() {
            for bar in bars {
                state.config.write(bar.register, &bar.first.to_le_bytes());
            }
            state.config.write(register::INTERRUPT_LINE, &[slot.pin.gsi() as u8]);
        }
        state.interrupt = false;
        self.msix.reset();
        self.apply(&state);
    }

    /// The state now.
    pub fn save(&self) -> EndpointState {
        let state = lock(&self.state);
        EndpointState { config: state.config.save(), msix: self.msix.save(), interrupt: state.interrupt }
    }

    /// Loads a saved state. Returns whether it is one of such an endpoint; nothing has changed if not.
    pub fn restore(&self, saved: &EndpointState) -> bool {
        let mut state = lock(&self.state);
        let mut config = state.config.clone();
        if !config.restore(&saved.config) || !self.msix.accepts(&saved.msix) {
            return false;
        }
        *state = State { config, interrupt: saved.interrupt };
        self.msix.restore(&saved.msix);
        self.apply(&state);
        true
    }

    /// Has the registers' effects.
    fn apply(&self, state: &State) {
        self.msix.set_control(state.config.u16(self.msix_at + 2), state.bus_master());
        self.drive(state);
        let Some((slot, bars)) = self.place.get() else { return };
        let awake = state.config.u16(self.power_at + 4) & 3 == 0;
        let decodes = awake && state.config.u16(register::COMMAND) & command::MEMORY != 0;
        for bar in bars {
            let low = u64::from(state.config.u32(bar.register) & !0xf);
            let start = u64::from(state.config.u32(bar.register + 4)) << 32 | low;
            slot.decoder.set(bar.region, decodes.then_some(start));
        }
    }

    fn drive(&self, state: &State) {
        if let Some((slot, _)) = self.place.get() {
            let messages = state.config.u16(self.msix_at + 2) & msix::control::ENABLE != 0;
            let disabled = state.config.u16(register::COMMAND) & command::INTERRUPT_DISABLE != 0;
            slot.pin.set(state.interrupt && !messages && !disabled);
        }
    }
}

impl State {
    fn bus_master(&self) -> bool {
        self.config.u16(register::COMMAND) & command::BUS_MASTER != 0
    }
}
