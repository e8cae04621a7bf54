//! The balloon as a driver, and as a hostile guest, sees it.

use ringfence_engine::Stateful;

use super::*;
use crate::device::lock;
use crate::virtio::spec::status;
use crate::virtio::testing::{DATA, Driver, RAM};

const LIST: u64 = 0x8_0000;

fn running(target: u64) -> (Arc<Balloon>, Driver) {
    let balloon = Balloon::new(target);
    let driver = Driver::running(Arc::clone(&balloon) as _, feature::REPORTING, 3);
    driver.memory.fill(GuestAddress(DATA), 7, 0x10_0000).unwrap();
    (balloon, driver)
}

fn inflate(driver: &Driver, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.put(LIST, &bytes);
    driver.submit(queue::INFLATE, &[(LIST, bytes.len() as u32, false)]);
}

#[test]
fn target_and_what_the_guest_gives_up_are_told_in_pages() {
    let (balloon, driver) = running(10 * 4096 + 5);
    assert_eq!(driver.config::<4>(0), 10_u32.to_le_bytes());
    balloon.set_target(u64::MAX);
    assert_eq!(driver.config::<4>(0), u32::MAX.to_le_bytes());
    driver.set_config(0, &[1; 4]);
    assert_eq!(driver.config::<4>(0), u32::MAX.to_le_bytes(), "the guest cannot set the target");
    driver.set_config(4, &3_u32.to_le_bytes());
    assert_eq!(balloon.actual(), 3 * 4096);
    driver.function.quiesce();
    let saved = driver.function.save();
    let other = Balloon::new(0);
    let second = Driver::new(Arc::clone(&other) as _);
    second.function.restore(&saved).unwrap();
    assert_eq!((other.actual(), second.config::<4>(0)), (3 * 4096, u32::MAX.to_le_bytes()));
}

#[test]
fn inflated_pages_go_back_and_read_as_zeroes() {
    let (balloon, driver) = running(0);
    let first = (DATA >> 12) as u32;
    inflate(&driver, &[first + 2, first + 1, first + 5, first + 6, first + 9]);
    assert_eq!(driver.take(queue::INFLATE), Some(0));
    assert_eq!(balloon.released(), 5 * 4096);
    for page in 0..11 {
        let gone = [1, 2, 5, 6, 9].contains(&page);
        let expected = if gone { 0 } else { 7 };
        assert_eq!(driver.get(DATA + page * 4096, 4096), vec![expected; 4096], "page {page}");
    }
    driver.put(LIST, &first.to_le_bytes());
    driver.submit(queue::DEFLATE, &[(LIST, 4, false)]);
    assert_eq!(driver.take(queue::DEFLATE), Some(0));
}

#[test]
fn pages_that_are_not_there_are_left_out() {
    let (balloon, driver) = running(0);
    inflate(&driver, &[u32::MAX, u32::MAX - 1, (RAM >> 12) as u32, 0x8000_0000]);
    assert_eq!(driver.take(queue::INFLATE), Some(0));
    assert_eq!(balloon.released(), 0);
    assert!(lock(&driver.told).is_empty());
}

#[test]
fn reported_memory_goes_back_in_whole_pages() {
    let (balloon, driver) = running(0);
    driver.submit(queue::REPORT, &[(DATA, 0x2_0000, true), (DATA + 0x4_0800, 0x2000, true)]);
    assert_eq!(driver.take(queue::REPORT), Some(0));
    assert_eq!(balloon.released(), 0x2_0000 + 0x1000);
    assert_eq!(driver.get(DATA, 0x2_0000), vec![0; 0x2_0000]);
    assert_eq!(driver.get(DATA + 0x4_0000, 0x1000), vec![7; 0x1000]);
}

#[test]
fn request_with_too_many_pages_breaks_the_device_and_releases_nothing() {
    let (balloon, driver) = running(0);
    driver.submit(queue::INFLATE, &[(DATA, 0x10_0000, false)]);
    assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET);
    assert_eq!((balloon.released(), lock(&driver.told).len()), (0, 1));
    driver.start(feature::REPORTING, 3);
    inflate(&driver, &[(DATA >> 12) as u32]);
    assert_eq!(balloon.released(), 4096, "it works after a reset");
}
