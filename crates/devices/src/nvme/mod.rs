//! An NVMe controller with namespaces of 512- or 4096-byte blocks.
//!
//! Source: NVM Express 1.4; section numbers below and beside the code are its own. Offered: several I/O queues,
//! each with its MSI-X vector or all on the pin, PRPs, a volatile write cache, dataset management and write
//! zeroes. Not offered: scatter-gather lists, fused commands, metadata, firmware, namespace management.
//!
//! A doorbell is answered on the vCPU's thread: commands are taken from guest memory, checked and submitted to the
//! disk right there, and what the disk finishes at once is completed before the guest goes on. The rest is completed
//! by the disk's threads. Commands are copied once and every guest address is checked; nothing a guest writes can
//! make more work than its queues have entries:
//!
//! - a command is taken only when its completion queue has an entry left for it, so completions always fit;
//! - while commands are in flight the controller stays ready, so a guest that resets it gets its memory back only
//!   when no transfer touches it any more;
//! - deleting a submission queue waits for what was taken from it.
//!
//! Lock order: state, then the endpoint, then the interrupt controller. Disks are called with no lock held.

mod admin;
mod command;
mod events;
mod features;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod identify;
mod io;
mod log;
mod prp;
mod queue;
mod registers;
mod run;
mod saved;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, Weak};

use ringfence_disk::BlockDevice;
use ringfence_engine::{BusDevice, InterruptSink, Placement};
use ringfence_memory::GuestMemory;

use crate::Device;
use crate::device::lock;
use crate::pci::{Endpoint, Identity, PciError, PciFunction, Registers, Slot};
use state::State;

/// The most I/O queue pairs of a controller.
pub const MAX_QUEUES: u16 = 64;
/// The most namespaces of a controller.
pub const MAX_NAMESPACES: usize = 64;

/// VS: version 1.4.
const VERSION: u32 = 0x0001_0400;
/// The device number is one that no driver attaches quirks to; drivers go by the class.
const IDENTITY: Identity = Identity { vendor: 0x1b36, device: 0x10f0, class: 0x01_0802, revision: 1 };
/// Bytes of registers: the controller's and a page of doorbells.
const REGISTERS: u64 = 0x2000;

/// A namespace to be made.
#[derive(Clone, Debug)]
pub struct NamespaceConfig {
    /// What it stores its blocks on.
    pub disk: Arc<dyn BlockDevice>,
    /// Bytes in a block, 512 or 4096; `None` takes what the disk wants.
    pub block_size: Option<u32>,
    /// Its identifier, unique in the world.
    pub uuid: [u8; 16],
}

/// A controller to be made.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// The name of its saved state, unique in the machine, such as `nvme.0`.
    pub name: String,
    /// Serial number, at most 20 ASCII characters.
    pub serial: String,
    /// The controller's own identifier, unique in the world.
    pub uuid: [u8; 16],
    /// I/O queue pairs, 1 to [`MAX_QUEUES`]; one for each vCPU is best.
    pub queues: u16,
    /// Its namespaces, at most [`MAX_NAMESPACES`]; the first is number 1.
    pub namespaces: Vec<NamespaceConfig>,
}

/// Why a controller cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NvmeError {
    /// Too few or too many namespaces.
    #[error("an NVMe controller has 1 to {MAX_NAMESPACES} namespaces, not {0}")]
    NamespaceCount(usize),
    /// Not a size that namespaces can have.
    #[error("an NVMe disk has blocks of 512 or 4096 bytes, not {0}; change block-size=")]
    BlockSize(u32),
    /// The disk cannot be accessed in blocks that small.
    #[error(
        "the disk image can only be accessed in blocks of {needed} bytes with cache=none; use block-size=4096, or \
             cache=writeback"
    )]
    BlockTooSmall {
        /// Bytes in a block of the disk.
        needed: u32,
    },
    /// The disk has not even one block.
    #[error("the disk image of {size} bytes is smaller than one block of {block} bytes; make it larger")]
    TooSmall {
        /// Bytes of the disk.
        size: u64,
        /// Bytes in a block.
        block: u32,
    },
}

/// A namespace as the controller uses it.
#[derive(Debug)]
struct Namespace {
    disk: Arc<dyn BlockDevice>,
    /// Block size as a power of two.
    block_shift: u32,
    blocks: u64,
    read_only: bool,
    uuid: [u8; 16],
}

impl Namespace {
    fn new(config: &NamespaceConfig) -> Result<Self, NvmeError> {
        let info = config.disk.info();
        let block = config.block_size.unwrap_or(info.block.max(512));
        if !matches!(block, 512 | 4096) {
            return Err(NvmeError::BlockSize(block));
        }
        if block < info.block {
            return Err(NvmeError::BlockTooSmall { needed: info.block });
        }
        let blocks = info.size / u64::from(block);
        if blocks == 0 {
            return Err(NvmeError::TooSmall { size: info.size, block });
        }
        Ok(Self {
            disk: Arc::clone(&config.disk),
            block_shift: block.ilog2(),
            blocks,
            read_only: info.read_only,
            uuid: config.uuid,
        })
    }
}

/// An NVMe controller, to be plugged into a PCI bus.
pub struct Controller {
    me: Weak<Self>,
    config: NvmeConfig,
    memory: Arc<GuestMemory>,
    endpoint: Endpoint,
    namespaces: Vec<Namespace>,
    state: Mutex<State>,
    /// Signalled when nothing is in flight any more.
    idle: Condvar,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("config", &self.config)
            .field("state", &*lock(&self.state))
            .finish()
    }
}

impl Controller {
    /// A controller as after power on.
    ///
    /// # Errors
    /// [`NvmeError`] if a namespace cannot be as it is described.
    pub fn new(
        mut config: NvmeConfig,
        memory: Arc<GuestMemory>,
        interrupts: &Arc<dyn InterruptSink>,
    ) -> Result<Arc<Self>, NvmeError> {
        let count = config.namespaces.len();
        if !(1..=MAX_NAMESPACES).contains(&count) {
            return Err(NvmeError::NamespaceCount(count));
        }
        config.queues = config.queues.clamp(1, MAX_QUEUES);
        let namespaces = config.namespaces.iter().map(Namespace::new).collect::<Result<_, _>>()?;
        Ok(Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            endpoint: Endpoint::new(&IDENTITY, config.queues + 1, interrupts),
            state: Mutex::new(State::new(config.queues)),
            config,
            memory,
            namespaces,
            idle: Condvar::new(),
        }))
    }
}

impl PciFunction for Controller {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.endpoint.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let master = self.endpoint.config_write(offset, data);
        // Messages may have been switched on or off.
        self.update_pin(&lock(&self.state));
        if master {
            self.resume();
        }
    }

    fn plugged(&self, slot: Slot) -> Result<(), PciError> {
        let device = Arc::new(Window(Weak::clone(&self.me)));
        self.endpoint.plug(slot, &Registers { name: "nvme", size: REGISTERS, device })
    }
}

/// The registers on the bus, which must not keep the controller alive.
struct Window(Weak<Controller>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(controller) = self.0.upgrade() {
            controller.read_registers(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(controller) = self.0.upgrade() {
            controller.write_registers(offset, data);
        }
    }
}

impl Device for Controller {
    /// Its registers are placed by the PCI bus.
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        Vec::new()
    }

    fn reset(&self) {
        self.abandon();
        let mut state = self.wait_idle();
        state.power_on(self.config.queues);
        self.endpoint.reset();
    }
}
