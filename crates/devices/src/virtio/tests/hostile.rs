//! Drivers that break the rules, and a device that shows what the core makes of it. What holds for all devices is in `all`.

use std::sync::atomic::Ordering;

use ringfence_memory::{GuestAddress, GuestMemory};

use super::driver::{Driver, Echo, SIZE};
use crate::device::lock;
use crate::testing::Random;
use crate::virtio::guest::{RAM, ROM};
use crate::virtio::queue::{Broken, Queue};
use crate::virtio::spec::{common, descriptor, feature, status};

const NEXT: u16 = descriptor::NEXT;
const WRITE: u16 = descriptor::WRITE;

#[test]
fn chain_of_4_gib_is_refused_and_one_byte_less_is_not() {
    // Memory that is there and never touched but for the rings.
    let memory = GuestMemory::flat(1 << 30).unwrap();
    let mut queue = Queue { descriptors: 0, driver: 0x1000, device: 0x2000, ..Queue::new(8) };
    let mut take = |last: u32| {
        for (index, len) in (0_u16..).zip([1 << 30, 1 << 30, 1 << 30, last]) {
            let (flags, next) = if index < 3 { (WRITE | NEXT, index + 1) } else { (WRITE, 0) };
            let bytes = u128::from(next) << 112 | u128::from(flags) << 96 | u128::from(len) << 64;
            memory.write_bytes(GuestAddress(u64::from(index) * 16), &u128::to_le_bytes(bytes)).unwrap();
        }
        memory.write(GuestAddress(0x1002), queue.next_available.wrapping_add(1)).unwrap();
        queue.take(&memory, true, false)
    };
    assert_eq!(take(1 << 30), Err(Broken::TooMuch));
    let (_, pieces) = take((1 << 30) - 1).unwrap().unwrap();
    assert_eq!(pieces.writable.iter().map(|(_, len)| len).sum::<u64>(), u64::from(u32::MAX));
}

#[test]
fn bad_rings_are_refused_when_they_are_enabled() {
    for (register, value, message) in [
        (common::QUEUE_SIZE, 0, "power of two"),
        (common::QUEUE_SIZE, 6, "power of two"),
        (common::QUEUE_SIZE, 16, "power of two"),
        (common::QUEUE_DESCRIPTORS, 0x1008, "aligned memory"),
        (common::QUEUE_DESCRIPTORS, RAM - 16, "aligned memory"),
        (common::QUEUE_DRIVER, 0x1401, "aligned memory"),
        (common::QUEUE_DRIVER, u64::MAX - 1, "aligned memory"),
        (common::QUEUE_DEVICE, 0x1802, "aligned memory"),
        (common::QUEUE_DEVICE, ROM, "aligned memory"),
    ] {
        let driver = Driver::new();
        driver.set_features(feature::CORE);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        driver.write(common::QUEUE_DESCRIPTORS, 8, Driver::table(0));
        driver.write(common::QUEUE_DRIVER, 8, Driver::ring(0));
        driver.write(common::QUEUE_DEVICE, 8, Driver::used(0));
        driver.write(register, if register == common::QUEUE_SIZE { 2 } else { 8 }, value);
        driver.write(common::QUEUE_ENABLE, 2, 1);
        assert_eq!(driver.read(common::QUEUE_ENABLE, 2), 0);
        driver.assert_broken(message);
    }
}

#[test]
fn registers_written_at_the_wrong_time_change_nothing_or_break() {
    let driver = Driver::new();
    driver.write(common::QUEUE_ENABLE, 2, 1);
    driver.assert_broken("before features were agreed on");

    let driver = Driver::new();
    driver.set_status(status::DRIVER_OK);
    assert!(lock(&driver.echo.activated).is_empty());
    driver.assert_broken("before features were agreed on");

    let driver = Driver::ready();
    for (register, len, value) in [
        (common::QUEUE_SIZE, 2, 4),
        (common::QUEUE_DESCRIPTORS, 8, 0x5000),
        (common::QUEUE_DRIVER, 4, 0x5000),
        (common::QUEUE_DEVICE, 8, 0x5000),
        (common::QUEUE_ENABLE, 2, 0),
        (common::DRIVER_FEATURE, 4, 0),
        (common::NUM_QUEUES, 2, 7),
        (common::GENERATION, 1, 7),
        (common::STATUS, 1, 1),
        (common::STATUS, 2, 0),
        (common::QUEUE_RESET, 2, 2),
        (common::QUEUE_SIZE + 1, 1, 1),
        (0x1000, 1, 0xff),
        (0x3f00, 2, 3),
        (0xfff, 8, u64::MAX),
    ] {
        for queue in [0, 1, 2, 0xffff] {
            driver.write(common::QUEUE_SELECT, 2, queue);
            driver.write(register, len, value);
        }
        assert_eq!(driver.send(0, 0, "still"), "still", "{register:#x}");
    }
    assert!(lock(&driver.told).is_empty());
}

