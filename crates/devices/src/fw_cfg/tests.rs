use ringfence_memory::{GuestRange, RegionKind, RegionSpec};

use super::*;
use crate::Device;
use crate::testing::{Bench, Random, poke, read8, read32};

const SIZE: u64 = 0x1_0000;
const ROM: u64 = 0x2_0000;
const DESCRIPTOR: u64 = 0x1000;
const TARGET: u64 = 0x2000;

struct Fixture {
    memory: Arc<GuestMemory>,
    device: Arc<FwCfg>,
}

fn fixture() -> Fixture {
    let mut items = FwCfgItems::new();
    items.add(0x05, vec![1, 2, 3, 4]).unwrap();
    items.add(0x8002, vec![9; 300]).unwrap();
    items.add_file("opt/second", b"two".to_vec()).unwrap();
    items.add_file("etc/first", b"one and more".to_vec()).unwrap();
    let region = |start, len, kind| RegionSpec { range: GuestRange::new(start, len), kind };
    let regions = [region(0, SIZE, RegionKind::Ram), region(ROM, 0x1000, RegionKind::Rom)];
    let memory = Arc::new(GuestMemory::new(&regions).unwrap());
    let device = FwCfg::new(items, Arc::clone(&memory));
    Fixture { memory, device }
}

impl Fixture {
    fn select(&self, key: u16) {
        self.device.write(SELECTOR, &key.to_le_bytes());
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        (0..len).map(|_| read8(&*self.device, DATA)).collect()
    }

    /// Runs a descriptor and returns its control word afterwards.
    fn dma(&self, command: u32, len: u32, target: u64) -> u32 {
        let mut descriptor = Vec::new();
        descriptor.extend(command.to_be_bytes());
        descriptor.extend(len.to_be_bytes());
        descriptor.extend(target.to_be_bytes());
        self.memory.write_bytes(GuestAddress(DESCRIPTOR), &descriptor).unwrap();
        self.start(DESCRIPTOR);
        let mut answer = [0; 4];
        self.memory.read_bytes(GuestAddress(DESCRIPTOR), &mut answer).unwrap();
        u32::from_be_bytes(answer)
    }

