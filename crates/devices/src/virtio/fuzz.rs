//! A hostile driver made of bytes: the entry for a fuzzer.
//!
//! Bytes become register and configuration accesses and, so that the depths are reached, chains of descriptors on queues
//! that work. What must hold is asserted: nothing panics or hangs, memory that devices may not write to stays as it was,
//! saved state loads again, the user is told at most once, and after a reset the device works.

mod helped;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ringfence_disk::{DiskOptions, DiskSpec, IoEngine, open};
use ringfence_engine::{InterruptSink, Stateful};
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec};

use super::balloon::Balloon;
use super::blk::{Blk, BlkConfig};
use super::rng::Rng;
use super::spec::{common, descriptor, feature, status};
use super::{SharedDevice, VirtioConfig, VirtioPci};
use crate::device::lock;
use crate::pci::{PciBus, PciFunction};
use crate::{Device, SystemBus};

const RAM: u64 = 0x4_0000;
const ROM: u64 = 0x8_0000;
/// Device types: consoles, sockets and file systems.
const HELPED: [u16; 3] = [3, 19, 26];
const ROM_BYTE: u8 = 0x5a;
/// Where the queues are, 4 KiB each: descriptors, at 0x400 the driver's ring, at 0x800 the device's.
const QUEUES: u64 = 0x1000;
/// Entries that queues get here; the largest count whose parts fit those offsets.
const SIZE: u16 = 16;
/// Tables of indirect descriptors and data are from here on.
const DATA: u64 = 0x1_0000;

struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn word(&mut self) -> u32 {
        u32::from(self.half()) << 16 | u32::from(self.half())
    }

    /// An address of one of the kinds that matter.
    fn address(&mut self) -> u64 {
        let (kind, fine) = (self.byte(), u64::from(self.byte()));
        let page = DATA + (u64::from(kind >> 3) << 12);
        match kind & 7 {
            0..=3 => page | fine << 4,
            4 => QUEUES + fine * 16,
            5 => ROM + (fine & 1) * 0x1000,
            6 => RAM - 8 + (fine & 15),
            _ => u64::MAX - (fine << 4 | 7),
        }
    }

    fn len(&mut self) -> u32 {
        match self.byte() {
            byte @ 0..0xc0 => u32::from(byte),
            0xc0..0xe0 => 512,
            0xe0..0xf0 => 4096,
            0xf0..0xf8 => 0,
            _ => u32::MAX - u32::from(self.byte()),
        }
    }
}

/// Takes interrupts and checks them.
struct Sink;

impl InterruptSink for Sink {
    fn set_gsi(&self, gsi: u32, _: bool) {
        assert!((16..20).contains(&gsi));
    }

