//! Registers, identification, features, logs, queues.

use super::super::*;
use super::driver::*;
use crate::testing::Held;

const SMALL: usize = 1 << 20;

fn ready() -> (Image, Rig) {
    let image = Image::new(SMALL);
    let rig = Rig::ready(image.open(""));
    (image, rig)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn registers_tell_what_is_offered() {
    let image = Image::new(SMALL);
    let rig = Rig::new(image.open(""));
    assert_eq!(rig.get(0), 255 | 1 << 16 | 40 << 24);
    assert_eq!(rig.get(4), 1 << 5, "NVM command set, doorbells side by side, 4 KiB pages");
    assert_eq!(rig.get(8), 0x1_0400);
    assert_eq!((rig.get(0x1c), rig.get(0x20), rig.get(0x1000)), (0, 0, 0));
    rig.set(0x0c, 5);
    rig.set(0x10, 1);
    assert_eq!((rig.get(0x0c), rig.get(0x10)), (4, 4));
    rig.set(0x28, 0x1234_5fff);
    assert_eq!(rig.get(0x28), 0x1234_5000);
}

#[test]
fn controller_that_cannot_start_says_so_and_recovers() {
    let image = Image::new(SMALL);
    let rig = Rig::new(image.open(""));
    // No queue in memory; one entry only; a page size or command set that is not offered.
    for (asq, aqa, cc) in [
        (0x4000_0000_u32, 31 << 16 | 31, ENABLED),
        (ROM as u32, 31 << 16 | 31, ENABLED),
        (0x1000, 0, ENABLED),
        (0x1000, 31 << 16 | 31, ENABLED | 1 << 7),
        (0x1000, 31 << 16 | 31, ENABLED | 1 << 4),
    ] {
        rig.set(0x24, aqa);
        rig.set(0x28, asq);
        rig.set(0x30, 0x4000);
        rig.set_cc(cc);
        assert_eq!(rig.status(), 2, "{asq:#x} {aqa:#x} {cc:#x}");
        rig.set_cc(cc & !1);
        assert_eq!(rig.status(), 0);
    }
    rig.enable();
    assert_eq!(rig.identify(1, 0).len(), 4096);
}

#[test]
fn identify_describes_controller_and_namespaces() {
    let (one, two) = (Image::new(SMALL), Image::new(2 * SMALL + 512));
    let rig = Rig::with(config(&[one.open(""), two.open(",readonly")], Some(4096)));
    rig.enable();
    let controller = rig.identify(1, 0);
    assert_eq!(&controller[4..24], b"RF0001              ");
    assert_eq!(controller[77], 8, "1 MiB a command");
    assert_eq!((controller[512], controller[513], u32_at(&controller, 516)), (0x66, 0x44, 2));
    assert_eq!((u16_at(&controller, 520), controller[525]), (0b1100, 7));
    let name = b"nqn.2014-08.org.nvmexpress:uuid:abababab-abab-abab-abab-abababababab\0";
    assert_eq!(&controller[768..768 + name.len()], name);

    let first = rig.identify(0, 1);
    assert_eq!([u64_at(&first, 0), u64_at(&first, 8), u64_at(&first, 16)], [256; 3]);
    assert_eq!((first[25], first[26], first[99], first[130]), (0, 0, 0, 12));
    let second = rig.identify(0, 2);
    assert_eq!((u64_at(&second, 0), second[99]), (512, 1), "a part of a block is left out; write protected");
    assert_eq!(second[104..120], [2; 16]);
    let list = rig.identify(2, 0);
    assert_eq!([0, 4, 8].map(|at| u32_at(&list, at)), [1, 2, 0]);
    assert_eq!([0, 4].map(|at| u32_at(&rig.identify(2, 1), at)), [2, 0]);
    assert_eq!(rig.identify(3, 2)[..20], [vec![3, 16, 0, 0], vec![2; 16]].concat());

    for (what, namespace, status) in
        [(0, 0, 0x0b), (0, 3, 0x0b), (0, u32::MAX, 0x0b), (2, u32::MAX, 0x0b), (3, 9, 0x0b), (0x10, 1, 2)]
    {
        let cqe = rig.admin(Cmd::new(6, namespace).prp(DATA, 0).cdw(&[what]));
        assert_eq!(cqe.status, status, "{what} {namespace}");
    }
    let split = rig.admin(Cmd::new(6, 0).prp(DATA + 0x800, DATA + 0x9000).cdw(&[1]));
    assert_eq!(split.status, 0);
    assert_eq!(rig.bytes(DATA + 0x804, 6), b"RF0001");
    assert_eq!(rig.bytes(DATA + 0x9000, 4096 - 0x800), controller[0x800..]);
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let disk = held();
    let make = |info: ringfence_disk::DiskInfo, block_size| {
        let disk = Held::new(info);
        let bench = crate::testing::Bench::new();
        let memory = Arc::new(GuestMemory::flat(0x1000).unwrap());
        let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
        Controller::new(config(&[disk as _], block_size), memory, &interrupts).err()
    };
    let info = disk.info();
    assert_eq!(make(info, None), None);
    assert_eq!(make(info, Some(1024)), Some(NvmeError::BlockSize(1024)));
    let large = ringfence_disk::DiskInfo { block: 4096, ..info };
    assert_eq!(make(large, None), None);
    assert_eq!(make(large, Some(512)), Some(NvmeError::BlockTooSmall { needed: 4096 }));
    let tiny = ringfence_disk::DiskInfo { size: 512, ..info };
    assert_eq!(make(tiny, Some(4096)), Some(NvmeError::TooSmall { size: 512, block: 4096 }));
}

#[test]
fn unknown_commands_and_forms_are_refused() {
    let (_image, rig) = ready();
    assert_eq!(rig.admin(Cmd::new(0x7f, 0)).status, 1);
    assert_eq!(rig.admin(Cmd::new(0x80, 1)).status, 1, "format is not offered");
    for form in [1 << 8, 1 << 14, 2 << 14] {
        let mut cmd = Cmd::new(6, 0).prp(DATA, 0).cdw(&[1]);
        cmd.0[0] |= form;
        assert_eq!(rig.admin(cmd).status, 2, "fused or scatter-gather");
    }
    for (prp1, prp2, status) in [
        (DATA + 2, 0, 0x13),
        (DATA + 0x10, DATA + 0x18, 0x13),
        (RAM, 0, 4),
        (ROM, 0, 4),
        (RAM - 0x800, 0, 0),
        (RAM - 0x800, RAM, 4),
    ] {
        assert_eq!(rig.admin(Cmd::new(6, 0).prp(prp1, prp2).cdw(&[1])).status, status, "{prp1:#x}");
    }
}

#[test]
fn features_can_be_set_and_asked_for() {
    let (_image, rig) = ready();
    let get = |id: u32, word: u32| rig.admin(Cmd::new(0xa, 0).cdw(&[id, word]));
    let set = |id: u32, word: u32| rig.admin(Cmd::new(9, 0).cdw(&[id, word]));
    assert_eq!(get(6, 0).result, 1, "write cache on");
    assert_eq!((set(6, 0).status, get(6, 0).result), (0, 0));
    for (id, word) in [(1, 0x0302_0103), (5, 100), (8, 0x0a0b), (10, 1), (11, 2)] {
        assert_eq!((set(id, word).status, get(id, 0).result), (0, word), "{id}");
    }
    assert_eq!((set(4, 340).status, get(4, 0).result, get(4, 1 << 20).result), (0, 340, 0));
    assert_eq!((set(9, 1 << 16 | 3).status, get(9, 3).result, get(9, 2).result), (0, 1 << 16 | 3, 2));
    assert_eq!((set(2, 0).status, set(2, 1).status, get(2, 0).result), (0, 2, 0));
    for (id, word, status) in
        [(9, 5, 2), (0x0c, 0, 2), (4, 1 << 16, 2), (4, 3 << 20, 2), (1 << 31 | 6, 1, 0x10d)]
    {
        assert_eq!(set(id, word).status, status, "{id:#x}");
    }
    assert_eq!((get(0, 0).status, get(0xd0, 0).status), (2, 2));

    assert_eq!(get(7, 0).result, 3 << 16 | 3);
    assert_eq!(set(7, 99 << 16 | 1).result, 3 << 16 | 3, "no more than there are");
    assert_eq!(set(7, 0).result, 0, "one pair");
    assert_eq!(set(7, 0xffff).status, 2);
    rig.create_queue(1, 8, 8, None);
    assert_eq!(set(7, 1).status, 0x0c, "too late");
    let second = Cmd::new(5, 0).prp(DATA, 0).cdw(&[2 | 7 << 16, 1]);
    assert_eq!(rig.admin(second).status, 0x101, "more than was asked for");
    rig.disable();
    rig.enable();
    assert_eq!((get(6, 0).result, get(7, 0).result), (1, 3 << 16 | 3), "as before, after a reset");
}

#[test]
fn wrong_queues_are_refused() {
    let (_image, rig) = ready();
    let cq = |id: u32, size: u32, flags: u32, base: u64| {
        rig.admin(Cmd::new(5, 0).prp(base, 0).cdw(&[id | (size - 1) << 16, flags])).status
    };
    for (id, size, flags, base, status) in [
        (0, 8, 1, DATA, 0x101),
        (5, 8, 1, DATA, 0x101),
        (0xffff, 8, 1, DATA, 0x101),
        (1, 1, 1, DATA, 0x102),
        (1, 257, 1, DATA, 0x102),
        (1, 8, 0, DATA, 2),
        (1, 8, 3 | 5 << 16, DATA, 0x108),
        (1, 8, 1, DATA + 0x10, 0x13),
        (1, 8, 1, RAM, 4),
        (1, 256, 1, RAM - 0x1000, 0),
        (1, 8, 1, DATA, 0x101),
        (2, 8, 1, ROM, 4),
        (2, 8, 1, !0xfff, 4),
    ] {
        assert_eq!(cq(id, size, flags, base), status, "{id} {size} {flags:#x} {base:#x}");
    }
    let sq = |id: u32, size: u32, flags: u32, base: u64| {
        rig.admin(Cmd::new(1, 0).prp(base, 0).cdw(&[id | (size - 1) << 16, flags])).status
    };
    for (id, size, flags, base, status) in [
        (0, 8, 1 | 1 << 16, DATA, 0x101),
        (1, 8, 1, DATA, 0x101),
        (1, 8, 1 | 9 << 16, DATA, 0x101),
        (1, 8, 1 | 2 << 16, DATA, 0x100),
        (1, 256, 1 | 1 << 16, RAM - 0x1000, 4),
        (1, 8, 1 | 1 << 16, DATA, 0),
        (2, 8, 1 | 1 << 16, DATA, 0),
    ] {
        assert_eq!(sq(id, size, flags, base), status, "{id} {size} {flags:#x} {base:#x}");
    }
    let delete = |opcode, id: u32| rig.admin(Cmd::new(opcode, 0).cdw(&[id])).status;
    assert_eq!([delete(4, 0), delete(4, 3), delete(0, 0), delete(0, 3)], [0x101; 4]);
    assert_eq!((delete(4, 1), delete(0, 1)), (0x10c, 0));
    assert_eq!((delete(4, 1), delete(0, 2), delete(4, 1)), (0x10c, 0, 0));
    assert_eq!((delete(4, 1), delete(0, 1)), (0x101, 0x101));
    rig.create_queue(1, 8, 8, None);
    assert_eq!(rig.run(1, Cmd::new(0, 1)).status, 0);
}

#[test]
fn log_pages_tell_of_failures_and_work_done() {
    let (_image, rig) = ready();
    let log = |id: u32, len: u32, offset: u32| {
        let words = len / 4 - 1;
        rig.memory.fill(ringfence_memory::GuestAddress(DATA), 0xee, 8192).unwrap();
        let cmd = Cmd::new(2, u32::MAX).prp(DATA, DATA + 0x1000);
        (rig.admin(cmd.cdw(&[id | words << 16, words >> 16, offset])).status, rig.bytes(DATA, len as usize))
    };
    rig.create_queue(1, 8, 8, None);
    assert_eq!(rig.run(1, rig.transfer(2, 0, 8, 512, DATA)).status, 0);
    assert_eq!(rig.run(1, rig.transfer(1, 0, 4, 512, DATA)).status, 0);
    assert_eq!(rig.run(1, rig.transfer(2, 1 << 40, 1, 512, DATA)).status, 0x80);
    let (status, health) = log(2, 512, 0);
    assert_eq!((status, health[0], u16_at(&health, 1), health[3]), (0, 0, 300, 100));
    assert_eq!([32, 48, 64, 80, 176].map(|at| u64_at(&health, at)), [1, 1, 1, 1, 1]);
    let (_, errors) = log(1, 128, 0);
    assert_eq!((u64_at(&errors, 0), u16_at(&errors, 8), u32_at(&errors, 24)), (1, 1, 1));
    assert_eq!(u16_at(&errors, 12) >> 1 & 0x7ff, 0x80);
    assert_eq!(errors[64..], [0; 64]);
    assert_eq!(log(3, 512, 8).1[..8], *b"1       ", "from an offset");
    let effects = log(5, 4096, 0).1;
    let supported: Vec<usize> = (0..256).filter(|i| effects[i * 4] & 1 != 0).collect();
    assert_eq!(supported, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]);
    assert_eq!((effects[1024 + 4], effects[1024 + 8], effects[1024 + 12]), (3, 1, 0));
    let (status, past) = log(2, 1024, 0);
    assert_eq!((status, &past[512..]), (0, &[0; 512][..]));
    assert_eq!([log(0x70, 512, 0).0, log(2, 512, 512).0, log(2, 512, 2).0], [0x109, 2, 2]);
    let huge = Cmd::new(2, 0).prp(DATA, DATA).cdw(&[2 | 0xffff << 16, 0xffff]);
    assert_eq!(rig.admin(huge).status, 2, "16 GiB of log");
}

