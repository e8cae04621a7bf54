//! Reads, writes and the other I/O commands, on real files.

use ringfence_disk::{IoError, IoKind};
use ringfence_memory::{CodeObserver, GuestAddress};

use super::super::*;
use super::driver::*;

#[test]
fn data_goes_both_ways_in_every_size_and_place() {
    for (engine, block) in [("threads", 512), ("threads", 4096), ("uring", 512), ("sync", 4096)] {
        let image = Image::new(4 << 20);
        let rig = Rig::with(config(&[image.open(&format!(",io={engine}"))], Some(block)));
        rig.enable();
        rig.create_queue(1, 32, 32, Some(1));
        let size = u64::from(block);
        let mut expected = image.bytes();
        for (start, bytes, at) in [
            (0, 4096, DATA),
            (1, 4096, DATA + 0x204),
            (3, 8192, DATA),
            (3, 8192, DATA + 0xffc),
            (5, 12288, DATA + 0x800),
            (8, 0x4_0000, DATA + 4),
            (0, 1 << 20, DATA),
            (7, 1 << 20, DATA + 0xe00),
        ] {
            let count = (bytes / size) as u32;
            let range = (start * size) as usize..(start * size + bytes) as usize;
            let read = rig.run(1, rig.transfer(2, start, count, size, at));
            assert_eq!(read.status, 0, "{engine} {block} {bytes} at {at:#x}");
            assert!(rig.bytes(at, bytes as usize) == expected[range.clone()], "{engine} {bytes} at {at:#x}");
            let new = pattern(bytes as usize, start as u8 + 100);
            rig.put_bytes(at, &new);
            assert_eq!(rig.run(1, rig.transfer(1, start, count, size, at)).status, 0);
            expected[range].copy_from_slice(&new);
        }
        assert_eq!(rig.run(1, Cmd::new(0, 1)).status, 0);
        assert!(image.bytes() == expected, "{engine} {block}");
    }
}

#[test]
fn scattered_pages_keep_their_order() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(""));
    // A list that starts two entries before the end of its page and goes on in another.
    let pages: Vec<u64> = (0..20).map(|i| DATA + (i * 7 % 20) * 0x3000).collect();
    let (list, second) = (LISTS + 0x1000 - 16, LISTS + 0x5000);
    let put = |at, value: u64| rig.memory.write(GuestAddress(at), value).unwrap();
    put(list, pages[1]);
    put(list + 8, second);
    for (index, page) in pages[2..].iter().enumerate() {
        put(second + index as u64 * 8, *page);
    }
    let cmd = Cmd::new(2, 1).prp(pages[0], list).blocks(16, 160);
    assert_eq!(rig.run(1, cmd).status, 0);
    let expected = &image.bytes()[16 * 512..][..20 * 4096];
    for (page, bytes) in pages.iter().zip(expected.chunks(4096)) {
        assert_eq!(rig.bytes(*page, 4096), bytes, "{page:#x}");
    }
}

#[test]
fn wrong_ranges_and_namespaces_are_refused() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(""));
    let status = |cmd| rig.run(1, cmd).status;
    let io =
        |opcode, namespace, start, count| Cmd::new(opcode, namespace).prp(DATA, LISTS).blocks(start, count);
    assert_eq!(status(io(2, 1, 2047, 1)), 0);
    for opcode in [1, 2, 8] {
        assert_eq!(status(io(opcode, 1, 2048, 1)), 0x80);
        assert_eq!(status(io(opcode, 1, 2047, 2)), 0x80);
        assert_eq!(status(io(opcode, 1, u64::MAX, 2)), 0x80);
        for namespace in [0, 2, u32::MAX] {
            assert_eq!(status(io(opcode, namespace, 0, 1)), 0x0b);
        }
    }
    assert_eq!(status(io(2, 1, 0, 2049)), 2, "more than 1 MiB");
    assert_eq!(status(Cmd::new(0, 2)), 0x0b);
    assert_eq!((status(Cmd::new(0, 1)), status(Cmd::new(0, u32::MAX))), (0, 0));
    for opcode in [4, 5, 0x0d, 0x7f, 0xff] {
        assert_eq!(status(io(opcode, 1, 0, 1)), 1, "{opcode}");
    }
    let mut sgl = io(2, 1, 0, 1);
    sgl.0[0] |= 1 << 14;
    assert_eq!(status(sgl), 2);
}

