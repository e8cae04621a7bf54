//! What every function with registers in memory and interrupts has in common. A device owns an [`Endpoint`] and
//! passes its configuration accesses on.

use std::sync::atomic::{AtomicBool, Ordering};
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
    pub(super) const VENDOR: u8 = 0x09;
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

/// A type 0 function with one range of registers, MSI-X and a pin, as an integrated PCI Express endpoint.
#[derive(Debug)]
pub struct Endpoint {
    config: Mutex<ConfigSpace>,
    msix: Arc<Msix>,
    /// Where the power-management and MSI-X capabilities are.
    power_at: u16,
    msix_at: u16,
    /// Copies of register bits that devices ask for with every completion.
    messages: AtomicBool,
    bus_master: AtomicBool,
    /// What the device signals on its pin.
    interrupt: AtomicBool,
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
        Self {
            config: Mutex::new(config),
            msix,
            power_at,
            msix_at,
            messages: AtomicBool::new(false),
            bus_master: AtomicBool::new(false),
            interrupt: AtomicBool::new(false),
            place: OnceLock::new(),
        }
    }

    /// Adds a capability of the vendor's own, given without its two bytes of identifier and link, before the
    /// function is plugged in. `writable` has the bits that software can set. Returns where it starts.
    pub fn add_vendor_capability(&self, body: &[u8], writable: &[u8]) -> u16 {
        lock(&self.config).add_capability(capability::VENDOR, body, writable)
    }

    /// Gives the endpoint its place: its registers get addresses, which are decoded once software says so.
    ///
    /// # Errors
    /// [`PciError`] if it has a place already or there is no room for its registers.
    pub fn plug(&self, slot: Slot, registers: &Registers) -> Result<(), PciError> {
        let mut config = lock(&self.config);
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
            config.set(bar.register, &u64::from(WIDE).to_le_bytes(), &mask.to_le_bytes());
            config.write(bar.register, &bar.first.to_le_bytes());
        }
        config.write(register::INTERRUPT_LINE, &[slot.pin.gsi() as u8]);
        self.place.set((slot, bars)).map_err(|(slot, _)| PciError::Taken(slot.address))
    }

    /// What [`PciFunction::config_read`](super::PciFunction::config_read) gives.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        let config = lock(&self.config);
        config.read(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            if at == register::STATUS && self.interrupt.load(Ordering::Acquire) {
                *byte |= status::INTERRUPT;
            }
        }
    }

    /// Takes over what [`PciFunction::config_write`](super::PciFunction::config_write) brings. Returns whether
    /// the function has just become bus master and can go on with what it could not do before.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut config = lock(&self.config);
        let before = self.may_master(&config);
        config.write(offset, data);
        self.apply(&config);
        !before && self.may_master(&config)
    }

    /// Whether the function may access memory.
    pub fn is_bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// Whether interrupts are messages; else they are levels on the pin.
    pub fn uses_messages(&self) -> bool {
        self.messages.load(Ordering::Acquire)
    }

    /// Signals a vector, if MSI-X is on.
    pub fn notify(&self, vector: u16) {
        self.msix.notify(vector);
    }

    /// Sets the level of the pin. It gets through while MSI-X is off and the pin is not disabled.
    pub fn set_interrupt(&self, level: bool) {
        if self.interrupt.swap(level, Ordering::AcqRel) != level {
            // Driven with the lock held and from the newest level, so that the last of several setters counts.
            self.drive(&lock(&self.config));
        }
    }

    /// As after power on.
    pub fn reset(&self) {
        let mut config = lock(&self.config);
        let zeroes = [0; 256];
        config.write(0, &zeroes);
        if let Some((slot, bars)) = self.place.get() {
            for bar in bars {
                config.write(bar.register, &bar.first.to_le_bytes());
            }
            config.write(register::INTERRUPT_LINE, &[slot.pin.gsi() as u8]);
        }
        self.interrupt.store(false, Ordering::Release);
        self.msix.reset();
        self.apply(&config);
    }

    /// The state now.
    pub fn save(&self) -> EndpointState {
        let config = lock(&self.config);
        let interrupt = self.interrupt.load(Ordering::Acquire);
        EndpointState { config: config.save(), msix: self.msix.save(), interrupt }
    }

    /// Loads a saved state. Returns whether it is one of such an endpoint; nothing has changed if not.
    pub fn restore(&self, saved: &EndpointState) -> bool {
        let mut config = lock(&self.config);
        let mut new = config.clone();
        if !new.restore(&saved.config) || !self.msix.accepts(&saved.msix) {
            return false;
        }
        *config = new;
        self.interrupt.store(saved.interrupt, Ordering::Release);
        self.msix.restore(&saved.msix);
        self.apply(&config);
        true
    }

    /// Has the registers' effects.
    fn apply(&self, config: &ConfigSpace) {
        let control = config.u16(self.msix_at + 2);
        self.messages.store(control & msix::control::ENABLE != 0, Ordering::Release);
        let master = self.may_master(config);
        self.bus_master.store(master, Ordering::Release);
        self.msix.set_control(control, master);
        self.drive(config);
        let Some((slot, bars)) = self.place.get() else { return };
        let decodes = self.is_awake(config) && config.u16(register::COMMAND) & command::MEMORY != 0;
        for bar in bars {
            let low = u64::from(config.u32(bar.register) & !0xf);
            let start = u64::from(config.u32(bar.register + 4)) << 32 | low;
            slot.decoder.set(bar.region, decodes.then_some(start));
        }
    }

    /// Whether the power state is D0. In D3 a function answers and does nothing but in configuration space.
    fn is_awake(&self, config: &ConfigSpace) -> bool {
        config.u16(self.power_at + 4) & 3 == 0
    }

    fn may_master(&self, config: &ConfigSpace) -> bool {
        self.is_awake(config) && config.u16(register::COMMAND) & command::BUS_MASTER != 0
    }

    fn drive(&self, config: &ConfigSpace) {
        if let Some((slot, _)) = self.place.get() {
            let messages = self.uses_messages();
            let disabled = config.u16(register::COMMAND) & command::INTERRUPT_DISABLE != 0;
            slot.pin.set(self.interrupt.load(Ordering::Acquire) && !messages && !disabled);
        }
    }
}
