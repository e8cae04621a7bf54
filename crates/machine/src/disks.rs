//! The machine's disks: images opened as the description says, each behind a controller of its own.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use ringfence_devices::nvme::{Controller, NamespaceConfig, NvmeConfig};
use ringfence_devices::virtio::blk::{Blk, BlkConfig};
use ringfence_disk::{BlockDevice, DiskBus, DiskOptions, DiskSpec, Fault, IoEngine};
use ringfence_engine::{ClockMode, InterruptSink};
use ringfence_memory::GuestMemory;

use crate::control::{Event, reporter};
use crate::error::MachineError;

/// An open disk and what it was opened from.
pub(crate) struct Disk {
    spec: DiskSpec,
    device: Arc<dyn BlockDevice>,
}

/// Opens and locks all images. In counted mode no thread may act at a time of its own, so I/O is done on the
/// vCPU's.
pub(crate) fn open(
    specs: &[DiskSpec],
    clock: ClockMode,
    events: &Sender<Event>,
) -> Result<Vec<Disk>, MachineError> {
    let open = |spec: &DiskSpec| {
        let tell = reporter(events, Event::DiskFault);
        let faults = move |fault: &Fault| tell(fault.to_string());
        let mut spec = spec.clone();
        if clock == ClockMode::Counted {
            spec.engine = IoEngine::Sync;
        }
        let options = DiskOptions {
            spec: spec.clone(),
            faults: Some(Arc::new(faults)),
            warner: Some(Arc::new(reporter(events, Event::DiskFault))),
            thread_hook: None,
        };
        let device = ringfence_disk::open(&options)?;
        Ok(Disk { spec, device })
    };
    specs.iter().map(open).collect()
}

impl Disk {
    /// How the guest reaches it.
    pub(crate) fn bus(&self) -> DiskBus {
        self.spec.bus
    }
}

/// A disk as a virtio device.
pub(crate) fn virtio(index: usize, disk: Disk, queues: u32) -> Result<Arc<Blk>, MachineError> {
    let Disk { spec, device } = disk;
    let config = BlkConfig {
        disk: device,
        block_size: spec.block_size,
        serial: serial(index),
        queues: u16::try_from(queues).unwrap_or(u16::MAX),
    };
    Blk::new(config).map_err(|source| MachineError::Disk { disk: spec.path, source: source.into() })
}

/// By which the guest tells a machine's disks apart.
fn serial(index: usize) -> String {
    format!("disk{index}")
}

/// The NVMe controller of a disk.
pub(crate) fn nvme(
    index: usize,
    disk: Disk,
    queues: u32,
    memory: &Arc<GuestMemory>,
    interrupts: &Arc<dyn InterruptSink>,
) -> Result<Arc<Controller>, MachineError> {
    let Disk { spec, device } = disk;
    // Fixed, so that a machine finds its disks by the same names each time; unique among its own.
    let mut uuid = *b"ringfence disk\0\0";
    uuid[14..].copy_from_slice(&(index as u16).to_be_bytes());
    let config = NvmeConfig {
        name: format!("nvme.{index}"),
        serial: serial(index),
        uuid,
        queues: u16::try_from(queues).unwrap_or(u16::MAX),
        namespaces: vec![NamespaceConfig { disk: device, block_size: spec.block_size, uuid }],
    };
    Controller::new(config, Arc::clone(memory), interrupts)
        .map_err(|source| MachineError::Disk { disk: spec.path, source: source.into() })
}