#[test]
fn bad_memory_is_refused_before_anything_moves() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(""));
    let before = image.bytes();
    rig.put_bytes(ROM, &[0x77; 4096]);
    rig.memory.fill(GuestAddress(DATA), 0x11, 0x10000).unwrap();
    let put = |at, value: u64| rig.memory.write(GuestAddress(at), value).unwrap();
    put(LISTS, DATA);
    put(LISTS + 8, RAM);
    put(LISTS + 0x1000, DATA + 0x100);
    for opcode in [1, 2] {
        for (prp1, prp2, blocks, status) in [
            (DATA + 1, 0, 1, 0x13),
            (DATA + 0xe00, DATA + 0x1100, 2, 0x13),
            (RAM, 0, 1, 4),
            (0xfee0_0000, 0, 1, 4),
            (u64::MAX - 3, 0, 1, 4),
            (RAM - 0x1000, RAM, 16, 4),
            (DATA, LISTS, 24, 4),
            (DATA, LISTS + 0x1000, 24, 0x13),
            (DATA, LISTS + 4, 24, 0x13),
            (DATA, RAM, 24, 4),
            (DATA, u64::MAX - 7, 2048, 4),
        ] {
            let cmd = Cmd::new(opcode, 1).prp(prp1, prp2).blocks(0, blocks);
            assert_eq!(rig.run(1, cmd).status, status, "{opcode} {prp1:#x} {prp2:#x}");
        }
    }
    assert_eq!(rig.run(1, Cmd::new(2, 1).prp(ROM, 0).blocks(0, 1)).status, 4, "a read into ROM");
    assert_eq!(rig.bytes(ROM, 4096), [0x77; 4096]);
    assert_eq!(rig.bytes(DATA, 0x10000), [0x11; 0x10000]);
    assert!(image.bytes() == before);
    assert_eq!(rig.run(1, Cmd::new(1, 1).prp(ROM, 0).blocks(0, 1)).status, 0, "a write from ROM");
    assert_eq!(image.bytes()[..512], [0x77; 512]);
}

#[test]
fn read_only_disk_takes_no_write() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(",readonly"));
    let io = |opcode| Cmd::new(opcode, 1).prp(DATA, 0).blocks(0, 1);
    assert_eq!([1, 2, 8].map(|opcode| rig.run(1, io(opcode)).status), [0x20, 0, 0x20]);
    assert_eq!(rig.run(1, Cmd::new(9, 1).prp(DATA, 0).cdw(&[0, 4])).status, 0x20);
    rig.put_bytes(DATA, &[0; 16]);
    assert_eq!(rig.run(1, Cmd::new(9, 1).prp(DATA, 0).cdw(&[0, 1])).status, 0, "a hint");
    assert_eq!(rig.run(1, Cmd::new(0, 1)).status, 0);
}

#[test]
fn zeroes_and_discards_reach_the_file() {
    for block in [512_u64, 4096] {
        let image = Image::new(1 << 20);
        let rig = Rig::with(config(&[image.open("")], Some(block as u32)));
        rig.enable();
        rig.create_queue(1, 8, 8, None);
        let mut expected = image.bytes();
        for (start, count, flags) in [(1, 3, 0), (16, 8, 1 << 25), (40, 1, 1 << 30)] {
            let mut cmd = Cmd::new(8, 1).blocks(start, count);
            cmd.0[12] |= flags;
            assert_eq!(rig.run(1, cmd).status, 0);
            expected[(start * block) as usize..][..(u64::from(count) * block) as usize].fill(0);
        }
        assert!(image.bytes() == expected);

        let ranges = |list: &[(u64, u32)]| {
            for (index, (start, count)) in list.iter().enumerate() {
                let at = DATA + 0xff8 + index as u64 * 16;
                rig.put_bytes(at, &[[0; 4], count.to_le_bytes()].concat());
                rig.put_bytes(at + 8, &start.to_le_bytes());
            }
            let count = list.len() as u32 - 1;
            rig.run(1, Cmd::new(9, 1).prp(DATA + 0xff8, DATA + 0x1000).cdw(&[count, 4])).status
        };
        assert_eq!(ranges(&[(64, 64), (200, 8), (0, 0)]), 0);
        expected[(64 * block) as usize..(128 * block) as usize].fill(0);
        expected[(200 * block) as usize..(208 * block) as usize].fill(0);
        assert!(image.bytes() == expected, "{block}");
        assert_eq!(ranges(&[(0, 1), (1 << 20, 1)]), 0x80);
        assert_eq!(ranges(&[(u64::MAX, u32::MAX)]), 0x80);
        assert!(image.bytes() == expected, "nothing of a wrong list is done");
        let hint = Cmd::new(9, 1).prp(DATA, 0).cdw(&[0, 1]);
        rig.put_bytes(DATA, &[0; 16]);
        assert_eq!(rig.run(1, hint).status, 0);
        let all: Vec<_> = (0..256).map(|i| (i % 200, 1)).collect();
        assert_eq!(ranges(&all), 0);
    }
}