#[test]
fn events_are_reported_once_until_their_log_is_read() {
    let (_image, rig) = ready();
    let held: Vec<u16> = (0..4).map(|_| rig.submit(0, Cmd::new(0xc, 0))).collect();
    assert_eq!(rig.admin(Cmd::new(0xc, 0)).status, 0x105, "a fifth is too many");
    assert_eq!(rig.peek(0), None);
    rig.doorbell(20, 1);
    let cqe = rig.next(0);
    assert_eq!((cqe.id, cqe.status, cqe.result), (held[0], 0, 0x01_00_00), "invalid doorbell");
    rig.doorbell(20, 1);
    rig.doorbell(0, 9999);
    assert_eq!(rig.peek(0), None, "masked");
    let read =
        |retain: u32| rig.admin(Cmd::new(2, 0).prp(DATA, 0).cdw(&[1 | retain << 15 | 15 << 16])).status;
    assert_eq!(read(1), 0);
    rig.doorbell(1, 60);
    assert_eq!(rig.peek(0), None, "still masked");
    assert_eq!(read(0), 0);
    rig.doorbell(1, 60);
    let cqe = rig.next(0);
    assert_eq!((cqe.id, cqe.result), (held[1], 0x01_01_00), "invalid doorbell value");

    assert_eq!(rig.submit(0, Cmd::new(8, 0).cdw(&[u32::from(held[3]) << 16])), held[3] + 4);
    let aborted = rig.next(0);
    assert_eq!((aborted.id, aborted.status), (held[3], 7));
    assert_eq!((rig.next(0).result, rig.peek(0)), (0, None));
    assert_eq!(rig.admin(Cmd::new(8, 0).cdw(&[u32::from(held[3]) << 16])).result, 1, "gone");

    assert_eq!(rig.admin(Cmd::new(9, 0).cdw(&[0xb, 2])).status, 0);
    let id = rig.submit(0, Cmd::new(9, 0).cdw(&[4, 290]));
    let mut both = [rig.next(0), rig.next(0)];
    both.sort_by_key(|cqe| cqe.id);
    assert_eq!((both[0].id, both[0].result), (held[2], 0x02_01_01), "too warm");
    assert_eq!((both[1].id, both[1].status), (id, 0));
}

#[test]
fn event_without_a_request_waits_for_one() {
    let (_image, rig) = ready();
    rig.doorbell(40, 0);
    assert_eq!(rig.peek(0), None);
    assert_eq!(rig.admin(Cmd::new(0xc, 0)).result, 0x01_00_00);
}
