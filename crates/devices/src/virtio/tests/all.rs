//! Every device against drivers that break the rules: a table of devices, and tables of what drivers do to them.

mod subjects;

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};

use ringfence_engine::{SavedState, Stateful};
use subjects::{SUBJECTS, Subject};

use super::driver::SIZE;
use crate::device::lock;
use crate::virtio::guest::{Buffer, DATA, Descriptor, Guest, RAM, ROM};
use crate::virtio::spec::{common, descriptor, feature, isr, status};

const NEXT: u16 = descriptor::NEXT;
const WRITE: u16 = descriptor::WRITE;
const INDIRECT: u16 = descriptor::INDIRECT;
/// Where the tables of indirect descriptors are.
const TABLE: u64 = 0xf_0000;
/// What memory is filled with.
const FILL: u8 = 7;
/// Up to here there are queues.
const BELOW: u64 = 0x8_0000;

/// Descriptors from index 0 on, the first of which is the head.
type Table = &'static [Descriptor];

const END: Table = &[(DATA, 1, 0, 0)];
/// Chains that no device may take: their descriptors in the queue's table and in one for indirect ones, and what the user is told.
const BAD_CHAINS: &[(Table, Table, &str)] = &[
    (&[(DATA, 1, NEXT, 0)], &[], "longer than it may be, or a loop"),
    (&[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 2), (DATA, 0, NEXT, 1)], &[], "longer than it may be, or a loop"),
    (&[(DATA, 0, NEXT | WRITE, 1), (DATA, 0, NEXT | WRITE, 0)], &[], "longer than it may be, or a loop"),
    (&[(DATA, 1, NEXT, 16)], &[], "past the end of its table"),
    (&[(DATA, 1, NEXT, u16::MAX)], &[], "past the end of its table"),
    (&[(RAM - 1, 2, 0, 0)], &[], "not in memory that the device may use"),
    (&[(RAM - 1, 2, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(RAM, 1, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(u64::MAX, 1, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(u64::MAX - 3, 8, 0, 0)], &[], "not in memory that the device may use"),
    (&[(u64::MAX - 3, 8, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(0, u32::MAX, 0, 0)], &[], "not in memory that the device may use"),
    (&[(0, u32::MAX, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(ROM, 1, WRITE, 0)], &[], "not in memory that the device may use"),
    (&[(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)], &[], "to be read follows"),
    (&[(TABLE, 32, INDIRECT, 0)], &[(TABLE, 16, INDIRECT, 0), (DATA, 1, 0, 0)], "not allowed there"),
    (&[(TABLE, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 1), (TABLE, 16, INDIRECT, 0)], "not allowed there"),
    (&[(TABLE, 0, INDIRECT, 0)], END, "not allowed there or has a wrong length"),
    (&[(TABLE, 17, INDIRECT, 0)], END, "not allowed there or has a wrong length"),
    (&[(TABLE, 1025 * 16, INDIRECT, 0)], END, "not allowed there or has a wrong length"),
    (&[(TABLE, u32::MAX - 15, INDIRECT, 0)], END, "not allowed there or has a wrong length"),
    (&[(TABLE, 16, INDIRECT | NEXT, 1), (DATA, 1, 0, 0)], END, "not allowed there"),
    (&[(TABLE, 16, INDIRECT, 0)], &[(DATA, 1, NEXT, 1)], "past the end of its table"),
    (&[(TABLE, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], "a loop"),
    (&[(RAM, 16, INDIRECT, 0)], &[], "not in memory"),
    (&[(u64::MAX - 15, 32, INDIRECT, 0)], &[], "not in memory"),
];

/// A device with memory that is easy to compare, and every feature agreed on.
fn ready(make: fn() -> Subject) -> Subject {
    let subject = make();
    subject.driver.memory.fill(ringfence_memory::GuestAddress(BELOW), FILL, RAM - BELOW).unwrap();
    subject.start();
    subject
}

/// The device has broken, has said so to user and driver, does nothing more, and works again after a reset.
fn expect_broken(subject: &Subject, message: &str, case: &str) {
    let driver = &subject.driver;
    driver.wait(case, || driver.is_broken());
    let told = lock(&driver.told).clone();
    assert!(told.len() == 1 && told[0].contains(message), "{case}: {told:?}");
    assert!(driver.read(0x1000, 1) & u64::from(isr::CONFIG) != 0, "{case}: the driver is told");
    let before: Vec<u16> = (0..driver.queues()).map(|queue| driver.used_index(queue)).collect();
    for queue in 0..driver.queues() {
        driver.describe(Guest::table(queue), 0, (DATA, 64, WRITE, 0));
        driver.offer(queue, 0);
        subject.stir(queue);
    }
    let after: Vec<u16> = (0..driver.queues()).map(|queue| driver.used_index(queue)).collect();
    assert_eq!(before, after, "{case}: a broken device does nothing");
    subject.start();
    subject.works();
    assert_eq!(lock(&driver.told).len(), 1, "{case}: it is told once");
}

#[test]
fn bad_chains_break_every_device_until_it_is_reset() {
    for &(name, make) in SUBJECTS {
        for (index, &(direct, indirect, message)) in BAD_CHAINS.iter().enumerate() {
            for queue in make().looked_at() {
                let subject = ready(make);
                let driver = &subject.driver;
                let case = format!("{name}, queue {queue}, chain {index}");
                for (part, index) in direct.iter().zip(0..) {
                    driver.describe(Guest::table(queue), index, *part);
                }
                for (part, index) in indirect.iter().zip(0..) {
                    driver.describe(TABLE, index, *part);
                }
                let memory = driver.get(DATA, (RAM - DATA) as usize);
                driver.offer(queue, 0);
                subject.stir(queue);
                driver.wait(&case, || driver.is_broken());
                assert_eq!(driver.used_index(queue), 0, "{case}");
                assert!(memory == driver.get(DATA, memory.len()), "{case}: memory was written");
                driver.check_rom();
                expect_broken(&subject, message, &case);
            }
        }
    }
}

#[test]
fn bad_rings_break_every_device_until_it_is_reset() {
    for &(name, make) in SUBJECTS {
        for queue in make().looked_at() {
            let subject = ready(make);
            let size = if name == "echo" { SIZE } else { 16 };
            subject.driver.store(Guest::ring(queue) + 2, size + 1);
            subject.stir(queue);
            expect_broken(&subject, "further on than the queue is long", name);
            let subject = ready(make);
            subject.driver.offer(queue, 16);
            subject.stir(queue);
            expect_broken(&subject, "past the end of its table", name);
        }
    }
}

#[test]
fn tables_that_were_not_agreed_on_break_every_device() {
    for &(name, make) in SUBJECTS {
        for queue in make().looked_at() {
            let subject = make();
            let driver = &subject.driver;
            Guest::start(driver, driver.function.core.features & !feature::INDIRECT, driver.queues());
            driver.describe(TABLE, 0, (DATA, 1, 0, 0));
            driver.describe(Guest::table(queue), 0, (TABLE, 16, INDIRECT, 0));
            driver.offer(queue, 0);
            subject.stir(queue);
            expect_broken(&subject, "not allowed there", name);
        }
    }
}

/// What becomes of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Broken,
    Waits,
}

/// Chains that are whole, and of a shape that devices do not expect: of nothing, to be read, to be written, much of either.
const SHAPES: [&[Buffer]; 6] = [
    &[(DATA, 0, false)],
    &[(DATA, 0, false), (DATA, 0, true)],
    &[(DATA, 64, false)],
    &[(DATA, 64, true)],
    &[(DATA, (RAM - DATA) as u32, false)],
    &[(DATA, (RAM - DATA) as u32, true)],
];

#[test]
fn chains_of_odd_shapes_end_and_touch_nothing_else() {
    for &(name, make) in SUBJECTS {
        for &(queue, ends) in make().ends {
            for (shape, end) in SHAPES.iter().zip(ends) {
                let subject = ready(make);
                let driver = &subject.driver;
                let case = format!("{name}, queue {queue}, {shape:x?}");
                let before = driver.get(BELOW, (RAM - BELOW) as usize);
                driver.submit(queue, shape);
                subject.stir(queue);
                match end {
                    End::Done => driver.wait(&case, || driver.used_index(queue) == 1 || driver.is_broken()),
                    End::Broken => driver.wait(&case, || driver.is_broken()),
                    End::Waits => std::thread::sleep(std::time::Duration::from_millis(10)),
                }
                let got = match (driver.is_broken(), driver.used_index(queue)) {
                    (true, 0) => End::Broken,
                    (false, 1) => End::Done,
                    (false, 0) => End::Waits,
                    other => panic!("{case}: {other:?}"),
                };
                assert_eq!(got, end, "{case}");
                let writable = shape.iter().filter(|buffer| buffer.2).map(|buffer| buffer.1).max();
                let (from, len) = ((DATA - BELOW) as usize, writable.unwrap_or(0) as usize);
                let after = driver.get(BELOW, before.len());
                assert!(after[..from] == before[..from], "{case}: memory below was written");
                assert!(after[from + len..] == before[from + len..], "{case}: memory above was written");
                driver.check_rom();
                subject.start();
                subject.works();
            }
        }
    }
}

#[test]
fn registers_written_at_the_wrong_time_change_nothing_in_any_device_or_break_it() {
    for &(_, make) in SUBJECTS {
        let subject = make();
        let driver = &subject.driver;
        // Nothing is enabled, nothing agreed on.
        for queue in 0..driver.queues() {
            driver.kick(queue);
            driver.write(common::QUEUE_SELECT, 2, queue.into());
            driver.write(common::QUEUE_RESET, 2, 1);
        }
        driver.function.write_registers(0x2000, &[0xff; 64]);
        driver.write(common::QUEUE_ENABLE, 2, 1);
        assert!(driver.is_broken() && driver.read(common::QUEUE_ENABLE, 2) == 0);
        driver.reset();
        driver.set_status(status::DRIVER_OK);
        assert!(driver.is_broken());
        // Ready, but without a single queue.
        driver.start(driver.function.core.features, 0);
        (0..driver.queues()).for_each(|queue| subject.stir(queue));
        assert!(!driver.is_broken());
        subject.start();
        for (register, len, value) in [
            (common::QUEUE_SIZE, 2, 4),
            (common::QUEUE_DESCRIPTORS, 8, DATA),
            (common::QUEUE_DRIVER, 4, DATA),
            (common::QUEUE_DEVICE, 8, DATA),
            (common::QUEUE_ENABLE, 2, 0),
            (common::DRIVER_FEATURE, 4, 0),
            (common::NUM_QUEUES, 2, 7),
            (common::GENERATION, 1, 7),
            (common::STATUS, 1, 1),
            (common::STATUS, 1, 15),
            (common::STATUS, 2, 0),
            (common::QUEUE_RESET, 2, 2),
            (0x1000, 1, 0xff),
            (0x3f00, 2, 3),
            (0xfff, 8, u64::MAX),
        ] {
            for queue in 0..driver.queues() + 2 {
                driver.write(common::QUEUE_SELECT, 2, queue.into());
                driver.write(register, len, value);
            }
            subject.works();
        }
        assert_eq!(lock(&driver.told).len(), 1);
    }
}

#[test]
fn resets_of_queues_and_devices_under_load_end() {
    for &(name, make) in SUBJECTS {
        let subject = ready(make);
        let (driver, stop) = (&subject.driver, AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The other end takes and sends as fast as it can.
                while let (false, Some(other)) = (stop.load(Ordering::Relaxed), &subject.other) {
                    let mut buffer = vec![0; 1 << 17];
                    while let Ok(Some(_)) = other.receive(&mut buffer, false) {}
                    let _ = other.send(&[IoSlice::new(&subject.message())]);
                }
            });
            for round in 0..120_u16 {
                for _ in 0..8 {
                    subject.load.iter().for_each(|(queue, chain)| driver.submit(*queue, chain));
                }
                match round % 3 {
                    0 => {
                        let queue = round / 3 % driver.queues();
                        driver.write(common::QUEUE_SELECT, 2, queue.into());
                        driver.write(common::QUEUE_RESET, 2, 1);
                        driver.wait(name, || driver.read(common::QUEUE_RESET, 2) == 0);
                        assert_eq!(driver.read(common::QUEUE_ENABLE, 2), 0);
                        driver.enable(queue);
                    }
                    1 => subject.start(),
                    // Reset once more before the first is done.
                    _ => {
                        driver.set_status(0);
                        subject.start();
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(lock(&driver.told).is_empty(), "{name}: {:?}", lock(&driver.told));
        driver.check_rom();
        subject.start();
        subject.works();
    }
}

/// A state as text and back.
fn through_text(saved: &SavedState) -> SavedState {
    serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
}

#[test]
fn saved_state_of_every_device_goes_on_and_what_cannot_be_is_refused() {
    for &(name, make) in SUBJECTS {
        let subject = ready(make);
        let driver = &subject.driver;
        subject.works();
        driver.function.quiesce();
        let saved = through_text(&driver.function.save());
        assert_eq!(saved, driver.function.save(), "{name} stands still");
        crate::Device::reset(&*driver.function);
        assert_ne!(driver.function.save(), saved, "{name}");
        driver.function.restore(&saved).unwrap();
        // The driver notices nothing.
        subject.works();
        for (path, value) in [
            ("/registers/status", serde_json::json!(255)),
            ("/registers/driver_features", serde_json::json!(1_u64 << 63)),
            ("/registers/queues/0/size", serde_json::json!(7)),
            ("/registers/queues/0/device", serde_json::json!(RAM)),
            ("/registers/queues", serde_json::json!([])),
            ("/registers/postponed", serde_json::json!([[99, 0, 0]])),
            ("/endpoint", serde_json::json!({})),
        ] {
            let mut wrong = saved.clone();
            *wrong.fields.pointer_mut(path).unwrap() = value;
            assert!(driver.function.restore(&wrong).is_err(), "{name}: {path}");
            subject.works();
        }
        assert!(lock(&driver.told).is_empty(), "{name}: {:?}", lock(&driver.told));
    }
}

#[test]
fn every_device_is_saved_under_load_and_begins_anew() {
    for &(name, make) in SUBJECTS {
        for round in 0..20 {
            let subject = ready(make);
            let driver = &subject.driver;
            for _ in 0..round % 5 {
                subject.load.iter().for_each(|(queue, chain)| driver.submit(*queue, chain));
            }
            driver.function.quiesce();
            let saved = through_text(&driver.function.save());
            crate::Device::reset(&*driver.function);
            driver.function.restore(&saved).unwrap();
            (0..driver.queues()).for_each(|queue| subject.stir(queue));
            subject.start();
            subject.works();
            assert!(lock(&driver.told).is_empty(), "{name}: {:?}", lock(&driver.told));
        }
    }
}
