//! A small driver: what an operating system does, through the system bus and guest memory.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringfence_disk::{BlockDevice, DiskInfo, DiskOptions, open};
use ringfence_engine::{Bus, InterruptSink};
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec};

use super::super::*;
use crate::SystemBus;
use crate::pci::{PciAddress, PciBus, PciHost};
use crate::platform::PCI_ECAM;
use crate::testing::{Bench, Held, Requests};

pub(super) const RAM: u64 = 16 << 20;
pub(super) const ROM: u64 = 32 << 20;
/// Where tests may put data.
pub(super) const DATA: u64 = 1 << 20;
/// Where PRP lists go.
pub(super) const LISTS: u64 = 0x8_0000;

const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
pub(super) const ENABLED: u32 = 0x0046_0001;

/// A command by its words.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cmd(pub(super) [u32; 16]);

impl Cmd {
    pub(super) fn new(opcode: u8, namespace: u32) -> Self {
        let mut words = [0; 16];
        (words[0], words[1]) = (u32::from(opcode), namespace);
        Self(words)
    }

    pub(super) fn prp(mut self, prp1: u64, prp2: u64) -> Self {
        let words = [prp1 as u32, (prp1 >> 32) as u32, prp2 as u32, (prp2 >> 32) as u32];
        self.0[6..10].copy_from_slice(&words);
        self
    }

    pub(super) fn cdw(mut self, words: &[u32]) -> Self {
        self.0[10..10 + words.len()].copy_from_slice(words);
        self
    }

    /// Starting block and number of blocks.
    pub(super) fn blocks(self, start: u64, count: u32) -> Self {
        self.cdw(&[start as u32, (start >> 32) as u32, count - 1])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cqe {
    pub(super) result: u32,
    pub(super) sq_head: u16,
    pub(super) queue: u16,
    pub(super) id: u16,
    /// Status without "do not retry".
    pub(super) status: u16,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    sq: u64,
    cq: u64,
    sq_size: u32,
    cq_size: u32,
    tail: u32,
    head: u32,
    phase: bool,
}

pub(super) struct Rig {
    pub(super) bench: Bench,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) bus: Arc<SystemBus>,
    _pci: Arc<PciBus>,
    pub(super) controller: Arc<Controller>,
    registers: u64,
    queues: Mutex<Vec<Queue>>,
    next_id: Mutex<u16>,
}

/// A disk in a file that vanishes.
pub(super) struct Image(tempfile::NamedTempFile);

impl Image {
    pub(super) fn new(len: usize) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pattern(len, 0)).unwrap();
        Self(file)
    }

    pub(super) fn open(&self, options: &str) -> Arc<dyn BlockDevice> {
        let spec = format!("{}{options}", self.0.path().display()).parse().unwrap();
        open(&DiskOptions::new(spec)).unwrap()
    }

    pub(super) fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.0.path()).unwrap()
    }
}

pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ ((i >> 9) as u8).wrapping_add(seed)).collect()
}

/// A disk of 1 MiB that keeps its requests.
pub(super) fn held() -> Arc<Held> {
    Held::new(DiskInfo { size: 1 << 20, block: 512, read_only: false, discard: true })
}

pub(super) fn config(disks: &[Arc<dyn BlockDevice>], block_size: Option<u32>) -> NvmeConfig {
    let namespaces = disks.iter().zip(1..).map(|(disk, uuid)| NamespaceConfig {
        disk: Arc::clone(disk),
        block_size,
        uuid: [uuid; 16],
    });
    NvmeConfig {
        name: "nvme.0".into(),
        serial: "RF0001".into(),
        uuid: [0xab; 16],
        queues: 4,
        namespaces: namespaces.collect(),
    }
}

impl Rig {
    /// A controller on a bus, with registers decoded and nothing enabled.
    pub(super) fn new(disk: Arc<dyn BlockDevice>) -> Self {
        Self::with(config(&[disk], None))
    }

    pub(super) fn with(config: NvmeConfig) -> Self {
        let region = |start, len, kind| RegionSpec { range: GuestRange::new(start, len), kind };
        let regions = [region(0, RAM, RegionKind::Ram), region(ROM, 0x1_0000, RegionKind::Rom)];
        Self::on(Arc::new(GuestMemory::new(&regions).unwrap()), config)
    }

    pub(super) fn on(memory: Arc<GuestMemory>, config: NvmeConfig) -> Self {
        let bench = Bench::new();
        let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
        let controller = Controller::new(config, Arc::clone(&memory), &interrupts).unwrap();
        let pci = PciBus::new();
        let host = PciHost::new(Arc::clone(&pci), Arc::new(Requests::default()));
        let bus = Arc::new(SystemBus::new(host.placements()).unwrap());
        pci.connect(&bus, &interrupts);
        assert_eq!(pci.plug_next(Arc::clone(&controller) as _).unwrap(), PciAddress::new(0, 1, 0));
        let mut rig = Self {
            bench,
            memory,
            bus,
            _pci: pci,
            controller,
            registers: 0,
            queues: Mutex::default(),
            next_id: Mutex::new(1),
        };
        rig.registers = u64::from(rig.config(0x10) & !0xf);
        rig.set_command(6);
        rig
    }

