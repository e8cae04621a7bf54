//! A driver as a guest has one, and a device that is easy to look through.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec};

use crate::SystemBus;
use crate::device::lock;
use crate::pci::{PciBus, PciFunction};
use crate::testing::Bench;
use crate::virtio::spec::{NO_VECTOR, common, descriptor, feature, status};
use crate::virtio::{Chain, Kind, Port, VirtioConfig, VirtioDevice, VirtioPci, read_bytes};

pub(super) const RAM: u64 = 0x10_0000;
pub(super) const ROM: u64 = 0x20_0000;
/// Entries of each of the two queues.
pub(super) const SIZE: u16 = 8;
const TABLES: u64 = 0x1000;
const QUEUE: u64 = 0x1000;
const ALL: u64 = feature::CORE;

/// Gives back what it can read as what it can write; or holds chains until told.
#[derive(Debug, Default)]
pub(super) struct Echo {
    port: OnceLock<Port>,
    pub(super) holds: AtomicBool,
    /// Whether it keeps what it holds when it is stopped, as a disk does with requests on their way.
    pub(super) busy: AtomicBool,
    pub(super) held: Mutex<Vec<Chain>>,
    pub(super) activated: Mutex<Vec<u64>>,
}

impl Echo {
    pub(super) fn port(&self) -> &Port {
        self.port.get().unwrap()
    }

    pub(super) fn echo(chain: Chain) {
        let mut bytes = vec![0; chain.readable_len().min(4096) as usize];
        let n = chain.read(0, &mut bytes);
        let written = chain.write(0, &bytes[..n]);
        chain.complete(written as u32);
    }
}

impl VirtioDevice for Echo {
    fn kind(&self) -> Kind {
        Kind { id: 42, class: 0xff_0000, features: 1, queues: vec![SIZE; 2] }
    }

    fn connect(&self, port: Port) {
        self.port.set(port).unwrap();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(b"echo", offset, data);
    }

    fn activate(&self, features: u64) {
        lock(&self.activated).push(features);
    }

    fn notify(&self, queue: u16) {
        while let Some(chain) = self.port().take(queue) {
            if self.holds.load(Ordering::Relaxed) {
                lock(&self.held).push(chain);
            } else {
                Self::echo(chain);
            }
        }
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        if self.busy.load(Ordering::Relaxed) {
            return;
        }
        let held = std::mem::take(&mut *lock(&self.held));
        let (go, stay): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|chain| queue.is_none_or(|queue| chain.queue() == queue));
        *lock(&self.held) = stay;
        for chain in go.into_iter().rev() {
            if saving {
                assert!(chain.put_back());
            }
        }
    }
}

pub(super) struct Driver {
    pub(super) bench: Bench,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) echo: Arc<Echo>,
    pub(super) function: Arc<VirtioPci>,
    pub(super) messages: Arc<Mutex<Vec<String>>>,
    _pci: Arc<PciBus>,
    bus: Arc<SystemBus>,
    available: [u16; 2],
}

impl Driver {
    /// A device as after power on, plugged in and bus master.
    pub(super) fn new() -> Self {
        let ram = RegionSpec { range: GuestRange::new(0, RAM), kind: RegionKind::Ram };
        let rom = RegionSpec { range: GuestRange::new(ROM, 0x1000), kind: RegionKind::Rom };
        let memory = Arc::new(GuestMemory::new(&[ram, rom]).unwrap());
        let bench = Bench::new();
        let echo = Arc::new(Echo::default());
        let messages: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = Arc::clone(&messages);
        let reporter = Arc::new(move |text| lock(&told).push(text));
        let config = VirtioConfig { name: "virtio-echo.0".to_owned(), reporter };
        let interrupts = Arc::clone(&bench.wires) as _;
        let function = VirtioPci::new(config, Arc::clone(&echo) as _, Arc::clone(&memory), &interrupts);
        let bus = Arc::new(SystemBus::new([]).unwrap());
        let pci = PciBus::new();
        pci.connect(&bus, &interrupts);
        pci.plug_next(Arc::clone(&function) as _).unwrap();
        function.config_write(4, &6_u16.to_le_bytes());
        Self { bench, memory, echo, function, messages, _pci: pci, bus, available: [0; 2] }
    }