    fn send_msi(&self, address: u64, _: u32) {
        assert_eq!(address >> 20, 0xfee);
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    function: Arc<VirtioPci>,
    available: Vec<u16>,
    told: Arc<AtomicU32>,
    _bus: (Arc<PciBus>, Arc<SystemBus>),
}

/// The same with one of the devices, chosen by the first byte: entropy, a balloon, a disk in the file `image` of some whole
/// sectors, which is written to, or a shared folder, vsock or a port in the folder `place`.
///
/// # Panics
/// If file or folder cannot be used, or when something that must hold does not.
pub fn run_any(image: &Path, place: &Path, input: &[u8]) {
    let Some((kind, input)) = input.split_first() else { return };
    match kind % 7 {
        0 => run(Arc::new(Rng::default()), input),
        1 => run(Balloon::new(1 << 20), input),
        4 => helped::share(&place.join("shared"), input),
        5 => helped::vsock(&place.join("socket"), input),
        6 => helped::console(&place.join("port"), input),
        kind => {
            let mut spec = DiskSpec { engine: IoEngine::Sync, ..DiskSpec::new(image) };
            spec.read_only = kind == 3;
            let disk = open(&DiskOptions::new(spec)).expect("the image can be opened");
            let size = disk.info().size;
            let config = BlkConfig { disk, block_size: None, serial: "fuzz".to_owned(), queues: 2 };
            run(Blk::new(config).expect("the file has a block"), input);
            let now = std::fs::metadata(image).expect("the file is there").len();
            assert_eq!(now, size, "the file changed its size");
        }
    }
}

/// Lets a driver that does what `input` says loose on a device, which answers on the caller's thread or soon.
pub fn run(device: SharedDevice, input: &[u8]) {
    let mut guest = Guest::new(device);
    let mut bytes = Bytes(input.iter());
    guest.start();
    while !bytes.0.as_slice().is_empty() {
        guest.step(&mut bytes);
    }
    guest.check();
}

impl Guest {
    fn new(device: SharedDevice) -> Self {
        let ram = RegionSpec { range: GuestRange::new(0, RAM), kind: RegionKind::Ram };
        let rom = RegionSpec { range: GuestRange::new(ROM, 0x2000), kind: RegionKind::Rom };
        let memory = Arc::new(GuestMemory::new(&[ram, rom]).expect("the host has some memory"));
        memory.fill(GuestAddress(ROM), ROM_BYTE, 0x2000).expect("the ROM is there");
        let told: Arc<AtomicU32> = Arc::default();
        let count = Arc::clone(&told);
        let reporter = Arc::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let config = VirtioConfig { name: "fuzz".to_owned(), reporter };
        let interrupts = Arc::new(Sink) as Arc<dyn InterruptSink>;
        let function = VirtioPci::new(config, device, Arc::clone(&memory), &interrupts);
        let bus = Arc::new(SystemBus::new([]).expect("an empty bus"));
        let pci = PciBus::new();
        pci.connect(&bus, &interrupts);
        pci.plug_next(Arc::clone(&function) as _).expect("the bus is empty");
        let queues = lock(&function.core.state).queues.len();
        Self { memory, function, available: vec![0; queues], told, _bus: (pci, bus) }
    }

    fn write(&self, offset: u64, len: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.function.write_registers(offset, bytes.get(..len).unwrap_or_default());
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.function.read_registers(common::STATUS, &mut byte);
        byte[0]
    }

    /// Brings the device up from wherever it is.
    fn start(&mut self) {
        self.function.config_write(4, &6_u16.to_le_bytes());
        self.write(common::STATUS, 1, 0);
        self.function.quiesce();
        assert_eq!(self.status(), 0, "nothing is in flight");
        let features = self.function.core.features;
        self.write(common::STATUS, 1, (status::ACKNOWLEDGE | status::DRIVER).into());
        for half in 0..2 {
            self.write(common::DRIVER_FEATURE_SELECT, 4, half);
            self.write(common::DRIVER_FEATURE, 4, features >> (half * 32) & 0xffff_ffff);
        }
        self.write(common::STATUS, 1, status::FEATURES_OK.into());
        for queue in 0..self.available.len() as u16 {
            self.enable(queue);
        }
        self.write(common::STATUS, 1, status::DRIVER_OK.into());
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(self.status(), all);
    }

    fn place(queue: u16) -> u64 {
        QUEUES + u64::from(queue % 8) * 0x1000
    }

    fn enable(&mut self, queue: u16) {
        let base = Self::place(queue);
        self.memory.fill(GuestAddress(base), 0, 0x1000).expect("queues are in RAM");
        self.write(common::QUEUE_SELECT, 2, queue.into());
        self.write(common::QUEUE_SIZE, 2, SIZE.into());
        self.write(common::QUEUE_DESCRIPTORS, 8, base);
        self.write(common::QUEUE_DRIVER, 8, base + 0x400);
        self.write(common::QUEUE_DEVICE, 8, base + 0x800);
        self.write(common::QUEUE_ENABLE, 2, 1);
        if let Some(available) = self.available.get_mut(usize::from(queue)) {
            *available = 0;
        }
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let queue = u16::from(bytes.byte()) % self.available.len() as u16;
        match bytes.byte() % 14 {
            0..=5 => self.chain(queue, bytes),
            6 => self.write(
                u64::from(bytes.byte() & 0x3f),
                [1, 2, 4, 8][usize::from(bytes.byte() & 3)],
                bytes.word().into(),
            ),
            7 => self.write(
                (bytes.half() & 0x3fff).into(),
                1 + usize::from(bytes.byte() & 7),
                bytes.word().into(),
            ),
            8 => {
                let mut data = [0; 8];
                self.function.read_registers((bytes.half() & 0x3fff).into(), &mut data);
            }
            9 => {
                let (offset, value) = (u16::from(bytes.byte() & !3), bytes.word());
                self.function.config_write(offset, &value.to_le_bytes());
                self.function.config_read(offset, &mut [0; 4]);
            }
            10 => {
                // Garbage in a ring or table.
                let at = GuestAddress(Self::place(queue) + u64::from(bytes.half() & 0xffe));
                self.memory.write(at, bytes.half()).expect("queues are in RAM");
            }
            11 => {
                self.function.quiesce();
                let saved = self.function.save();
                self.function.restore(&saved).expect("a state just saved loads");
                // Those with a process behind them go on at once with what is available.
                let again = self.function.save();
                assert!(
                    again == saved || HELPED.contains(&self.function.device.kind().id),
                    "{again:?} {saved:?}"
                );
            }
            12 => {
                self.write(common::QUEUE_SELECT, 2, queue.into());
                self.write(common::QUEUE_RESET, 2, 1);
                self.enable(queue);
            }
            _ => match bytes.byte() & 1 {
                0 => self.start(),
                _ => self.function.reset(),
            },
        }
    }

