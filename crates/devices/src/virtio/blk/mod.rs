//! A disk (5.2): several queues, flush, discard, write zeroes, a serial number.
//!
//! A notification is answered on the vCPU's thread: requests are checked and submitted to the disk right there, and what
//! the disk finishes at once is done before the guest goes on; the rest is completed by the disk's threads. Data goes
//! straight between the image and guest memory. The host's errors are IOERR to the guest; the disk tells the user.

mod config;
mod request;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ringfence_disk::{Access, BlockDevice, Buffers, DiskInfo, IoError, Operation, Request};
use ringfence_engine::StateError;

use super::{Chain, Kind, Piece, Port, VirtioDevice, read_bytes};
use crate::device::invalid;
use config::{WRITEBACK, feature};
use request::{Asked, Refusal};

/// The most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
const DEVICE_TYPE: u16 = 2;
/// Mass storage, SCSI: what drivers of old know a virtio disk as.
const CLASS: u32 = 0x01_0000;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// What it stores its blocks on.
    pub disk: Arc<dyn BlockDevice>,
    /// Bytes in a block as the guest sees it, 512 or 4096; `None` takes what the disk wants.
    pub block_size: Option<u32>,
    /// Serial number, at most 20 ASCII characters.
    pub serial: String,
    /// Queues, 1 to [`MAX_QUEUES`]; one for each vCPU is best.
    pub queues: u16,
}

/// Why a disk cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlkError {
    /// Not a size that blocks can have.
    #[error("a virtio disk has blocks of 512 or 4096 bytes, not {0}; change block-size=")]
    BlockSize(u32),
    /// The disk cannot be accessed in blocks that small.
    #[error(
        "the disk image can only be accessed in blocks of {0} bytes with cache=none; use block-size=4096, or \
         cache=writeback"
    )]
    BlockTooSmall(u32),
    /// The disk has not even one block.
    #[error("the disk image of {size} bytes is smaller than one block of {block} bytes; make it larger")]
    TooSmall {
        /// Bytes of the disk.
        size: u64,
        /// Bytes in a block.
        block: u32,
    },
}

/// A virtio disk.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<dyn BlockDevice>,
    info: DiskInfo,
    block: u32,
    serial: String,
    queues: u16,
    port: OnceLock<Port>,
    /// The driver knows flushes.
    flushes: AtomicBool,
    /// The driver has switched to write-through.
    write_through: AtomicBool,
}

impl Blk {
    /// A disk as it is described.
    ///
    /// # Errors
    /// [`BlkError`] if that cannot be.
    pub fn new(config: BlkConfig) -> Result<Arc<Self>, BlkError> {
        let info = config.disk.info();
        let block = config.block_size.unwrap_or(info.block.max(512));
        if !matches!(block, 512 | 4096) {
            return Err(BlkError::BlockSize(block));
        }
        if block < info.block {
            return Err(BlkError::BlockTooSmall(info.block));
        }
        if info.size < u64::from(block) {
            return Err(BlkError::TooSmall { size: info.size, block });
        }
        // Whole blocks only.
        let info = DiskInfo { size: info.size - info.size % u64::from(block), ..info };
        Ok(Arc::new(Self {
            disk: config.disk,
            info,
            block,
            serial: config.serial,
            queues: config.queues.clamp(1, MAX_QUEUES),
            port: OnceLock::new(),
            flushes: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
        }))
    }

    /// Starts one request. Returns whether the disk has to be kicked.
    fn start(&self, port: &Port, chain: Chain) -> bool {
        let asked = match request::parse(&chain, self) {
            Ok(asked) => asked,
            Err(Refusal::NoStatus) => {
                port.fail("a disk request has no header or no room for its status");
                return false;
            }
            Err(Refusal::Status(status)) => {
                finish(chain, status, 0);
                return false;
            }
        };
        let (operation, written) = match asked {
            Asked::Id => {
                let mut id = [0; request::ID_SIZE];
                for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
                    *to = from;
                }
                let room = chain.writable_len().saturating_sub(1).min(id.len() as u64);
                let written = chain.write(0, id.get(..room as usize).unwrap_or_default());
                finish(chain, request::OK, written as u64);
                return false;
            }
            Asked::Operation(operation) => {
                let written = match &operation {
                    Operation::Read { buffers, .. } => buffers.len(),
                    _ => 0,
                };
                (operation, written)
            }
        };
        let done = Box::new(move |result: Result<(), IoError>| match result {
            Ok(()) => finish(chain, request::OK, written),
            Err(error) => finish(chain, request::status(error), 0),
        });
        self.disk.submit(Request { operation, done });
        true
    }

    /// Whether writes may stay in a cache until a flush (5.2.6.2).
    fn is_cached(&self) -> bool {
        self.flushes.load(Ordering::Acquire) && !self.write_through.load(Ordering::Acquire)
    }

    /// Buffers for a request's data.
    fn buffers(&self, access: Access, pieces: impl Iterator<Item = Piece>) -> Option<Buffers> {
        let memory = self.port.get()?.memory();
        Buffers::guest(memory, access, pieces).ok()
    }
}

/// Writes the status and gives the chain back. `written`: bytes of data before the status byte.
fn finish(chain: Chain, status: u8, written: u64) {
    let at = chain.writable_len().saturating_sub(1);
    chain.write(at, &[status]);
    // What was written reaches up to the status byte only if all of the data is there.
    let written = if written == at { written + 1 } else { written.min(at) };
    chain.complete(u32::try_from(written).unwrap_or(u32::MAX));
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        let mut features = feature::ALWAYS;
        if self.info.read_only {
            features |= feature::READ_ONLY;
        } else {
            features |= feature::WRITE_ZEROES;
            if self.info.discard {
                features |= feature::DISCARD;
            }
        }
        Kind { id: DEVICE_TYPE, class: CLASS, features, queues: vec![QUEUE_SIZE; usize::from(self.queues)] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.port.set(port);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Drivers ask before they are ready, and send flushes only if there is a cache by then.
        let flushes = self.port.get().is_some_and(|port| port.features() & feature::FLUSH != 0);
        let cached = flushes && !self.write_through.load(Ordering::Acquire);
        let config = config::bytes(&self.info, self.block, self.queues, cached);
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        // The only field that a driver can write, and only if that was negotiated (5.2.5.2).
        let both = feature::CONFIG_CACHE | feature::FLUSH;
        if (offset, data.len()) == (WRITEBACK, 1)
            && self.port.get().is_some_and(|port| port.features() & both == both)
        {
            self.write_through.store(data.first() == Some(&0), Ordering::Release);
        }
    }

    fn activate(&self, features: u64) {
        self.flushes.store(features & feature::FLUSH != 0, Ordering::Release);
    }

    fn notify(&self, queue: u16) {
        let Some(port) = self.port.get() else { return };
        let mut kick = false;
        while let Some(chain) = port.take(queue) {
            kick |= self.start(port, chain);
        }
        if kick {
            self.disk.kick();
        }
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        if queue.is_none() && !saving {
            self.write_through.store(false, Ordering::Release);
            // The reset waits for what is under way, which limits can hold back for long.
            self.disk.abandon();
        }
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "write_through": self.write_through.load(Ordering::Acquire) })
    }

    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let through = state.get("write_through").and_then(serde_json::Value::as_bool);
        let through = through.ok_or_else(|| invalid(name, "its cache is neither on nor off"))?;
        self.write_through.store(through, Ordering::Release);
        Ok(())
    }
}