    /// A controller that is ready, with the admin queue.
    pub(super) fn ready(disk: Arc<dyn BlockDevice>) -> Self {
        let rig = Self::new(disk);
        rig.enable();
        rig
    }

    /// A controller with one I/O queue of 32 entries.
    pub(super) fn running(disk: Arc<dyn BlockDevice>) -> Self {
        let rig = Self::ready(disk);
        rig.create_queue(1, 32, 32, Some(1));
        rig
    }

    fn config(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.memory_read(GuestAddress(PCI_ECAM.start.0 + 0x8000 + register), &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn set_config(&self, register: u64, value: u32) {
        let at = GuestAddress(PCI_ECAM.start.0 + 0x8000 + register);
        self.bus.memory_write(at, &value.to_le_bytes());
    }

    /// The PCI command register: 2 decodes memory, 4 is bus master.
    pub(super) fn set_command(&self, value: u32) {
        self.set_config(4, value);
    }

    /// Switches MSI-X on, vector `n` sending data `0x40 + n`.
    pub(super) fn use_messages(&self) {
        let table = u64::from(self.config(0x20) & !0xf);
        for vector in 0..5_u64 {
            let words = [0xfee0_0000, 0, 0x40 + vector as u32, 0];
            for (word, offset) in words.iter().zip((vector * 16..).step_by(4)) {
                self.bus.memory_write(GuestAddress(table + offset), &word.to_le_bytes());
            }
        }
        self.set_config(0x48, 1 << 31);
    }

    /// Data of the messages since the last call.
    pub(super) fn messages(&self) -> Vec<u32> {
        self.bench.messages().into_iter().map(|(_, data)| data - 0x40).collect()
    }

    pub(super) fn pin(&self) -> bool {
        self.bench.level(17)
    }

    pub(super) fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.memory_read(GuestAddress(self.registers + register), &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn set(&self, register: u64, value: u32) {
        self.bus.memory_write(GuestAddress(self.registers + register), &value.to_le_bytes());
    }

    /// Where a register is.
    pub(super) fn register(&self, offset: u64) -> u64 {
        self.registers + offset
    }

    pub(super) fn bus_write(&self, at: GuestAddress, data: &[u8]) {
        self.bus.memory_write(at, data);
    }

    /// Goes on with the queues of another rig as it left them.
    pub(super) fn adopt(&self, other: &Self) {
        self.queues.lock().unwrap().clone_from(&other.queues.lock().unwrap());
        *self.next_id.lock().unwrap() = *other.next_id.lock().unwrap();
    }

    pub(super) fn status(&self) -> u32 {
        self.get(CSTS)
    }

    pub(super) fn set_cc(&self, value: u32) {
        self.set(CC, value);
    }

    /// Waits for a condition that an I/O thread brings about.
    pub(super) fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < end, "{what} does not come; status {:#x}", self.status());
            std::thread::yield_now();
        }
    }

    pub(super) fn enable(&self) {
        let (sq, cq) = (0x1000, 0x4000);
        self.memory.fill(GuestAddress(cq), 0, 0x1000).unwrap();
        self.set(0x24, 63 << 16 | 31);
        for (register, value) in [(0x28, sq), (0x30, cq)] {
            self.bus.memory_write(GuestAddress(self.registers + register), &u64::to_le_bytes(value));
        }
        self.set_cc(ENABLED);
        self.wait("readiness", || self.status() & 3 == 1);
        let admin = Queue { sq, cq, sq_size: 32, cq_size: 64, tail: 0, head: 0, phase: true };
        *self.queues.lock().unwrap() = vec![admin];
    }

    pub(super) fn disable(&self) {
        self.set_cc(ENABLED & !1);
        self.wait("the end of readiness", || self.status() & 1 == 0);
    }

    pub(super) fn create_queue(&self, id: u32, sq_size: u32, cq_size: u32, vector: Option<u32>) {
        let (sq, cq) = (0x1_0000 + u64::from(id) * 0x1_0000, 0x1_8000 + u64::from(id) * 0x1_0000);
        self.memory.fill(GuestAddress(cq), 0, u64::from(cq_size) * 16).unwrap();
        let flags = vector.map_or(1, |vector| 3 | vector << 16);
        let create = Cmd::new(5, 0).prp(cq, 0).cdw(&[id | (cq_size - 1) << 16, flags]);
        assert_eq!(self.admin(create).status, 0);
        let create = Cmd::new(1, 0).prp(sq, 0).cdw(&[id | (sq_size - 1) << 16, 1 | id << 16]);
        assert_eq!(self.admin(create).status, 0);
        let mut queues = self.queues.lock().unwrap();
        assert_eq!(queues.len(), id as usize);
        queues.push(Queue { sq, cq, sq_size, cq_size, tail: 0, head: 0, phase: true });
    }

