//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;

use ringfence_boot::BootError;
use ringfence_devices::BusError;
use ringfence_devices::nvme::NvmeError;
use ringfence_devices::pci::PciError;
use ringfence_devices::virtio::blk::BlkError;
use ringfence_disk::ImageError;
use ringfence_engine::{EngineError, StateError};
use ringfence_memory::MemoryError;
use ringfence_net::NetError;
use ringfence_share::ShareError;
use ringfence_vsock::VsockError;
use ringfence_x86::cpuid::MissingFeatures;

use crate::ports::PortError;
use crate::size::ByteSize;
use crate::spec::SpecError;

/// An error of a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The description asks for something that cannot be had.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The host's CPU cannot execute the model.
    #[error(transparent)]
    Cpu(#[from] MissingFeatures),
    /// The host has no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine cannot run it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Two devices want the same address.
    #[error("the machine's devices do not fit together")]
    Bus(#[from] BusError),
    /// A network cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A folder cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A vsock cannot be had.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A named port cannot be had.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A virtio console cannot be had.
    #[error("the host refuses a thread for the console")]
    Console(#[source] io::Error),
    /// A disk cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A disk cannot be what it is to be in the guest.
    #[error("cannot attach the disk {}", disk.display())]
    Disk {
        /// Its image.
        disk: PathBuf,
        /// Why.
        source: AttachError,
    },
    /// There is no room for another device.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The kernel cannot be booted.
    #[error("cannot boot {}", kernel.display())]
    Boot {
        /// Its file.
        kernel: PathBuf,
        /// Why.
        source: BootError,
    },
    /// An initrd is larger than the machine's memory.
    #[error("the initrd {path:?} does not fit into {memory} of memory; give the machine more with --memory")]
    LargeInitrd {
        /// Its file.
        path: PathBuf,
        /// The memory there is.
        memory: ByteSize,
    },
    /// The host refuses a thread.
    #[error("the host refuses a thread for vCPU {vcpu}")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// The host's reason.
        source: io::Error,
    },
    /// A vCPU's thread hangs or is gone: a bug of ours.
    #[error("vCPU {0} does not answer; this is a bug in ringfence")]
    VcpuLost(u32),
    /// A saved state cannot be loaded.
    #[error("the saved machine cannot be loaded")]
    State(#[from] StateError),
}

/// Why a disk cannot be what it is to be in the guest.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// As an NVMe controller.
    #[error(transparent)]
    Nvme(#[from] NvmeError),
    /// As a virtio disk.
    #[error(transparent)]
    Virtio(#[from] BlkError),
}
