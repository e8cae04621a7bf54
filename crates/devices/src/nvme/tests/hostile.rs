//! Guests that do what no driver does, and many at once.

use std::sync::atomic::{AtomicBool, Ordering};

use ringfence_engine::Stateful;
use ringfence_memory::GuestAddress;

use super::super::*;
use super::driver::*;
use crate::testing::Random;

#[test]
fn doorbells_that_mean_nothing_do_nothing() {
    let image = Image::new(1 << 20);
    let rig = Rig::new(image.open(",io=sync"));
    rig.doorbell(0, 5);
    rig.enable();
    for (index, value) in [(2, 1), (3, 1), (1, 1), (1, 64), (0, 32), (0, u32::MAX), (1023, 7), (9, 0)] {
        rig.doorbell(index, value);
    }
    rig.create_queue(1, 8, 8, None);
    for value in [8, 9, u32::MAX] {
        rig.doorbell(2, value);
        rig.doorbell(3, value);
    }
    // Accesses that are not defined.
    let at = |offset| GuestAddress(rig.register(offset));
    rig.bus_write(at(0x1008), &[3]);
    rig.bus_write(at(0x100a), &[3, 0, 0, 0]);
    rig.bus_write(at(0x14), &[0, 0]);
    rig.bus_write(at(0x1008), &[3; 16]);
    assert_eq!(rig.run(1, Cmd::new(2, 1).prp(DATA, 0).blocks(0, 1)).status, 0);
    // 8 bytes are two doorbells: two commands, and a head that is not there yet.
    rig.put(1, Cmd::new(0, 1));
    rig.bus_write(at(0x1008), &0x0000_0005_0000_0002_u64.to_le_bytes());
    assert_eq!(rig.next(1).status, 0);
}

#[test]
fn tail_that_laps_gives_stale_commands_and_no_more() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(",io=sync"));
    // Never written entries are flushes of namespace 0.
    rig.doorbell(2, 31);
    for _ in 0..31 {
        assert_eq!(rig.peek(1).map(|cqe| cqe.status), Some(0x0b));
    }
    assert_eq!(rig.peek(1), None);
    rig.doorbell(2, 30);
    assert_eq!(rig.peek(1), None, "the completion queue is full");
    rig.taken(1);
    for _ in 0..31 {
        assert!(rig.peek(1).is_some());
    }
}

/// The largest admin queue there can be, filled before the one doorbell that tells of it.
#[test]
fn full_admin_queue_is_worked_off_at_one_doorbell() {
    let image = Image::new(1 << 20);
    let rig = Rig::new(image.open(",io=sync"));
    let (sq, cq) = (2 << 20, 3 << 20);
    rig.set(0x24, 4095 << 16 | 4095);
    for (register, base) in [(0x28, sq), (0x30, cq)] {
        rig.bus_write(GuestAddress(rig.register(register)), &u64::to_le_bytes(base));
    }
    rig.set_cc(ENABLED);
    // Get Features, number of queues.
    for entry in 0..4095_u64 {
        let at = sq + entry * 64;
        rig.memory.write(GuestAddress(at), 0x0a | (entry as u32) << 16).unwrap();
        rig.memory.write(GuestAddress(at + 40), 7_u32).unwrap();
    }
    rig.doorbell(0, 4095);
    for entry in 0..4095_u64 {
        let last = rig.memory.read::<u32>(GuestAddress(cq + entry * 16 + 12)).unwrap();
        assert_eq!(last, 1 << 16 | entry as u32);
    }
}

#[test]
fn queues_may_lie_on_each_other() {
    let image = Image::new(1 << 20);
    let rig = Rig::ready(image.open(",io=sync"));
    let base = 0x1000;
    assert_eq!(rig.admin(Cmd::new(5, 0).prp(base, 0).cdw(&[1 | 255 << 16, 1])).status, 0);
    assert_eq!(rig.admin(Cmd::new(1, 0).prp(base, 0).cdw(&[1 | 255 << 16, 1 | 1 << 16])).status, 0);
    rig.doorbell(2, 255);
    for head in (0..256).chain(0..256) {
        rig.doorbell(3, head);
    }
    // Identify over the queue that it came from.
    let cmd = Cmd::new(6, 0).prp(base, 0).cdw(&[1]);
    rig.submit(0, cmd);
    rig.controller.quiesce();
    rig.disable();
    rig.enable();
    assert_eq!(rig.admin(Cmd::new(6, 0).prp(DATA, 0).cdw(&[1])).status, 0);
}