    pub(super) fn forget_queue(&self) {
        self.queues.lock().unwrap().pop();
    }

    pub(super) fn doorbell(&self, index: u64, value: u32) {
        self.set(0x1000 + index * 4, value);
    }

    /// Puts a command in a queue without telling. Returns its identifier.
    pub(super) fn put(&self, queue: usize, cmd: Cmd) -> u16 {
        let mut next = self.next_id.lock().unwrap();
        let id = *next;
        *next = next.wrapping_add(1);
        let q = &mut self.queues.lock().unwrap()[queue];
        let Cmd(mut words) = cmd;
        words[0] |= u32::from(id) << 16;
        for (word, offset) in words.iter().zip((0..64).step_by(4)) {
            self.memory.write(GuestAddress(q.sq + u64::from(q.tail) * 64 + offset), *word).unwrap();
        }
        q.tail = (q.tail + 1) % q.sq_size;
        id
    }

    pub(super) fn ring(&self, queue: usize) {
        let tail = self.queues.lock().unwrap()[queue].tail;
        self.doorbell(queue as u64 * 2, tail);
    }

    pub(super) fn submit(&self, queue: usize, cmd: Cmd) -> u16 {
        let id = self.put(queue, cmd);
        self.ring(queue);
        id
    }

    /// The next completion, if it is there; the controller is not told.
    pub(super) fn peek(&self, queue: usize) -> Option<Cqe> {
        let q = &mut self.queues.lock().unwrap()[queue];
        let at = q.cq + u64::from(q.head) * 16;
        let word = |offset| self.memory.read::<u32>(GuestAddress(at + offset)).unwrap();
        let last = word(12);
        if (last >> 16 & 1 != 0) != q.phase {
            return None;
        }
        let cqe = Cqe {
            result: word(0),
            sq_head: word(8) as u16,
            queue: (word(8) >> 16) as u16,
            id: last as u16,
            status: (last >> 17) as u16 & 0x7ff,
        };
        q.head = (q.head + 1) % q.cq_size;
        q.phase ^= q.head == 0;
        Some(cqe)
    }

    /// Tells the controller which completions have been taken.
    pub(super) fn taken(&self, queue: usize) {
        let head = self.queues.lock().unwrap()[queue].head;
        self.doorbell(queue as u64 * 2 + 1, head);
    }

    /// Waits for the next completion and takes it.
    pub(super) fn next(&self, queue: usize) -> Cqe {
        let mut cqe = None;
        self.wait("a completion", || {
            cqe = self.peek(queue);
            cqe.is_some()
        });
        self.taken(queue);
        cqe.unwrap()
    }

    /// Runs one command.
    pub(super) fn run(&self, queue: usize, cmd: Cmd) -> Cqe {
        let id = self.submit(queue, cmd);
        let cqe = self.next(queue);
        assert_eq!((cqe.id, usize::from(cqe.queue)), (id, queue));
        cqe
    }

    pub(super) fn admin(&self, cmd: Cmd) -> Cqe {
        self.run(0, cmd)
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_bytes(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }

    pub(super) fn put_bytes(&self, at: u64, bytes: &[u8]) {
        self.memory.write_bytes(GuestAddress(at), bytes).unwrap();
    }

    /// Makes the second entry of a command for `len` bytes from `start`, contiguous, with a list if needed.
    pub(super) fn prp2(&self, start: u64, len: u64, list: u64) -> u64 {
        let first = 0x1000 - start % 0x1000;
        if len <= first + 0x1000 {
            return start + first;
        }
        let pages = (len - first).div_ceil(0x1000);
        for page in 0..pages {
            self.memory.write(GuestAddress(list + page * 8), start + first + page * 0x1000).unwrap();
        }
        list
    }

    /// A read (2) or write (1) of blocks from or to contiguous memory.
    pub(super) fn transfer(&self, opcode: u8, block: u64, count: u32, size: u64, at: u64) -> Cmd {
        let prp2 = self.prp2(at, u64::from(count) * size, LISTS);
        Cmd::new(opcode, 1).prp(at, prp2).blocks(block, count)
    }

    pub(super) fn identify(&self, what: u32, namespace: u32) -> Vec<u8> {
        let cqe = self.admin(Cmd::new(6, namespace).prp(DATA, 0).cdw(&[what]));
        assert_eq!(cqe.status, 0, "identify {what}");
        self.bytes(DATA, 4096)
    }
}
