//! A driver for the tests of devices: negotiates, sets queues up, puts chains in and takes them out.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringfence_engine::InterruptSink;
use ringfence_memory::{GuestAddress, GuestMemory};

use super::spec::{common, descriptor, feature, status};
use super::{SharedDevice, VirtioConfig, VirtioPci};
use crate::SystemBus;
use crate::device::lock;
use crate::pci::{PciBus, PciFunction};
use crate::testing::Bench;

pub(super) const RAM: u64 = 8 << 20;
/// Where tests may put data.
pub(super) const DATA: u64 = 1 << 20;
/// Entries of each queue.
const SIZE: u16 = 16;

/// A buffer of a chain: where, how many bytes, and whether the device writes to it.
pub(super) type Buffer = (u64, u32, bool);

pub(super) struct Driver {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) function: Arc<VirtioPci>,
    pub(super) bench: Bench,
    /// What the user was told.
    pub(super) told: Arc<Mutex<Vec<String>>>,
    /// Available and used indices, by queue.
    indices: Mutex<Vec<(u16, u16)>>,
    _pci: Arc<PciBus>,
    _bus: Arc<SystemBus>,
}

impl Driver {
    /// A device that is plugged in, bus master, and not initialised.
    pub(super) fn new(device: SharedDevice) -> Self {
        let memory = Arc::new(GuestMemory::flat(RAM).unwrap());
        let bench = Bench::new();
        let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let reporter = {
            let told = Arc::clone(&told);
            Arc::new(move |text| lock(&told).push(text))
        };
        let config = VirtioConfig { name: "virtio-test.0".into(), reporter };
        let function = VirtioPci::new(config, device, Arc::clone(&memory), &interrupts);
        let (pci, bus) = (PciBus::new(), Arc::new(SystemBus::new([]).unwrap()));
        pci.connect(&bus, &interrupts);
        pci.plug_next(Arc::clone(&function) as _).unwrap();
        function.config_write(4, &6_u16.to_le_bytes());
        Self { memory, function, bench, told, indices: Mutex::default(), _pci: pci, _bus: bus }
    }

    /// The same with `features` of the device's own agreed on and `queues` queues running.
    pub(super) fn running(device: SharedDevice, features: u64, queues: u16) -> Self {
        let driver = Self::new(device);
        driver.start(features, queues);
        driver
    }

    pub(super) fn start(&self, features: u64, queues: u16) {
        self.set(common::STATUS, 1, 0);
        self.wait("the reset", || self.status() == 0);
        self.set(common::STATUS, 1, 3);
        let features = features | feature::VERSION_1 | feature::INDIRECT;
        for (half, select) in [(features, 0), (features >> 32, 1)] {
            self.set(common::DRIVER_FEATURE_SELECT, 4, select);
            self.set(common::DRIVER_FEATURE, 4, half & 0xffff_ffff);
        }
        self.set(common::STATUS, 1, 11);
        assert_eq!(self.status() & status::FEATURES_OK, status::FEATURES_OK, "the features are offered");
        for queue in 0..queues {
            let base = Self::base(queue);
            self.memory.fill(GuestAddress(base), 0, 0x3000).unwrap();
            self.set(common::QUEUE_SELECT, 2, queue.into());
            self.set(common::QUEUE_SIZE, 2, SIZE.into());
            self.set(common::QUEUE_DESCRIPTORS, 8, base);
            self.set(common::QUEUE_DRIVER, 8, base + 0x1000);
            self.set(common::QUEUE_DEVICE, 8, base + 0x2000);
            self.set(common::QUEUE_ENABLE, 2, 1);
        }
        *lock(&self.indices) = vec![(0, 0); queues.into()];
        self.set(common::STATUS, 1, 15);
    }

    fn base(queue: u16) -> u64 {
        0x1_0000 + u64::from(queue) * 0x4000
    }

    pub(super) fn set(&self, register: u64, len: usize, value: u64) {
        self.function.write_registers(register, &value.to_le_bytes()[..len]);
    }

    pub(super) fn status(&self) -> u8 {
        let mut data = [0];
        self.function.read_registers(common::STATUS, &mut data);
        data[0]
    }

    /// What the device offers.
    pub(super) fn offered(&self) -> u64 {
        let half = |select| {
            self.set(common::DEVICE_FEATURE_SELECT, 4, select);
            let mut data = [0; 4];
            self.function.read_registers(common::DEVICE_FEATURE, &mut data);
            u64::from(u32::from_le_bytes(data))
        };
        half(1) << 32 | half(0)
    }

    /// Part of the device's configuration.
    pub(super) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.read_registers(0x2000 + offset, &mut data);
        data
    }

    pub(super) fn set_config(&self, offset: u64, data: &[u8]) {
        self.function.write_registers(0x2000 + offset, data);
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_bytes(GuestAddress(at), bytes).unwrap();
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_bytes(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }

    /// Makes a chain available and rings. Chains start at the descriptor of their available index, so that those of
    /// three buffers at most do not meet while four are out.
    pub(super) fn submit(&self, queue: u16, buffers: &[Buffer]) {
        let base = Self::base(queue);
        let mut indices = lock(&self.indices);
        let (available, _) = &mut indices[usize::from(queue)];
        let first = *available % 4 * 4;
        for (index, &(at, len, write)) in (first..).zip(buffers) {
            let more = usize::from(index - first) + 1 < buffers.len();
            let mut flags = if write { descriptor::WRITE } else { 0 };
            flags |= if more { descriptor::NEXT } else { 0 };
            let word = u128::from(at)
                | u128::from(len) << 64
                | u128::from(flags) << 96
                | u128::from(index + 1) << 112;
            self.put(base + u64::from(index) * descriptor::SIZE, &word.to_le_bytes());
        }
        self.put(base + 0x1000 + 4 + u64::from(*available % SIZE) * 2, &first.to_le_bytes());
        *available = available.wrapping_add(1);
        self.put(base + 0x1000 + 2, &available.to_le_bytes());
        drop(indices);
        self.function.write_registers(0x3000 + u64::from(queue) * 4, &queue.to_le_bytes());
    }

    /// How many bytes the device says it wrote to the next chain that it has given back, if there is one.
    pub(super) fn take(&self, queue: u16) -> Option<u32> {
        let base = Self::base(queue) + 0x2000;
        let mut indices = lock(&self.indices);
        let (_, used) = &mut indices[usize::from(queue)];
        if self.memory.read::<u16>(GuestAddress(base + 2)).unwrap() == *used {
            return None;
        }
        let at = base + 4 + u64::from(*used % SIZE) * 8;
        *used = used.wrapping_add(1);
        Some(self.memory.read(GuestAddress(at + 4)).unwrap())
    }

    /// Waits for the next chain to come back.
    pub(super) fn wait_for(&self, queue: u16) -> u32 {
        let mut written = None;
        self.wait("the chain", || {
            written = self.take(queue);
            written.is_some()
        });
        written.unwrap()
    }

    /// Waits for what another thread brings about.
    pub(super) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < end, "{what} does not come; status {:#x}", self.status());
            std::thread::yield_now();
        }
    }
}
