//! A guest with one device, for tests and fuzzing: memory, a PCI bus with the device's function on it, and the accesses that
//! drivers are made of, good ones and bad ones.
//!
//! A queue has a page: its table of descriptors, from 0x400 on the driver's ring, from 0x800 on the device's. What a driver
//! does before and between those accesses is the callers': [`Driver`](super::testing::Driver) follows the rules, the fuzzer's
//! guest follows none.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringfence_engine::InterruptSink;
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec, Scalar};

use super::spec::{common, descriptor, status};
use super::{SharedDevice, VirtioConfig, VirtioPci};
use crate::SystemBus;
use crate::device::lock;
use crate::pci::{PciBus, PciFunction};

pub(super) const RAM: u64 = 8 << 20;
/// Memory that devices may read and not write, every byte of which is [`ROM_BYTE`].
pub(super) const ROM: u64 = 16 << 20;
pub(super) const ROM_SIZE: u64 = 0x2000;
pub(super) const ROM_BYTE: u8 = 0x5a;
/// Where queues are, a page each.
pub(super) const QUEUES: u64 = 0x1000;
/// Where callers may put data.
pub(super) const DATA: u64 = 1 << 20;
/// Where the notification registers are.
pub(super) const NOTIFY: u64 = 0x3000;
/// Where the device's own configuration is.
pub(super) const CONFIG: u64 = 0x2000;
/// Entries that a queue gets, if the device has so many.
const SIZE: u16 = 16;
/// How long a device may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A buffer of a chain: where, how many bytes, and whether the device writes to it.
pub(super) type Buffer = (u64, u32, bool);
/// Address, length, flags and next index of a descriptor.
pub(super) type Descriptor = (u64, u32, u16, u16);

/// The guest's side of a queue.
#[derive(Clone, Copy, Debug)]
struct Place {
    size: u16,
    available: u16,
    used: u16,
}

pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) function: Arc<VirtioPci>,
    pub(super) bus: Arc<SystemBus>,
    /// What the user was told.
    pub(super) told: Arc<Mutex<Vec<String>>>,
    places: Mutex<Vec<Place>>,
    _pci: Arc<PciBus>,
}

impl Guest {
    /// A device as after power on, plugged in and bus master.
    pub(super) fn new(device: SharedDevice, interrupts: &Arc<dyn InterruptSink>) -> Self {
        let ram = RegionSpec { range: GuestRange::new(0, RAM), kind: RegionKind::Ram };
        let rom = RegionSpec { range: GuestRange::new(ROM, ROM_SIZE), kind: RegionKind::Rom };
        let memory = Arc::new(GuestMemory::new(&[ram, rom]).expect("the host has some memory"));
        memory.fill(GuestAddress(ROM), ROM_BYTE, ROM_SIZE).expect("the ROM is there");
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let teller = Arc::clone(&told);
        let reporter = Arc::new(move |text| lock(&teller).push(text));
        let config = VirtioConfig { name: "virtio-test.0".to_owned(), reporter };
        let function = VirtioPci::new(config, device, Arc::clone(&memory), interrupts);
        let bus = Arc::new(SystemBus::new([]).expect("an empty bus"));
        let pci = PciBus::new();
        pci.connect(&bus, interrupts);
        pci.plug_next(Arc::clone(&function) as _).expect("the bus is empty");
        let places = vec![Place { size: 1, available: 0, used: 0 }; lock(&function.core.state).queues.len()];
        let guest = Self { memory, function, bus, told, places: Mutex::new(places), _pci: pci };
        guest.set_bus_master();
        guest
    }

    /// Lets the device read and write memory.
    pub(super) fn set_bus_master(&self) {
        self.function.config_write(4, &6_u16.to_le_bytes());
    }

