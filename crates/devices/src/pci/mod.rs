//! PCI: the bus, its host bridge with both ways to configuration space, and what functions are made of.
//!
//! Sources: PCI Local Bus 3.0 (3.2.2.3.2 configuration mechanism #1, 6 configuration space and MSI-X), PCI Express
//! Base 4.0 (7.2.2 ECAM); ICH9 data sheet 13.7.5 (RST_CNT, which lies within the configuration ports).
//!
//! Whatever plugs into the [`PciBus`] is a [`PciFunction`]. The bus hands it accesses within its configuration
//! space and its [`Slot`]; an [`Endpoint`] does the rest that functions have in common: base addresses that follow
//! the registers about, MSI-X, the interrupt pin. [`PciHost`] is the bridge's side towards the CPU: ports 0xcf8 to
//! 0xcff and the ECAM window. All functions sit on bus 0. Addresses that nobody uses yet in the windows of
//! [`platform`](crate::platform) are for what is plugged in while the machine runs.

mod bridge;
mod config;
mod decode;
mod ecam;
mod endpoint;
mod intx;
mod msix;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ringfence_engine::{AddressSpace, BusDevice, InterruptSink, Placement, SavedState, StateError, Stateful};
use serde::{Deserialize, Serialize};

pub use config::Identity;
pub use decode::Decoder;
pub use endpoint::{Endpoint, EndpointState, Registers};
pub use intx::IntxPin;
pub use msix::MAX_VECTORS;

use bridge::HostBridge;

use crate::device::{lock, ports};
use crate::platform::{PCI_CONFIG_PORT, PCI_ECAM, RESET_PORT};
use crate::{PowerControl, PowerEvent, SystemBus};

const NAME: &str = "pci-host";
const VERSION: u32 = 1;

/// Where a function sits: bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress(u16);

impl PciAddress {
    /// The address from its parts. Only the low 5 bits of `device` and 3 bits of `function` count.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self((bus as u16) << 8 | (device as u16 & 31) << 3 | function as u16 & 7)
    }

    /// The address from bus, device and function packed as in a requester ID.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Bus, device and function packed as in a requester ID.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The device's number on its bus, 0 to 31.
    pub const fn device(self) -> u8 {
        (self.0 >> 3 & 31) as u8
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, self.0 >> 3 & 31, self.0 & 7)
    }
}

/// A function on the bus.
pub trait PciFunction: Send + Sync {
    /// Fills `data` from configuration space at `offset`. The access does not cross a 4-byte boundary; offsets
    /// from 256 are the extended space. `data` comes filled with ones.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes `data` to configuration space at `offset`, within the same limits.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Called once, when the function gets its place on the bus.
    ///
    /// # Errors
    /// [`PciError`] if it cannot be there; it is not plugged in then.
    fn plugged(&self, slot: Slot) -> Result<(), PciError> {
        drop(slot);
        Ok(())
    }
}

/// A function's place and what it can reach from there.
#[derive(Clone, Debug)]
pub struct Slot {
    address: PciAddress,
    decoder: Arc<Decoder>,
    pin: IntxPin,
}

/// Why a function cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// The place is taken.
    #[error("PCI address {0} is taken; choose another")]
    Taken(PciAddress),
    /// The window for base addresses is full.
    #[error("no room for {0:#x} bytes of registers in the PCI window; plug in fewer devices")]
    NoRoom(u64),
    /// All device numbers are taken.
    #[error("all 32 places on the PCI bus are taken; plug in fewer devices")]
    Full,
}

/// The functions on the bus and their configuration spaces.
pub struct PciBus {
    functions: RwLock<BTreeMap<PciAddress, Arc<dyn PciFunction>>>,
    decoder: Arc<Decoder>,
    lines: intx::Lines,
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(functions.keys()).finish()
    }
}

impl PciBus {
    /// A bus with nothing on it but its host bridge, 00:00.0, by which operating systems know it.
    pub fn new() -> Arc<Self> {
        let bridge = Arc::new(HostBridge) as Arc<dyn PciFunction>;
        let functions = BTreeMap::from([(PciAddress::new(0, 0, 0), bridge)]);
        Arc::new(Self {
            functions: RwLock::new(functions),
            decoder: Arc::default(),
            lines: intx::Lines::default(),
        })
    }

    /// Connects the bus on which base addresses are decoded, which is held weakly, and the interrupt controller
    /// for the functions' pins. Needed once, before or after functions are plugged in; the first call counts.
    pub fn connect(&self, system: &Arc<SystemBus>, interrupts: &Arc<dyn InterruptSink>) {
        self.decoder.connect(system);
        self.lines.connect(interrupts);
    }

