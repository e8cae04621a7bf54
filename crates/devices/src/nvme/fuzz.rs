//! A hostile guest made of bytes: the entry for a fuzzer.
//!
//! Bytes become register, configuration and memory accesses and, so that the depths are reached, commands on
//! queues that work. What must hold is asserted: nothing panics or hangs, memory that devices may not write to
//! stays as it was, interrupts go where interrupts can go, the file keeps its size, saved state loads again, and
//! after a reset the controller works.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ringfence_disk::{BlockDevice, DiskInfo, DiskOptions, DiskSpec, IoEngine, Operation, Request, open};
use ringfence_engine::{Bus, InterruptSink, Stateful};
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec};

use super::spec::{COMMAND_SIZE, COMPLETION_SIZE, admin, cc, csts, io, register};
use super::{Controller, NamespaceConfig, NvmeConfig};
use crate::pci::{PciBus, PciFunction};
use crate::{Device, SystemBus};

const RAM: u64 = 0x4_0000;
const ROM: u64 = 0x8_0000;
const ROM_BYTE: u8 = 0x5a;
/// Where the queues are; data and PRP lists share the rest with them.
const ADMIN_SQ: u64 = 0x1000;
const ADMIN_CQ: u64 = 0x2000;
const IO_QUEUES: u64 = 0x4000;
const QUEUES: u16 = 3;

struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// An address of one of the kinds that matter.
    fn address(&mut self) -> u64 {
        let (kind, fine) = (self.byte(), u64::from(self.byte()));
        let page = u64::from(kind >> 3) << 12;
        match kind & 7 {
            0..=2 => page,
            3 => page | fine << 3,
            4 => page | fine << 4 | 0xff0,
            5 => ROM + (fine & 1) * 0x1000,
            6 => RAM - 8 + fine,
            _ => u64::MAX - (fine << 9 | 7) + 7 * (fine & 1),
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
        assert!((0xfee0_0000..0xfef0_0000).contains(&address));
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    controller: Arc<Controller>,
    /// Where the registers and the MSI-X table are, as long as the guest has not moved them.
    bus: Arc<SystemBus>,
    _pci: Arc<PciBus>,
    /// Tails as the guest believes them to be.
    tails: [u32; QUEUES as usize + 1],
}

/// A disk that counts the transfers between it and the guest's memory.
#[derive(Debug)]
struct Counted {
    disk: Arc<dyn BlockDevice>,
    transfers: AtomicU64,
}

impl BlockDevice for Counted {
    fn info(&self) -> DiskInfo {
        self.disk.info()
    }

    fn submit(&self, request: Request) {
        if matches!(request.operation, Operation::Read { .. } | Operation::Write { .. }) {
            self.transfers.fetch_add(1, Ordering::Relaxed);
        }
        self.disk.submit(request);
    }

    fn kick(&self) {
        self.disk.kick();
    }
}

/// Runs the bytes against a controller whose first namespace is the file `image`, some whole blocks of 4096 bytes,
/// which is written to. Tells how many transfers there were between the file and the guest's memory.
///
/// # Panics
/// If the file cannot be used, or when something that must hold does not.
pub fn run(image: &Path, bytes: &[u8]) -> u64 {
    let spec = DiskSpec { engine: IoEngine::Sync, ..DiskSpec::new(image) };
    let disk = open(&DiskOptions::new(spec)).expect("the image can be opened");
    let size = disk.info().size;
    let disk = Arc::new(Counted { disk, transfers: AtomicU64::new(0) });
    let region = |start, len, kind| RegionSpec { range: GuestRange::new(start, len), kind };
    let memory = GuestMemory::new(&[region(0, RAM, RegionKind::Ram), region(ROM, 0x2000, RegionKind::Rom)]);
    let memory = Arc::new(memory.expect("a little memory can be had"));
    memory.fill(GuestAddress(ROM), ROM_BYTE, 0x2000).expect("the ROM is there");
    let namespace = |block_size| NamespaceConfig {
        disk: Arc::clone(&disk) as _,
        block_size: Some(block_size),
        uuid: [block_size as u8; 16],
    };
    let config = NvmeConfig {
        name: "nvme.fuzz".into(),
        serial: "fuzz".into(),
        uuid: [1; 16],
        queues: QUEUES,
        namespaces: vec![namespace(512), namespace(4096)],
    };
    let interrupts = Arc::new(Sink) as Arc<dyn InterruptSink>;
    let controller = Controller::new(config, Arc::clone(&memory), &interrupts).expect("the file has a block");
    let (pci, bus) = (PciBus::new(), Arc::new(SystemBus::new([]).expect("an empty bus")));
    pci.connect(&bus, &interrupts);
    pci.plug_next(Arc::clone(&controller) as _).expect("there is room on the bus");
    let mut guest = Guest { memory, controller, bus, _pci: pci, tails: [0; QUEUES as usize + 1] };
    let mut bytes = Bytes(bytes.iter());
    while !bytes.0.as_slice().is_empty() {
        guest.step(&mut bytes);
    }
    guest.check(size, image);
    disk.transfers.load(Ordering::Relaxed)
}

impl Guest {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.controller.read_registers(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.controller.write_registers(offset, &value.to_le_bytes());
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        match bytes.byte() % 17 {
            0 => self.controller.write_registers(
                u64::from(bytes.word() & 0x1fff),
                &bytes.word().to_le_bytes()[..1 + usize::from(bytes.byte() & 3)],
            ),
            1 => self.write(u64::from(bytes.byte() & 0x3c), bytes.word()),
            2 => {
                let (offset, value) = (u16::from(bytes.byte()), bytes.word());
                self.controller.config_write(offset & !3, &value.to_le_bytes());
            }
            3 => self.enable(),
            4 => self.create_queues(bytes),
            5 => {
                let opcode = match bytes.byte() {
                    byte @ 0..0x80 => admin::ALL[usize::from(byte) % admin::ALL.len()],
                    byte => byte,
                };
                self.command(0, opcode, bytes);
            }
            6..=9 => {
                let opcode = match bytes.byte() {
                    byte @ 0..0xe0 => io::ALL[usize::from(byte) % io::ALL.len()].0,
                    byte => byte,
                };
                let queue = 1 + bytes.byte() % QUEUES as u8;
                self.command(queue.into(), opcode, bytes);
            }
            10 => {
                // Usually into a list.
                let at = bytes.address();
                for index in 0..u64::from(bytes.byte() & 31) {
                    let at = GuestAddress(at.wrapping_add(index * 8) & !7);
                    if at.0 < RAM - 8 {
                        let value = bytes.address();
                        self.memory.write(at, value).expect("it is in RAM");
                    }
                }
            }
            11 => {
                // Takes what is in a completion queue.
                let queue = bytes.byte() % (QUEUES as u8 + 1);
                self.write(0x1004 + u64::from(queue) * 8, u32::from(bytes.byte()));
            }
            12 => self.write(0x1000 + u64::from(bytes.byte()) * 4, bytes.word()),
            13 => {
                self.controller.quiesce();
                let saved = self.controller.save();
                self.controller.restore(&saved).expect("a state just saved loads");
                assert_eq!(self.controller.save(), saved);
            }
            14 => match bytes.byte() % 3 {
                0 => self.write(register::CC, 0),
                1 => self.write(register::CC, self.read(register::CC) | 1 << 14),
                _ => self.controller.reset(),
            },
            15 => self.messages(bytes),
            _ => {
                for offset in (0..0x40).step_by(4) {
                    self.read(offset);
                }
                self.controller.config_read(u16::from(bytes.byte() & !3), &mut [0; 4]);
            }
        }
    }

    /// Garbage for the MSI-X table, or an entry that works; then MSI-X as the guest may like it.
    fn messages(&mut self, bytes: &mut Bytes<'_>) {
        /// Offsets in configuration space: the table's base address register, the MSI-X capability.
        const TABLE_BAR: u16 = 0x20;
        const MSIX: u16 = 0x48;
        let mut table = [0; 8];
        self.controller.config_read(TABLE_BAR, &mut table[..4]);
        self.controller.config_read(TABLE_BAR + 4, &mut table[4..]);
        let table = u64::from_le_bytes(table) & !0xf;
        let at = |offset: u64| GuestAddress(table.wrapping_add(offset));
        match bytes.byte() & 3 {
            0 => {
                let (offset, len) = (bytes.word() & 0xfff, 1 + usize::from(bytes.byte() & 7));
                let value = u64::from(bytes.word()) << 32 | u64::from(bytes.word());
                self.bus.memory_write(at(offset.into()), &value.to_le_bytes()[..len]);
            }
            1 => {
                let entry = u64::from(bytes.byte() % 8) * 16;
                let words = [0xfee0_0000 | bytes.word() & 0xf_ffff, 0, bytes.word(), bytes.word() & 1];
                for (word, offset) in words.iter().zip((entry..).step_by(4)) {
                    self.bus.memory_write(at(offset), &word.to_le_bytes());
                }
            }
            2 => self.controller.config_write(MSIX + 2, &(u16::from(bytes.byte()) << 8).to_le_bytes()),
            _ => self.bus.memory_read(at(u64::from(bytes.word() & 0xfff)), &mut [0; 8]),
        }
    }

    /// Brings the controller up from wherever it is.
    fn enable(&mut self) {
        self.controller.config_write(4, &6_u16.to_le_bytes());
        self.write(register::CC, 0);
        assert_eq!(self.read(register::CSTS) & csts::READY, 0, "nothing is in flight with this engine");
        self.write(register::AQA, 0x000f_000f);
        for (register, base) in [(register::ASQ, ADMIN_SQ), (register::ACQ, ADMIN_CQ)] {
            self.controller.write_registers(register, &base.to_le_bytes());
        }
        self.write(register::CC, cc::ENABLE | cc::ENTRY_SIZES_KNOWN);
        assert_eq!(self.read(register::CSTS) & (csts::READY | csts::FATAL), csts::READY);
        self.tails = [0; QUEUES as usize + 1];
    }

    fn create_queues(&mut self, bytes: &mut Bytes<'_>) {
        let size = 2 + u32::from(bytes.byte() % 31);
        for queue in 1..=u32::from(QUEUES) {
            let base = IO_QUEUES + u64::from(queue) * 0x2000;
            let shape = queue | (size - 1) << 16;
            let words = |base: u64, flags| [base as u32, 0, 0, 0, shape, flags];
            self.submit(0, admin::CREATE_CQ, 0, words(base, 3 | queue << 16));
            self.submit(0, admin::CREATE_SQ, 0, words(base + 0x1000, 1 | queue << 16));
            if let Some(tail) = self.tails.get_mut(queue as usize) {
                *tail = 0;
            }
        }
    }

    fn command(&mut self, queue: u16, opcode: u8, bytes: &mut Bytes<'_>) {
        let namespace = match bytes.byte() {
            byte @ 0..0xf0 => 1 + u32::from(byte & 1),
            byte => [0, 3, u32::MAX - 1, u32::MAX][usize::from(byte & 3)],
        };
        let (prp1, prp2) = (bytes.address(), bytes.address());
        let words = match bytes.byte() {
            // Blocks that there are.
            0..0xc0 => [u32::from(bytes.byte()), 0, u32::from(bytes.byte()) | bytes.word() & 0xff00_0000, 0],
            _ => [bytes.word(), bytes.word(), bytes.word(), bytes.word()],
        };
        let data = [prp1 as u32, (prp1 >> 32) as u32, prp2 as u32, (prp2 >> 32) as u32];
        self.submit(queue, opcode, namespace, data.into_iter().chain(words));
    }

    /// Writes a command where the guest believes the tail to be, and rings.
    fn submit(&mut self, queue: u16, opcode: u8, namespace: u32, words: impl IntoIterator<Item = u32>) {
        let Some(tail) = self.tails.get_mut(usize::from(queue)) else { return };
        let base = if queue == 0 { ADMIN_SQ } else { IO_QUEUES + u64::from(queue) * 0x2000 + 0x1000 };
        let at = base + u64::from(*tail) * COMMAND_SIZE;
        let head = [u32::from(opcode) | *tail << 16, namespace, 0, 0, 0, 0];
        for (word, offset) in head.into_iter().chain(words).zip((0..COMMAND_SIZE).step_by(4)) {
            self.memory.write(GuestAddress(at + offset), word).expect("queues are in RAM");
        }
        *tail = (*tail + 1) % 16;
        let tail = *tail;
        self.write(0x1000 + u64::from(queue) * 8, tail);
        // Takes the completions of all before it, as far as they are there.
        if tail & 3 == 0 {
            self.write(0x1004 + u64::from(queue) * 8, tail);
        }
    }

    fn check(&mut self, size: u64, image: &Path) {
        self.controller.quiesce();
        let mut rom = vec![0; 0x2000];
        self.memory.read_bytes(GuestAddress(ROM), &mut rom).expect("the ROM is there");
        assert!(rom.iter().all(|byte| *byte == ROM_BYTE), "a device wrote to ROM");
        let now = std::fs::metadata(image).expect("the file is there").len();
        assert_eq!(now, size, "the file changed its size");
        self.controller.reset();
        self.enable();
        self.memory.fill(GuestAddress(ADMIN_CQ), 0, COMPLETION_SIZE).expect("the queue is in RAM");
        self.submit(0, admin::IDENTIFY, 0, [0x3000, 0, 0, 0, 1, 0]);
        let status = self.memory.read::<u32>(GuestAddress(ADMIN_CQ + 12)).expect("the queue is in RAM");
        assert_eq!(status, 1 << 16, "identify works after a reset");
        let serial = self.memory.read::<u32>(GuestAddress(0x3004)).expect("the page is in RAM");
        assert_eq!(serial.to_le_bytes(), *b"fuzz");
    }
}