    /// A chain of some descriptors, perhaps with a table; made available and mostly told of.
    fn chain(&mut self, queue: u16, bytes: &mut Bytes<'_>) {
        let shape = bytes.byte();
        let count = 1 + u16::from(shape & 3);
        let table = if shape & 4 != 0 { DATA + 0x8000 } else { Self::place(queue) };
        // What a request starts with, in one place for all.
        for offset in (0..16).step_by(4) {
            let value = if shape & 8 != 0 { bytes.word() & 0xf } else { 0 };
            self.memory.write(GuestAddress(DATA + offset), value).expect("it is in RAM");
        }
        let describe = |table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)| {
            let number = u128::from(next) << 112
                | u128::from(flags) << 96
                | u128::from(len) << 64
                | u128::from(address);
            let at = GuestAddress(table + u64::from(index) * descriptor::SIZE);
            self.memory.write_bytes(at, &number.to_le_bytes()).expect("tables are in RAM");
        };
        for index in 0..count {
            let flags = match bytes.byte() {
                byte @ 0..0xf0 => u16::from(byte & 1) * descriptor::WRITE,
                byte => u16::from(byte & 7),
            };
            let more = if index + 1 < count { descriptor::NEXT } else { 0 };
            let first = shape & 16 != 0 && index == 0;
            let (address, len) = if first { (DATA, 16) } else { (bytes.address(), bytes.len()) };
            describe(table, index, (address, len, if first { more } else { flags | more }, index + 1));
        }
        if shape & 4 != 0 {
            let len = u32::from(count) * descriptor::SIZE as u32;
            describe(Self::place(queue), 0, (table, len, descriptor::INDIRECT, 0));
        }
        let Some(available) = self.available.get_mut(usize::from(queue)) else { return };
        let ring = Self::place(queue) + 0x400;
        let entry = GuestAddress(ring + 4 + u64::from(*available % SIZE) * 2);
        *available = available.wrapping_add(1);
        self.memory.write(entry, 0_u16).expect("queues are in RAM");
        self.memory.write(GuestAddress(ring + 2), *available).expect("queues are in RAM");
        if shape & 0xe0 != 0 {
            self.write(0x3000 + u64::from(queue) * 4, 2, queue.into());
        }
    }

    fn check(&mut self) {
        self.function.quiesce();
        let mut rom = vec![0; 0x2000];
        self.memory.read_bytes(GuestAddress(ROM), &mut rom).expect("the ROM is there");
        assert!(rom.iter().all(|byte| *byte == ROM_BYTE), "a device wrote to ROM");
        assert!(self.told.load(Ordering::Relaxed) <= 1, "the user was told again and again");
        self.function.reset();
        self.start();
        assert!(self.function.core.features & feature::VERSION_1 != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn random_drivers_harm_nobody() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 10).unwrap();
        let place = tempfile::tempdir().unwrap();
        let mut random = Random::new(11);
        for _ in 0..200 {
            let input: Vec<u8> = (0..600).map(|_| random.next() as u8).collect();
            run_any(image.path(), place.path(), &input);
        }
    }
}