    /// Plugs a function in.
    ///
    /// # Errors
    /// [`PciError`] if another is there or the function cannot be.
    pub fn plug(&self, address: PciAddress, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if functions.contains_key(&address) {
            return Err(PciError::Taken(address));
        }
        let pin = self.lines.pin(address);
        function.plugged(Slot { address, decoder: Arc::clone(&self.decoder), pin })?;
        functions.insert(address, function);
        Ok(())
    }

    /// Plugs a function in as the first of the lowest free device. Returns where.
    ///
    /// # Errors
    /// [`PciError`] if there is no room.
    pub fn plug_next(&self, function: Arc<dyn PciFunction>) -> Result<PciAddress, PciError> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let free = |device: &u8| !functions.keys().any(|a| a.bits() >> 3 == u16::from(*device));
        let device = (0..32).find(free).ok_or(PciError::Full)?;
        drop(functions);
        let address = PciAddress::new(0, device, 0);
        self.plug(address, function)?;
        Ok(address)
    }

    fn function(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(&address).map(Arc::clone)
    }

    /// Reads configuration space; ones where no function is.
    pub fn config_read(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = self.function(address) {
            function.config_read(offset, data);
        }
    }

    /// Writes configuration space; dropped where no function is.
    pub fn config_write(&self, address: PciAddress, offset: u16, data: &[u8]) {
        if let Some(function) = self.function(address) {
            function.config_write(offset, data);
        }
    }
}

/// Offset of the reset control register.
const RESET_CONTROL: u64 = (RESET_PORT - PCI_CONFIG_PORT) as u64;
/// RST_CNT: a rise of this bit resets.
const RESET_CPU: u8 = 1 << 2;
/// RST_CNT: which kind of reset; kept only to be read back.
const SYSTEM_RESET: u8 = 1 << 1;
const CONFIG_ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS bits that can be set: enable, bus, device, function, register.
const ADDRESS_BITS: u32 = CONFIG_ENABLE | 0x00ff_fffc;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    address: u32,
    reset_control: u8,
}

/// Ports 0xcf8 to 0xcff (CONFIG_ADDRESS, CONFIG_DATA and the reset control register at 0xcf9) and the ECAM window.
pub struct PciHost {
    bus: Arc<PciBus>,
    power: Arc<dyn PowerControl>,
    state: Mutex<State>,
}

impl std::fmt::Debug for PciHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciHost").field("bus", &self.bus).field("state", &*lock(&self.state)).finish()
    }
}

impl PciHost {
    /// The CPU's side of `bus`.
    pub fn new(bus: Arc<PciBus>, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { bus, power, state: Mutex::default() })
    }

    /// What CONFIG_DATA stands for, if the address register is enabled: function and offset.
    fn target(&self, offset: u64) -> Option<(PciAddress, u16)> {
        let address = lock(&self.state).address;
        let register = (address & 0xfc) as u16 | (offset & 3) as u16;
        (address & CONFIG_ENABLE != 0).then_some((PciAddress((address >> 8) as u16), register))
    }
}

impl BusDevice for PciHost {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&lock(&self.state).address.to_le_bytes()),
            (RESET_CONTROL, 1) => data.fill(lock(&self.state).reset_control),
            (4..=7, len) if offset + len as u64 <= 8 => {
                if let Some((address, register)) = self.target(offset) {
                    self.bus.config_read(address, register, data);
                }
            }
            _ => (),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                lock(&self.state).address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS;
            }
            (RESET_CONTROL, &[value]) => {
                let mut state = lock(&self.state);
                let rises = value & !state.reset_control & RESET_CPU != 0;
                state.reset_control = value & (RESET_CPU | SYSTEM_RESET);
                drop(state);
                if rises {
                    self.power.request(PowerEvent::Reset);
                }
            }
            (4..=7, _) if offset + data.len() as u64 <= 8 => {
                if let Some((address, register)) = self.target(offset) {
                    self.bus.config_write(address, register, data);
                }
            }
            _ => (),
        }
    }
}

impl crate::Device for PciHost {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        let ecam = Arc::new(ecam::Ecam(Arc::clone(&self.bus)));
        vec![
            ports(NAME, PCI_CONFIG_PORT, 8, self),
            Placement { name: "pci-ecam", space: AddressSpace::Memory, range: PCI_ECAM, device: ecam },
        ]
    }

    fn reset(&self) {
        *lock(&self.state) = State::default();
    }
}

impl Stateful for PciHost {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &*lock(&self.state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let mut new: State = saved.unpack(NAME, VERSION)?;
        new.address &= ADDRESS_BITS;
        *lock(&self.state) = new;
        Ok(())
    }
}
