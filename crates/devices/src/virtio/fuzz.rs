//! A hostile driver made of bytes: the entry for a fuzzer.
//!
//! Bytes become register and configuration accesses and, so that the depths are reached, chains of descriptors on queues
//! that work. What must hold is asserted: nothing panics or hangs, memory that devices may not write to stays as it was,
//! saved state loads again, the user is told at most once, and after a reset the device works.

mod helped;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringfence_disk::{DiskOptions, DiskSpec, IoEngine, open};
use ringfence_engine::{InterruptSink, Stateful};

use super::SharedDevice;
use super::balloon::Balloon;
use super::blk::{Blk, BlkConfig};
use super::guest::{DATA, Guest, QUEUES, RAM, ROM};
use super::rng::Rng;
use super::spec::{common, descriptor, feature, status};
use crate::Device;
use crate::device::lock;
use crate::pci::PciFunction;

/// Device types of network cards and of consoles.
const NET: u16 = 1;
const CONSOLE: u16 = 3;
/// Those with a process or a program behind them: these, sockets and file systems.
const HELPED: [u16; 4] = [NET, CONSOLE, 19, 26];

/// The devices by the first byte of an input.
const DEVICES: [&str; 8] = ["rng", "balloon", "blk", "blk read-only", "share", "vsock", "console", "net"];

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
        let page = DATA + (u64::from(kind >> 4) << 12);
        match kind & 15 {
            0..=11 => page | fine << 4,
            12 => QUEUES + fine * 16,
            13 => ROM + (fine & 1) * 0x1000,
            14 => RAM - 8 + (fine & 15),
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

/// The same with one of the devices, chosen by the first byte: entropy, a balloon, a disk in the file `image` of some whole
/// sectors, which is written to, a shared folder, vsock or a port in the folder `place`, or a network card on a wire that gives back
/// what it is given. Tells which device it was, and how many of the driver's chains came back.
///
/// # Panics
/// If file or folder cannot be used, or when something that must hold does not.
pub fn run_any(image: &Path, place: &Path, input: &[u8]) -> (&'static str, u64) {
    let Some((kind, input)) = input.split_first() else { return (DEVICES[0], 0) };
    let kind = usize::from(*kind) % DEVICES.len();
    let given_back = match kind {
        0 => run(Arc::new(Rng::default()), input),
        1 => run(Balloon::new(1 << 20), input),
        4 => helped::share(&place.join("shared"), input),
        5 => helped::vsock(&place.join("socket"), input),
        6 => helped::console(&place.join("port"), input),
        7 => helped::net(input),
        kind => {
            let mut spec = DiskSpec { engine: IoEngine::Sync, ..DiskSpec::new(image) };
            spec.read_only = kind == 3;
            let disk = open(&DiskOptions::new(spec)).expect("the image can be opened");
            let size = disk.info().size;
            let config = BlkConfig { disk, block_size: None, serial: "fuzz".to_owned(), queues: 2 };
            let given_back = run(Blk::new(config).expect("the file has a block"), input);
            let now = std::fs::metadata(image).expect("the file is there").len();
            assert_eq!(now, size, "the file changed its size");
            given_back
        }
    };
    (DEVICES[kind], given_back)
}

/// Lets a driver that does what `input` says loose on a device, which answers on the caller's thread or soon. Tells how many chains
/// the device has given back: read and written as they are by its own access to memory.
pub fn run(device: SharedDevice, input: &[u8]) -> u64 {
    let guest = Guest::new(device, &(Arc::new(Sink) as _));
    let mut bytes = Bytes(input.iter());
    start(&guest);
    while !bytes.0.as_slice().is_empty() {
        step(&guest, &mut bytes);
        // Most drivers would break the device at once, and then nothing more is reached.
        if guest.is_broken() && bytes.byte() & 3 != 0 {
            start(&guest);
        }
    }
    guest.function.quiesce();
    guest.check_rom();
    assert!(lock(&guest.told).len() <= 1, "the user was told again and again");
    guest.function.reset();
    start(&guest);
    assert!(guest.function.core.features & feature::VERSION_1 != 0);
    guest.function.core.given_back.load(Ordering::Relaxed)
}

/// Brings the device up from wherever it is, with all that it offers.
fn start(guest: &Guest) {
    guest.set_bus_master();
    guest.start(guest.function.core.features, guest.queues());
    let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(guest.status(), all);
}

/// One thing that a guest can do.
fn step(guest: &Guest, bytes: &mut Bytes<'_>) {
    let queue = u16::from(bytes.byte()) % guest.queues();
    match bytes.byte() % 14 {
        0..=5 => chain(guest, queue, bytes),
        6 => guest.write(
            u64::from(bytes.byte() & 0x3f),
            [1, 2, 4, 8][usize::from(bytes.byte() & 3)],
            bytes.word().into(),
        ),
        7 => guest.write(
            (bytes.half() & 0x3fff).into(),
            1 + usize::from(bytes.byte() & 7),
            bytes.word().into(),
        ),
        8 => {
            guest.read((bytes.half() & 0x3fff).into(), 8);
        }
        9 => {
            let (offset, value) = (u16::from(bytes.byte() & !3), bytes.word());
            guest.function.config_write(offset, &value.to_le_bytes());
            guest.function.config_read(offset, &mut [0; 4]);
        }
        10 => {
            // Garbage in a ring or table.
            let at = Guest::table(queue) + u64::from(bytes.half() & 0xffe);
            guest.store(at, bytes.half());
        }
        11 => {
            guest.function.quiesce();
            let saved = guest.function.save();
            guest.function.restore(&saved).expect("a state just saved loads");
            // Those with a process behind them go on at once with what is available.
            let again = guest.function.save();
            assert!(
                again == saved || HELPED.contains(&guest.function.device.kind().id),
                "{again:?} {saved:?}"
            );
        }
        12 => {
            guest.write(common::QUEUE_SELECT, 2, queue.into());
            guest.write(common::QUEUE_RESET, 2, 1);
            guest.enable(queue);
        }
        _ => match bytes.byte() & 1 {
            0 => start(guest),
            _ => guest.function.reset(),
        },
    }
}

/// A chain of some descriptors, perhaps with a table; made available and mostly told of.
fn chain(guest: &Guest, queue: u16, bytes: &mut Bytes<'_>) {
    let shape = bytes.byte();
    let count = 1 + u16::from(shape & 3);
    let table = if shape & 4 != 0 { DATA + 0x8000 } else { Guest::table(queue) };
    // What a request starts with, in one place for all; a network card's has its numbers nearer to each other.
    let mask = if guest.function.device.kind().id == NET { 0xf_000f } else { 0xf };
    for offset in (0..16).step_by(4) {
        let value = if shape & 8 != 0 { bytes.word() & mask } else { 0 };
        guest.store(DATA + offset, value);
    }
    let mut writes = false;
    for index in 0..count {
        let flags = match bytes.byte() {
            // What is to be written comes last, as a rule.
            byte @ 0..0xf0 => {
                writes |= byte & 1 != 0;
                u16::from(writes) * descriptor::WRITE
            }
            byte => u16::from(byte & 7),
        };
        let more = if index + 1 < count { descriptor::NEXT } else { 0 };
        let first = shape & 16 != 0 && index == 0;
        let (address, len) = if first { (DATA, 16) } else { (bytes.address(), bytes.len()) };
        guest.describe(table, index, (address, len, if first { more } else { flags | more }, index + 1));
    }
    if shape & 4 != 0 {
        let len = u32::from(count) * descriptor::SIZE as u32;
        guest.describe(Guest::table(queue), 0, (table, len, descriptor::INDIRECT, 0));
    }
    guest.offer(queue, 0);
    if shape & 0xe0 != 0 {
        guest.kick(queue);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn random_drivers_harm_nobody_and_have_every_device_work_on_their_memory() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 10).unwrap();
        let place = tempfile::tempdir().unwrap();
        let (mut random, mut sums) = (Random::new(11), Vec::new());
        for (kind, expected) in DEVICES.iter().enumerate() {
            let mut sum = 0;
            for _ in 0..25 {
                let mut input: Vec<u8> = (0..600).map(|_| random.next() as u8).collect();
                input[0] = kind as u8;
                let (device, given_back) = run_any(image.path(), place.path(), &input);
                assert_eq!(device, *expected);
                sum += given_back;
            }
            println!("{expected}: {sum} chains");
            sums.push(sum);
        }
        assert!(sums.iter().all(|sum| *sum >= 20), "{sums:?}");
    }
}