    /// How many queues the device has.
    pub(super) fn queues(&self) -> u16 {
        lock(&self.places).len() as u16
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.function.read_registers(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.write_registers(offset, &value.to_le_bytes()[..len]);
    }

    pub(super) fn status(&self) -> u8 {
        self.read(common::STATUS, 1) as u8
    }

    pub(super) fn set_status(&self, value: u8) {
        self.write(common::STATUS, 1, value.into());
    }

    /// Whether the device says that it needs a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// What the device offers.
    pub(super) fn offered(&self) -> u64 {
        let half = |select| {
            self.write(common::DEVICE_FEATURE_SELECT, 4, select);
            self.read(common::DEVICE_FEATURE, 4)
        };
        half(1) << 32 | half(0)
    }

    pub(super) fn set_features(&self, features: u64) {
        for half in 0..2 {
            self.write(common::DRIVER_FEATURE_SELECT, 4, half);
            self.write(common::DRIVER_FEATURE, 4, features >> (half * 32) & 0xffff_ffff);
        }
    }

    /// Resets the device and waits until that is done.
    pub(super) fn reset(&self) {
        self.set_status(0);
        self.wait("the reset", || self.status() == 0);
    }

    /// From anywhere to agreement on `features` (3.1.1).
    pub(super) fn negotiate(&self, features: u64) {
        self.reset();
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.set_features(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert!(self.status() & status::FEATURES_OK != 0, "the features are offered");
    }

    /// From anywhere to ready, with `queues` queues.
    pub(super) fn start(&self, features: u64, queues: u16) {
        self.negotiate(features);
        (0..queues).for_each(|queue| self.enable(queue));
        self.set_status(self.status() | status::DRIVER_OK);
    }

    /// A queue's table of descriptors.
    pub(super) fn table(queue: u16) -> u64 {
        QUEUES + u64::from(queue) * 0x1000
    }

    /// A queue's ring of the driver.
    pub(super) fn ring(queue: u16) -> u64 {
        Self::table(queue) + 0x400
    }

    /// A queue's ring of the device.
    pub(super) fn used(queue: u16) -> u64 {
        Self::table(queue) + 0x800
    }

    /// Begins a queue anew. Of a device that refuses it nothing is expected.
    pub(super) fn enable(&self, queue: u16) {
        self.memory.fill(GuestAddress(Self::table(queue)), 0, 0x1000).expect("queues are in RAM");
        self.write(common::QUEUE_SELECT, 2, queue.into());
        let size = SIZE.min(self.read(common::QUEUE_SIZE, 2) as u16);
        self.write(common::QUEUE_SIZE, 2, size.into());
        self.write(common::QUEUE_DESCRIPTORS, 8, Self::table(queue));
        self.write(common::QUEUE_DRIVER, 4, Self::ring(queue));
        self.write(common::QUEUE_DRIVER + 4, 4, 0);
        self.write(common::QUEUE_DEVICE, 8, Self::used(queue));
        self.write(common::QUEUE_ENABLE, 2, 1);
        if let Some(place) = lock(&self.places).get_mut(usize::from(queue)) {
            *place = Place { size: size.max(1), available: 0, used: 0 };
        }
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_bytes(GuestAddress(at), bytes).expect("it is in RAM");
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_bytes(GuestAddress(at), &mut bytes).expect("it is in memory");
        bytes
    }

    pub(super) fn store<T: Scalar>(&self, at: u64, value: T) {
        self.memory.write(GuestAddress(at), value).expect("it is in RAM");
    }

    pub(super) fn load<T: Scalar>(&self, at: u64) -> T {
        self.memory.read(GuestAddress(at)).expect("it is in memory")
    }

    /// Writes a descriptor into a table.
    pub(super) fn describe(&self, table: u64, index: u16, (address, len, flags, next): Descriptor) {
        let number =
            u128::from(next) << 112 | u128::from(flags) << 96 | u128::from(len) << 64 | u128::from(address);
        self.put(table + u64::from(index) * descriptor::SIZE, &number.to_le_bytes());
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub(super) fn offer(&self, queue: u16, head: u16) {
        let mut places = lock(&self.places);
        let place = &mut places[usize::from(queue)];
        self.store(Self::ring(queue) + 4 + u64::from(place.available % place.size) * 2, head);
        place.available = place.available.wrapping_add(1);
        self.store(Self::ring(queue) + 2, place.available);
    }

    pub(super) fn kick(&self, queue: u16) {
        self.write(NOTIFY + u64::from(queue) * 4, 2, queue.into());
    }

    /// Has the device tell when it has given back the chain of an index (2.7.10, `used_event`).
    pub(super) fn want_told_at(&self, queue: u16, index: u16) {
        let size = lock(&self.places)[usize::from(queue)].size;
        self.store(Self::ring(queue) + 4 + 2 * u64::from(size), index);
    }

    /// How many chains have come back in all.
    pub(super) fn used_index(&self, queue: u16) -> u16 {
        self.load(Self::used(queue) + 2)
    }

    /// An entry of the device's ring: head and bytes written.
    pub(super) fn used_entry(&self, queue: u16, index: u16) -> (u32, u32) {
        let size = lock(&self.places)[usize::from(queue)].size;
        let at = Self::used(queue) + 4 + u64::from(index % size) * 8;
        (self.load(at), self.load(at + 4))
    }

    /// Makes a chain available and rings. Chains start at the descriptor of their available index, so that those of
    /// four buffers at most do not meet while four are out, or two in a queue of eight.
    pub(super) fn submit(&self, queue: u16, buffers: &[Buffer]) {
        let place = lock(&self.places)[usize::from(queue)];
        let first = place.available % (place.size / 4).clamp(1, 4) * 4;
        for (index, &(at, len, write)) in (first..).zip(buffers) {
            let more = usize::from(index - first) + 1 < buffers.len();
            let mut flags = if write { descriptor::WRITE } else { 0 };
            flags |= if more { descriptor::NEXT } else { 0 };
            self.describe(Self::table(queue), index, (at, len, flags, index + 1));
        }
        self.offer(queue, first);
        self.kick(queue);
    }

    /// How many bytes the device says it wrote to the next chain that it has given back, if there is one.
    pub(super) fn take(&self, queue: u16) -> Option<u32> {
        let next = lock(&self.places)[usize::from(queue)].used;
        if self.used_index(queue) == next {
            return None;
        }
        lock(&self.places)[usize::from(queue)].used = next.wrapping_add(1);
        Some(self.used_entry(queue, next).1)
    }

    /// Waits for the next chain to come back.
    pub(super) fn wait_for(&self, queue: u16) -> u32 {
        let mut written = None;
        self.wait("the chain", || {
            written = self.take(queue);
            written.is_some()
        });
        written.expect("the wait is over")
    }

    /// Waits for what another thread brings about.
    pub(super) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "{what} does not come; status {:#x}", self.status());
            std::thread::yield_now();
        }
    }

    /// That no device wrote where none may.
    pub(super) fn check_rom(&self) {
        let rom = self.get(ROM, ROM_SIZE as usize);
        assert!(rom.iter().all(|byte| *byte == ROM_BYTE), "a device wrote to ROM");
    }
}