#[test]
fn durable_writes_say_so_to_the_disk() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    let write = |flags: u32| {
        let mut cmd = Cmd::new(1, 1).prp(DATA, 0).blocks(0, 1);
        cmd.0[12] |= flags;
        rig.submit(1, cmd);
        let durable = disk.end(Ok(())).contains("durable: true");
        assert_eq!(rig.next(1).status, 0);
        durable
    };
    assert_eq!((write(0), write(1 << 30)), (false, true));
    let off = rig.submit(0, Cmd::new(9, 0).cdw(&[6, 0]));
    assert_eq!(rig.peek(0), None, "what the cache holds is flushed first");
    assert_eq!(disk.end(Ok(())), "Flush");
    assert_eq!((rig.next(0).id, disk.count()), (off, 0));
    assert!(write(0), "with the write cache off");
    assert_eq!(rig.admin(Cmd::new(9, 0).cdw(&[6, 0])).status, 0, "off already: nothing to flush");
    rig.submit(1, Cmd::new(0, 1));
    assert_eq!(disk.end(Ok(())), "Flush");
    assert_eq!(rig.next(1).status, 0);
}

#[test]
fn errors_of_the_host_become_errors_of_the_device() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    for (opcode, error, status) in [
        (2, IoError::Host(IoKind::Read), 0x281),
        (1, IoError::Host(IoKind::Write), 0x280),
        (1, IoError::NoSpace, 0x81),
        (0, IoError::Host(IoKind::Flush), 0x280),
        (8, IoError::Host(IoKind::WriteZeroes), 0x280),
        (1, IoError::ReadOnly, 0x20),
    ] {
        rig.submit(1, Cmd::new(opcode, 1).prp(DATA, 0).blocks(0, 1));
        disk.end(Err(error));
        assert_eq!(rig.next(1).status, status, "{error}");
    }
    let two = Rig::with(config(&[Arc::clone(&disk) as _, Arc::clone(&disk) as _], None));
    two.enable();
    two.create_queue(1, 8, 8, None);
    two.submit(1, Cmd::new(0, u32::MAX));
    disk.end(Err(IoError::Host(IoKind::Flush)));
    assert_eq!(two.peek(1), None, "one is still being flushed");
    disk.end(Ok(()));
    assert_eq!(two.next(1).status, 0x280);
}

/// Looks whether a completion is there when guest memory hears of data.
struct Watch {
    memory: Arc<GuestMemory>,
    early: Mutex<Vec<bool>>,
}

impl CodeObserver for Watch {
    fn code_written(&self, address: GuestAddress, _: u64) {
        if address.0 >= DATA {
            let last = self.memory.read::<u32>(GuestAddress(0x2_8000 + 12)).unwrap();
            self.early.lock().unwrap().push(last >> 16 & 1 != 0);
        }
    }
}

#[test]
fn memory_hears_of_data_before_the_guest_sees_the_completion() {
    for options in ["", ",io=uring", ",io=sync"] {
        // One each: a thread may still hold the disk, and its lock, when the machine is gone.
        let image = Image::new(1 << 20);
        let rig = Rig::running(image.open(options));
        let watch = Arc::new(Watch { memory: Arc::clone(&rig.memory), early: Mutex::default() });
        rig.memory.set_code_observer(Arc::clone(&watch) as _);
        rig.memory.set_code_page(GuestAddress(DATA + 0x3000), true);
        assert_eq!(rig.run(1, rig.transfer(2, 0, 2048, 512, DATA)).status, 0);
        assert_eq!(*watch.early.lock().unwrap(), [false], "{options}");
    }
}

#[test]
fn queues_wrap_and_their_phase_turns() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(",io=sync"));
    rig.use_messages();
    for round in 0..200_u32 {
        let cqe = rig.run(1, rig.transfer(2, u64::from(round) % 2000, 1, 512, DATA));
        assert_eq!(u32::from(cqe.sq_head), (round + 1) % 32);
        assert_eq!(rig.messages(), [1]);
    }
}

#[test]
fn several_queues_use_their_own_vectors() {
    let image = Image::new(1 << 20);
    let rig = Rig::ready(image.open(",io=sync"));
    rig.use_messages();
    for (id, vector) in [(1, Some(4)), (2, Some(2)), (3, None)] {
        rig.create_queue(id, 16, 16, vector);
    }
    rig.messages();
    for (queue, expected) in [(1, vec![4]), (2, vec![2]), (3, vec![])] {
        assert_eq!(rig.run(queue, rig.transfer(2, 0, 1, 512, DATA)).status, 0);
        assert_eq!(rig.messages(), expected);
    }
    assert!(!rig.pin());
}