    fn start(&self, descriptor: u64) {
        self.device.write(DMA_HIGH, &((descriptor >> 32) as u32).to_be_bytes());
        self.device.write(DMA_LOW, &(descriptor as u32).to_be_bytes());
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_bytes(GuestAddress(at), &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn signature_and_version_tell_the_interface() {
    let f = fixture();
    f.select(0);
    assert_eq!(f.bytes(5), b"QEMU\0");
    f.select(1);
    assert_eq!(f.bytes(4), [3, 0, 0, 0]);
    assert_eq!(read32(&*f.device, DMA_HIGH).to_le_bytes(), *b"QEMU");
    assert_eq!(read32(&*f.device, DMA_LOW).to_le_bytes(), *b" CFG");
}

#[test]
fn item_is_read_byte_by_byte_and_from_the_start_after_selecting() {
    let f = fixture();
    f.select(5);
    assert_eq!(f.bytes(6), [1, 2, 3, 4, 0, 0]);
    f.select(5);
    assert_eq!(f.bytes(2), [1, 2]);
    let mut word = [0xff; 2];
    f.device.read(DATA, &mut word);
    assert_eq!(word, [3, 4]);
    f.select(0x1234);
    assert_eq!(f.bytes(2), [0, 0], "no such item");
}

#[test]
fn directory_lists_files_by_name() {
    let f = fixture();
    f.select(0x19);
    let directory = f.bytes(4 + 2 * 64);
    assert_eq!(directory[..4], 2_u32.to_be_bytes());
    assert_eq!(directory[4..12], [0, 0, 0, 12, 0, 0x20, 0, 0]);
    assert_eq!(&directory[12..22], b"etc/first\0");
    assert_eq!(directory[68..76], [0, 0, 0, 3, 0, 0x21, 0, 0]);
    f.select(0x21);
    assert_eq!(f.bytes(3), b"two");
}

#[test]
fn bad_items_are_refused() {
    let mut items = FwCfgItems::new();
    for key in [0, 1, 0x19, 0x20, 0x3fff, 0x4005, 0xc000] {
        assert_eq!(items.add(key, vec![]), Err(FwCfgError::BadKey(key)));
    }
    items.add(5, vec![]).unwrap();
    assert_eq!(items.add(5, vec![]), Err(FwCfgError::BadKey(5)));
    let long = "x".repeat(56);
    for name in ["", "a\0b", long.as_str()] {
        assert_eq!(items.add_file(name, vec![]), Err(FwCfgError::BadName(name.to_owned())));
    }
    items.add_file(&long[1..], vec![]).unwrap();
    assert!(items.add_file(&long[1..], vec![]).is_err());
}

#[test]
fn dma_selects_skips_and_reads() {
    let f = fixture();
    assert_eq!(f.dma(control::SELECT | control::READ | 0x20 << 16, 3, TARGET), 0);
    assert_eq!(f.memory(TARGET, 4), b"one\0");
    assert_eq!(f.dma(control::SKIP, 5, 0), 0);
    assert_eq!(f.dma(control::READ, 4, TARGET), 0);
    assert_eq!(f.memory(TARGET, 4), b"more");
}

#[test]
fn dma_past_the_end_gives_zeros() {
    let f = fixture();
    f.memory.fill(GuestAddress(TARGET), 0x55, 64).unwrap();
    assert_eq!(f.dma(control::SELECT | control::READ | 5 << 16, 32, TARGET), 0);
    let mut expected = vec![1, 2, 3, 4];
    expected.resize(32, 0);
    expected.push(0x55);
    assert_eq!(f.memory(TARGET, 33), expected);
    assert_eq!(f.dma(control::SKIP, u32::MAX, 0), 0);
    assert_eq!(f.dma(control::READ, 0, 0), 0);
}

#[test]
fn dma_write_is_refused() {
    let f = fixture();
    assert_eq!(f.dma(control::SELECT | control::WRITE | 5 << 16, 4, TARGET), control::ERROR);
    f.select(5);
    assert_eq!(f.bytes(4), [1, 2, 3, 4]);
}

#[test]
fn hostile_descriptors_are_answered_with_an_error() {
    let f = fixture();
    let read = control::SELECT | control::READ | 0x8002 << 16;
    for (len, target) in [
        (300, SIZE),
        (300, SIZE - 100),
        (u32::MAX, TARGET),
        (300, u64::MAX - 10),
        (u32::MAX, u64::MAX),
        (1, 0xffff_ffff_0000_0000),
        (4, ROM),
    ] {
        assert_eq!(f.dma(read, len, target), control::ERROR, "{len:#x} at {target:#x}");
    }
    for descriptor in [SIZE - 15, SIZE, ROM, u64::MAX, u64::MAX - 15, 1 << 63] {
        f.start(descriptor);
    }
    assert_eq!(f.memory(ROM, 16), [0; 16]);
    assert_eq!(f.dma(read, 300, TARGET), 0);
    assert_eq!(f.memory(TARGET, 300), [9; 300]);
}

#[test]
fn descriptor_may_be_overwritten_by_its_own_transfer() {
    let f = fixture();
    assert_eq!(f.dma(control::SELECT | control::READ | 0x8002 << 16, 300, DESCRIPTOR - 4), 0);
    assert_eq!(f.memory(DESCRIPTOR, 8), [0, 0, 0, 0, 9, 9, 9, 9]);
}

#[test]
fn restored_position_lies_inside_the_item() {
    let f = fixture();
    f.select(5);
    f.bytes(2);
    let mut saved = f.device.save();
    f.select(0);
    f.device.restore(&saved).unwrap();
    assert_eq!(f.bytes(2), [3, 4]);
    saved.fields["offset"] = u32::MAX.into();
    f.device.restore(&saved).unwrap();
    assert_eq!(f.bytes(2), [0, 0]);
}

#[test]
fn random_accesses_and_descriptors_leave_a_working_device() {
    let f = fixture();
    poke(&*f.device, 12, &Bench::new(), 11);
    let mut random = Random::new(12);
    for _ in 0..20_000 {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&random.next().to_le_bytes());
        descriptor[8..].copy_from_slice(&random.below(SIZE * 2).to_be_bytes());
        // Lengths in proportion, or hardly any transfer would fit.
        descriptor[4] = 0;
        descriptor[5] = 0;
        let at = random.below(SIZE);
        let _ = f.memory.write_bytes(GuestAddress(at), &descriptor);
        f.start(at);
    }
    f.device.reset();
    assert_eq!(f.bytes(4), b"QEMU");
}