#[test]
fn message_comes_once_however_often_rules_are_broken() {
    let driver = Driver::ready();
    for _ in 0..5 {
        driver.offer(0, SIZE);
        driver.kick(0);
        assert!(driver.status() & status::NEEDS_RESET != 0);
        driver.start(feature::CORE);
    }
    assert_eq!(lock(&driver.told).len(), 1);
    assert!(lock(&driver.told)[0].contains("virtio-test.0"));
}

#[test]
fn reset_waits_for_what_is_in_flight() {
    let driver = Driver::ready();
    driver.echo.holds.store(true, Ordering::Relaxed);
    driver.echo.busy.store(true, Ordering::Relaxed);
    for (queue, head) in [(0, 0), (0, 1), (1, 0)] {
        driver.describe(Driver::table(queue), head, (0x9000, 8, WRITE, 0));
        driver.offer(queue, head);
        driver.kick(queue);
    }
    let before = driver.status();
    driver.set_status(0);
    assert_eq!(driver.status(), before, "not done yet");
    // Nothing helps until then.
    driver.set_status(0);
    driver.set_status(status::ACKNOWLEDGE);
    driver.kick(0);
    let mut held = std::mem::take(&mut *lock(&driver.echo.held));
    let last = held.pop().unwrap();
    held.into_iter().for_each(Echo::echo);
    assert_eq!(driver.status(), before);
    last.complete(8);
    assert_eq!((driver.status(), driver.used_index(0), driver.used_index(1)), (0, 0, 0));
    driver.echo.holds.store(false, Ordering::Relaxed);
    driver.start(feature::CORE);
    assert_eq!(driver.send(0, 0, "new"), "new");
}

#[test]
fn one_queue_is_reset_while_the_other_works() {
    let driver = Driver::ready();
    driver.echo.holds.store(true, Ordering::Relaxed);
    driver.echo.busy.store(true, Ordering::Relaxed);
    driver.describe(Driver::table(0), 0, (0x9000, 8, WRITE, 0));
    driver.offer(0, 0);
    driver.kick(0);
    driver.echo.holds.store(false, Ordering::Relaxed);
    driver.write(common::QUEUE_SELECT, 2, 0);
    driver.write(common::QUEUE_RESET, 2, 1);
    assert_eq!((driver.read(common::QUEUE_RESET, 2), driver.read(common::QUEUE_ENABLE, 2)), (1, 0));
    driver.write(common::QUEUE_ENABLE, 2, 1);
    assert_eq!(driver.send(1, 3, "other"), "other");
    let held = std::mem::take(&mut *lock(&driver.echo.held));
    held.into_iter().for_each(Echo::echo);
    assert_eq!((driver.read(common::QUEUE_RESET, 2), driver.read(common::QUEUE_ENABLE, 2)), (0, 0));
    assert_eq!(driver.used_index(0), 0, "its memory is the driver's again");
    driver.enable(0);
    assert_eq!(driver.send(0, 2, "anew"), "anew");
    assert!(lock(&driver.told).is_empty());
}

#[test]
fn resets_under_load_from_other_threads_end() {
    let driver = Driver::ready();
    driver.echo.holds.store(true, Ordering::Relaxed);
    driver.echo.busy.store(true, Ordering::Relaxed);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let echo = std::sync::Arc::clone(&driver.echo);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let held = std::mem::take(&mut *lock(&echo.held));
                held.into_iter().for_each(Echo::echo);
            }
            drop(std::mem::take(&mut *lock(&echo.held)));
        });
        for round in 0..200 {
            for head in 0..SIZE {
                driver.describe(Driver::table(0), head, (0x9000, 8, WRITE, 0));
                driver.offer(0, head);
                driver.kick(0);
            }
            if round % 2 == 0 {
                driver.write(common::QUEUE_SELECT, 2, 0);
                driver.write(common::QUEUE_RESET, 2, 1);
                while driver.read(common::QUEUE_RESET, 2) != 0 {
                    std::thread::yield_now();
                }
                driver.enable(0);
            } else {
                driver.set_status(0);
                while driver.status() != 0 {
                    std::thread::yield_now();
                }
                driver.start(feature::CORE);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(lock(&driver.told).is_empty());
}

#[test]
fn random_accesses_and_garbage_in_rings_harm_nobody() {
    let mut random = Random::new(7);
    for _ in 0..40 {
        let driver = Driver::ready();
        for _ in 0..500 {
            let offset = match random.below(4) {
                0 => random.below(0x40),
                1 => 0x3000 + random.below(3) * 4,
                _ => random.below(0x4000),
            };
            let len = [1, 2, 4, 8][random.below(4) as usize];
            match random.below(4) {
                0 => drop(driver.read(offset, len)),
                1 => driver.write(offset, len, random.next()),
                2 => driver.memory.write(GuestAddress(0x1000 + random.below(0x1ff8)), random.next()).unwrap(),
                _ => driver.kick((random.below(3)) as u16),
            }
        }
        driver.start(feature::CORE);
        assert_eq!(driver.send(0, 0, "works"), "works");
        assert!(lock(&driver.told).len() <= 1);
    }
}