    /// The same with a driver that is ready, both queues and all features.
    pub(super) fn ready() -> Self {
        let mut driver = Self::new();
        driver.start(ALL);
        driver
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

    pub(super) fn set_features(&self, features: u64) {
        for half in 0..2 {
            self.write(common::DRIVER_FEATURE_SELECT, 4, half);
            self.write(common::DRIVER_FEATURE, 4, features >> (half * 32) & 0xffff_ffff);
        }
    }

    /// From reset to ready (3.1.1).
    pub(super) fn start(&mut self, features: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.set_features(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert!(self.status() & status::FEATURES_OK != 0);
        (0..2).for_each(|queue| self.enable(queue));
        self.set_status(self.status() | status::DRIVER_OK);
    }

    pub(super) fn table(queue: u16) -> u64 {
        TABLES + u64::from(queue) * QUEUE
    }

    pub(super) fn ring(queue: u16) -> u64 {
        Self::table(queue) + 0x400
    }

    pub(super) fn used(queue: u16) -> u64 {
        Self::table(queue) + 0x800
    }

    pub(super) fn enable(&mut self, queue: u16) {
        self.memory.fill(GuestAddress(Self::table(queue)), 0, QUEUE).unwrap();
        self.write(common::QUEUE_SELECT, 2, queue.into());
        self.write(common::QUEUE_DESCRIPTORS, 8, Self::table(queue));
        self.write(common::QUEUE_DRIVER, 4, Self::ring(queue));
        self.write(common::QUEUE_DRIVER + 4, 4, 0);
        self.write(common::QUEUE_DEVICE, 8, Self::used(queue));
        self.write(common::QUEUE_ENABLE, 2, 1);
        self.available[usize::from(queue)] = 0;
    }

    pub(super) fn put(&self, at: u64, value: u16) {
        self.memory.write(GuestAddress(at), value).unwrap();
    }

    pub(super) fn get(&self, at: u64) -> u16 {
        self.memory.read(GuestAddress(at)).unwrap()
    }

    /// Writes a descriptor into a table.
    pub(super) fn describe(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let at = GuestAddress(table + u64::from(index) * descriptor::SIZE);
        let bytes =
            u128::from(next) << 112 | u128::from(flags) << 96 | u128::from(len) << 64 | u128::from(address);
        self.memory.write_bytes(at, &bytes.to_le_bytes()).unwrap();
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub(super) fn offer(&mut self, queue: u16, head: u16) {
        let index = &mut self.available[usize::from(queue)];
        let at = Self::ring(queue) + 4 + u64::from(*index % SIZE) * 2;
        *index = index.wrapping_add(1);
        let index = *index;
        self.put(at, head);
        self.put(Self::ring(queue) + 2, index);
    }

    pub(super) fn kick(&self, queue: u16) {
        self.write(0x3000 + u64::from(queue) * 4, 2, queue.into());
    }

    /// Chains that came back.
    pub(super) fn used_index(&self, queue: u16) -> u16 {
        self.get(Self::used(queue) + 2)
    }

    /// An entry of the used ring: head and bytes written.
    pub(super) fn used_entry(&self, queue: u16, index: u16) -> (u32, u32) {
        let at = Self::used(queue) + 4 + u64::from(index % SIZE) * 8;
        let read = |at| self.memory.read::<u32>(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }

    /// Sends text through a queue with a chain from `head` on, and gives what came back.
    pub(super) fn send(&mut self, queue: u16, head: u16, text: &str) -> String {
        let before = self.used_index(queue);
        self.memory.write_bytes(GuestAddress(0x8000), text.as_bytes()).unwrap();
        let table = Self::table(queue);
        self.describe(table, head, (0x8000, text.len() as u32, descriptor::NEXT, head + 1));
        self.describe(table, head + 1, (0x9000, 0x100, descriptor::WRITE, 0));
        self.offer(queue, head);
        self.kick(queue);
        assert_eq!(self.used_index(queue), before.wrapping_add(1), "{:?}", lock(&self.messages));
        let (id, len) = self.used_entry(queue, before);
        assert_eq!(id, u32::from(head));
        let mut bytes = vec![0; len as usize];
        self.memory.read_bytes(GuestAddress(0x9000), &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Switches MSI-X on, with vector `v` leading to data `v`.
    pub(super) fn use_messages(&self) {
        use ringfence_engine::Bus;
        let mut base = [0; 4];
        self.function.config_read(0x20, &mut base);
        let base = u64::from(u32::from_le_bytes(base) & !0xf);
        for vector in 0..3_u32 {
            for (offset, word) in [(0, 0xfee0_0000), (4, 0), (8, vector), (12, 0)] {
                let at = GuestAddress(base + u64::from(vector) * 16 + offset);
                self.bus.memory_write(at, &u32::to_le_bytes(word));
            }
        }
        self.function.config_write(0x48 + 2, &0x8000_u16.to_le_bytes());
        self.write(common::CONFIG_VECTOR, 2, 0);
        for queue in 0..2 {
            self.write(common::QUEUE_SELECT, 2, queue);
            self.write(common::QUEUE_VECTOR, 2, queue + 1);
            assert_ne!(self.read(common::QUEUE_VECTOR, 2) as u16, NO_VECTOR);
        }
    }

    /// The device is broken, and told so once; a reset makes it whole.
    pub(super) fn assert_broken(&mut self, message: &str) {
        assert!(self.status() & status::NEEDS_RESET != 0, "not broken: {message}");
        let messages = lock(&self.messages).clone();
        assert!(messages.len() == 1 && messages[0].contains(message), "{message}: {messages:?}");
        let before = self.used_index(1);
        self.offer(1, 0);
        self.kick(1);
        assert_eq!(self.used_index(1), before, "a broken device does nothing");
        self.start(ALL);
        assert_eq!(self.send(0, 0, "whole again"), "whole again");
    }
}
