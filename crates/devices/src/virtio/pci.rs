//! A virtio device as a PCI function (4.1): identity, capabilities, where registers are.

use std::sync::{Arc, Weak};

use ringfence_engine::{BusDevice, InterruptSink, Placement};
use ringfence_memory::GuestMemory;

use super::core::{Core, Reporter};
use super::port::Port;
use super::{SharedDevice, registers};
use crate::Device;
use crate::device::lock;
use crate::pci::{Endpoint, Identity, MAX_VECTORS, PciError, PciFunction, Registers, Slot};

/// Vendor of all virtio devices (4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device identifiers start here; the device type is added.
const FIRST_DEVICE: u16 = 0x1040;

/// Structures that a capability leads to (4.1.4).
mod structure {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI_ACCESS: u8 = 5;
}

/// Where in the window of configuration space its parts are: base address register, offset, length, data.
mod access {
    pub(super) const BAR: u16 = 4;
    pub(super) const OFFSET: u16 = 8;
    pub(super) const LENGTH: u16 = 12;
    pub(super) const DATA: u16 = 16;
}

/// A function to be made.
#[derive(Clone)]
pub struct VirtioConfig {
    /// The name of its saved state and in messages, unique in the machine, such as `virtio-blk.0`.
    pub name: String,
    /// Told when the driver breaks the rules.
    pub reporter: Reporter,
}

impl std::fmt::Debug for VirtioConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VirtioConfig({})", self.name)
    }
}

/// A PCI function with a virtio device in it, to be plugged into a PCI bus.
pub struct VirtioPci {
    me: Weak<Self>,
    pub(super) core: Arc<Core>,
    pub(super) device: SharedDevice,
    /// Where the window of configuration space is (4.1.4.9).
    window: u16,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci").field("core", &self.core).field("device", &self.device).finish()
    }
}

/// A capability's body: what it leads to, in base address register 0.
fn body(structure: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, structure, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    body
}

impl VirtioPci {
    /// A function as after power on.
    pub fn new(
        config: VirtioConfig,
        device: SharedDevice,
        memory: Arc<GuestMemory>,
        interrupts: &Arc<dyn InterruptSink>,
    ) -> Arc<Self> {
        let kind = device.kind();
        let identity =
            Identity { vendor: VENDOR, device: FIRST_DEVICE + kind.id, class: kind.class, revision: 1 };
        let vectors = u16::try_from(kind.queues.len() + 1).unwrap_or(MAX_VECTORS).min(MAX_VECTORS);
        let endpoint = Endpoint::new(&identity, vectors, interrupts);
        let add = |structure, at: registers::Part, more: &[u8]| {
            endpoint.add_vendor_capability(&body(structure, at.offset, at.len, more), &[])
        };
        add(structure::COMMON, registers::COMMON, &[]);
        add(structure::NOTIFY, registers::NOTIFY, &registers::NOTIFY_STEP.to_le_bytes());
        add(structure::ISR, registers::ISR, &[]);
        add(structure::DEVICE, registers::DEVICE, &[]);
        // Everything about the window but its identity can be written; its data goes elsewhere.
        let mut writable = [0; 14];
        for (at, len) in [(access::BAR, 1), (access::OFFSET, 4), (access::LENGTH, 4)] {
            writable.iter_mut().skip(usize::from(at) - 2).take(len).for_each(|mask| *mask = 0xff);
        }
        let window = endpoint.add_vendor_capability(&body(structure::PCI_ACCESS, 0, 0, &[0; 4]), &writable);
        let core =
            Core::new(config.name, memory, endpoint, kind.features, &kind.queues, vectors, config.reporter);
        device.connect(Port(Arc::clone(&core)));
        Arc::new_cyclic(|me| Self { me: Weak::clone(me), core, device, window })
    }

    /// What an access of `len` bytes to the window's data at `offset` means: where in the registers.
    fn through_window(&self, offset: u16, len: usize) -> Option<u64> {
        let field = |at: u16| {
            let mut bytes = [0; 4];
            self.core.endpoint.config_read(self.window + at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        if offset != self.window + access::DATA {
            return None;
        }
        let (bar, at, size) = (field(access::BAR) & 0xff, field(access::OFFSET), field(access::LENGTH));
        let right = bar == 0 && size as usize == len && matches!(size, 1 | 2 | 4) && at.is_multiple_of(size);
        right.then_some(u64::from(at)).filter(|at| *at < registers::SIZE)
    }

    /// Goes on after the function has become bus master.
    fn resume(&self) {
        self.core.resume();
        let (running, queues) = {
            let state = lock(&self.core.state);
            (state.is_running(), state.queues.len() as u16)
        };
        if running {
            (0..queues).for_each(|queue| self.device.notify(queue));
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        match self.through_window(offset, data.len()) {
            Some(at) => self.read_registers(at, data),
            None => self.core.endpoint.config_read(offset, data),
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if let Some(at) = self.through_window(offset, data.len()) {
            return self.write_registers(at, data);
        }
        let master = self.core.endpoint.config_write(offset, data);
        // Messages may have been switched on or off.
        self.core.update_pin(&lock(&self.core.state));
        if master {
            self.resume();
        }
    }

    fn plugged(&self, slot: Slot) -> Result<(), PciError> {
        let device = Arc::new(Window(Weak::clone(&self.me)));
        self.core.endpoint.plug(slot, &Registers { name: "virtio", size: registers::SIZE, device })
    }
}

/// The registers on the bus, which must not keep the function alive.
struct Window(Weak<VirtioPci>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.0.upgrade() {
            function.read_registers(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.0.upgrade() {
            function.write_registers(offset, data);
        }
    }
}

impl Device for VirtioPci {
    /// Its registers are placed by the PCI bus.
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        Vec::new()
    }

    fn reset(&self) {
        self.begin_reset();
        let mut state = self.core.wait_idle();
        let sizes: Vec<u16> = state.queues.iter().map(|q| q.max).collect();
        *state = super::core::State::new(&sizes);
        self.core.endpoint.reset();
    }
}