#[test]
fn random_bytes_find_nothing() {
    let image = Image::new(128 << 10);
    let mut random = Random::new(0x6e76_6d65);
    for _ in 0..1500 {
        // Bring it up first more often than not.
        let mut bytes = vec![3, 4, random.next() as u8];
        let len = random.below(400);
        bytes.extend((0..len).map(|_| random.next() as u8));
        fuzz::run(image.path(), &bytes[random.below(4) as usize..]);
    }
    assert!(image.bytes() != pattern(128 << 10, 0), "no command got as far as the file");
}

/// Threads ring doorbells of queues of their own with reads, writes and nonsense while another resets the
/// controller again and again. Nothing hangs, and memory that no command names stays as it was.
#[test]
fn resets_under_load_leave_a_working_controller() {
    for options in ["", ",io=uring"] {
        let image = Image::new(4 << 20);
        let rig = Rig::ready(image.open(options));
        let stop = AtomicBool::new(false);
        let canary = DATA + (8 << 20);
        rig.memory.fill(GuestAddress(canary), 0x42, 0x1_0000).unwrap();
        std::thread::scope(|scope| {
            for queue in 1..=2_u64 {
                let (rig, stop) = (&rig, &stop);
                scope.spawn(move || {
                    let mut random = Random::new(queue);
                    let sq = 0x1_0000 + queue * 0x1_0000;
                    while !stop.load(Ordering::Relaxed) {
                        let tail = random.below(32);
                        let opcode = [0, 1, 2, 2, 8, 9][random.below(6) as usize];
                        let cmd = Cmd::new(opcode, 1)
                            .prp(DATA + (random.below(64) << 12), LISTS)
                            .blocks(random.below(8000), 1 + random.below(24) as u32);
                        for (word, offset) in cmd.0.iter().zip((0..64).step_by(4)) {
                            rig.memory.write(GuestAddress(sq + tail * 64 + offset), *word).unwrap();
                        }
                        rig.doorbell(queue * 2, (tail as u32 + 1) % 32);
                        rig.doorbell(queue * 2 + 1, random.below(32) as u32);
                    }
                });
            }
            for page in 0..64 {
                rig.memory.write(GuestAddress(LISTS + page * 8), DATA + (page << 12)).unwrap();
            }
            for round in 0..60 {
                for queue in 1..=2 {
                    rig.create_queue(queue, 32, 32, Some(queue));
                }
                std::thread::sleep(std::time::Duration::from_micros(300 * (round % 7)));
                rig.disable();
                // Nothing in flight any more: what is written now stays.
                rig.memory.fill(GuestAddress(DATA), round as u8, 0x1000).unwrap();
                assert_eq!(rig.bytes(DATA, 0x1000), vec![round as u8; 0x1000]);
                rig.enable();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(rig.bytes(canary, 0x1_0000), vec![0x42; 0x1_0000]);
        rig.create_queue(1, 32, 32, None);
        assert_eq!(rig.run(1, rig.transfer(2, 0, 2048, 512, DATA)).status, 0);
    }
}

/// Two queues with their own threads read and write their own halves; every byte is checked.
#[test]
fn two_vcpus_on_two_queues_do_not_mix_data() {
    for options in ["", ",io=uring", ",cache=unsafe,io=sync"] {
        let image = Image::new(2 << 20);
        let rig = Rig::ready(image.open(options));
        rig.create_queue(1, 16, 16, Some(1));
        rig.create_queue(2, 16, 16, Some(2));
        std::thread::scope(|scope| {
            for queue in 1..=2_usize {
                let rig = &rig;
                scope.spawn(move || {
                    let mut random = Random::new(queue as u64);
                    let base = (queue as u64 - 1) * 2048;
                    let at = DATA + queue as u64 * (1 << 20);
                    let mut model = vec![None; 2048];
                    for _ in 0..600 {
                        let (start, count) = (random.below(2000), 1 + random.below(8));
                        let opcode = 1 + random.below(2) as u8;
                        let mark = random.next() as u8;
                        if opcode == 1 {
                            rig.memory.fill(GuestAddress(at), mark, 4096).unwrap();
                        }
                        let cmd = Cmd::new(opcode, 1).prp(at, 0).blocks(base + start, count as u32);
                        assert_eq!(rig.run(queue, cmd).status, 0);
                        for block in start..start + count {
                            let place = &mut model[block as usize];
                            if opcode == 1 {
                                *place = Some(mark);
                            } else if let Some(mark) = *place {
                                let bytes = rig.bytes(at + (block - start) * 512, 512);
                                assert!(bytes.iter().all(|b| *b == mark), "queue {queue} block {block}");
                            }
                        }
                    }
                });
            }
        });
    }
}
