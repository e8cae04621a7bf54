use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::Device;
use crate::testing::{Bench, poke, read16};

const SECOND: u64 = 1_000_000_000;

struct Lab {
    bench: Bench,
    watchdog: Arc<Watchdog>,
    count: Arc<AtomicU32>,
}

fn lab() -> Lab {
    let (bench, count) = (Bench::new(), Arc::new(AtomicU32::new(0)));
    let counter = Arc::clone(&count);
    let expired = move || {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    let watchdog = Watchdog::new(Arc::clone(&bench.clock), &bench.timers, expired);
    Lab { bench, watchdog, count }
}

impl Lab {
    fn set(&self, register: u64, value: u16) {
        self.watchdog.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u16 {
        read16(&*self.watchdog, register)
    }

    fn expired(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }
}

#[test]
fn neglected_timer_expires_once_and_stops() {
    let lab = lab();
    lab.set(PRESET, 50);
    lab.set(CONTROL, 1);
    lab.bench.run_for(5 * SECOND - 1);
    assert_eq!((lab.expired(), lab.get(LEFT), lab.get(CONTROL), lab.get(STATUS)), (0, 1, 1, 0));
    lab.bench.run_for(1);
    assert_eq!((lab.expired(), lab.get(CONTROL), lab.get(STATUS)), (1, 0, 1));
    lab.bench.run_for(100 * SECOND);
    assert_eq!(lab.expired(), 1);
    lab.watchdog.reset();
    assert_eq!((lab.get(STATUS), lab.get(PRESET)), (1, FIRST_PRESET), "why it was reset is still known");
    lab.set(STATUS, 0);
    assert_eq!(lab.get(STATUS), 0);
    lab.set(STATUS, 1);
    assert_eq!(lab.get(STATUS), 0, "the guest cannot set it");
}

#[test]
fn petted_timer_does_not_expire() {
    let lab = lab();
    lab.set(PRESET, 10);
    lab.set(CONTROL, 1);
    for _ in 0..20 {
        lab.bench.run_for(SECOND - 1);
        lab.set(LEFT, 1);
    }
    assert_eq!(lab.expired(), 0);
    // Starting what runs is no petting.
    lab.bench.run_for(SECOND / 2);
    lab.set(CONTROL, 1);
    lab.bench.run_for(SECOND / 2);
    assert_eq!(lab.expired(), 1);
}

#[test]
fn stopped_timer_neither_expires_nor_starts_by_petting() {
    let lab = lab();
    lab.set(PRESET, 10);
    lab.set(LEFT, 1);
    assert_eq!(lab.get(CONTROL), 0);
    lab.set(CONTROL, 1);
    lab.set(CONTROL, 0);
    lab.bench.run_for(100 * SECOND);
    assert_eq!((lab.expired(), lab.get(LEFT)), (0, 10));
    lab.set(CONTROL, 1);
    lab.watchdog.reset();
    lab.bench.run_for(100 * SECOND);
    assert_eq!(lab.expired(), 0, "a reset stops it");
}

#[test]
fn new_setting_counts_from_the_next_start() {
    let lab = lab();
    lab.set(PRESET, 20);
    lab.set(CONTROL, 1);
    lab.set(PRESET, 100);
    lab.bench.run_for(SECOND);
    lab.set(LEFT, 1);
    lab.bench.run_for(9 * SECOND);
    assert_eq!((lab.expired(), lab.get(LEFT)), (0, 10));
    lab.set(PRESET, 0);
    lab.set(LEFT, 1);
    lab.bench.run_for(SECOND / 10);
    assert_eq!(lab.expired(), 1, "none is one period");
}

#[test]
fn saved_timer_goes_on_in_another_machine() {
    let lab = lab();
    lab.set(PRESET, 30);
    lab.set(CONTROL, 1);
    lab.bench.run_for(SECOND);
    let saved = lab.watchdog.save();
    let other = self::lab();
    other.bench.run_to(SECOND);
    other.watchdog.restore(&saved).unwrap();
    assert_eq!((other.get(LEFT), other.watchdog.save()), (20, saved));
    other.bench.run_for(2 * SECOND);
    assert_eq!(other.expired(), 1);
}

#[test]
fn odd_accesses_change_nothing() {
    let lab = lab();
    for (offset, data) in
        [(0, &[1_u8][..]), (1, &[1, 1]), (0, &[1, 0, 1, 0]), (4, &[1]), (3, &[1, 0]), (8, &[1, 0])]
    {
        lab.watchdog.write(offset, data);
    }
    assert_eq!((lab.get(PRESET), lab.get(CONTROL), lab.get(8)), (FIRST_PRESET, 0, 0));
    poke(&*lab.watchdog, 8, &lab.bench, 17);
}
