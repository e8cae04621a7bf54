//! A disk as a driver, and as a hostile guest, sees it.

use std::sync::Arc;

use ringfence_disk::{BlockDevice, DiskInfo, DiskOptions, IoError, IoKind, open};
use ringfence_engine::Stateful;

use super::config::feature;
use super::*;
use crate::device::lock;
use crate::testing::Held;
use crate::virtio::spec::{common, status};
use crate::virtio::testing::{DATA, Driver, RAM};

const HEADER: u64 = 0x8_0000;
const STATUS: u64 = HEADER + 0x100;

fn image(len: usize) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 9) as u8).collect();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn blk(
    image: &tempfile::NamedTempFile,
    options: &str,
    block_size: Option<u32>,
) -> Result<Arc<Blk>, BlkError> {
    let spec = format!("{}{options}", image.path().display()).parse().unwrap();
    let disk = open(&DiskOptions::new(spec)).unwrap();
    Blk::new(BlkConfig { disk, block_size, serial: "disk7".into(), queues: 2 })
}

/// Everything that a disk offers but switching its cache.
const ALL: u64 = feature::ALWAYS | feature::DISCARD | feature::WRITE_ZEROES;

fn running(image: &tempfile::NamedTempFile) -> Driver {
    Driver::running(blk(image, "", None).unwrap(), ALL, 2)
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    driver.put(HEADER, &bytes);
    driver.put(STATUS, &[0xee]);
}

/// One request on a queue: its status and the bytes that the device says it wrote.
fn request(driver: &Driver, queue: u16, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    header(driver, kind, sector);
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend(data);
    chain.push((STATUS, 1, true));
    driver.submit(queue, &chain);
    let written = driver.wait_for(queue);
    (driver.get(STATUS, 1)[0], written)
}

#[test]
fn data_goes_to_the_image_and_comes_back_on_every_queue() {
    let image = image(64 << 10);
    let driver = running(&image);
    assert_eq!(driver.config::<8>(0), 128_u64.to_le_bytes(), "capacity in sectors");
    for queue in 0..2 {
        let fill = vec![0xa0 + queue as u8; 1024];
        driver.put(DATA, &fill);
        assert_eq!(request(&driver, queue, 1, 4, &[(DATA, 1024, false)]), (0, 1));
        assert_eq!(request(&driver, queue, 0, 3, &[(DATA + 0x1000, 2048, true)]), (0, 2049));
        let read = driver.get(DATA + 0x1000, 2048);
        assert_eq!(read[512..1536], fill);
        assert_eq!(request(&driver, queue, 4, 0, &[]), (0, 1));
        let file = std::fs::read(image.path()).unwrap();
        assert_eq!(file[2048..3072], fill);
        assert_eq!((&file[1536..2048], &file[3072..3584]), (&read[..512], &read[1536..]));
    }
    assert!(lock(&driver.told).is_empty());
    assert!(driver.bench.level(17), "the pin is high");
}

#[test]
fn serial_number_is_cut_to_what_there_is_room_for() {
    let image = image(4096);
    let driver = running(&image);
    assert_eq!(request(&driver, 0, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(driver.get(DATA, 20), *b"disk7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    driver.put(DATA, &[1; 20]);
    assert_eq!(request(&driver, 0, 8, 0, &[(DATA, 3, true)]), (0, 4));
    assert_eq!(driver.get(DATA, 5), [b'd', b'i', b's', 1, 1]);
}

#[test]
fn zeroes_and_discards_reach_their_ranges_only() {
    let image = image(64 << 10);
    let before = std::fs::read(image.path()).unwrap();
    let driver = running(&image);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend([count.to_le_bytes(), flags.to_le_bytes()].concat());
        driver.put(DATA, &bytes);
    };
    for flags in [0, 1] {
        range(8 + u64::from(flags) * 8, 8, flags);
        assert_eq!(request(&driver, 0, 13, 0, &[(DATA, 16, false)]).0, 0);
    }
    let after = std::fs::read(image.path()).unwrap();
    assert!(after[4096..12288].iter().all(|byte| *byte == 0));
    assert_eq!((&after[..4096], &after[12288..]), (&before[..4096], &before[12288..]));
    range(64, 16, 0);
    assert_eq!(request(&driver, 0, 11, 0, &[(DATA, 16, false)]).0, 0);
    for (sector, count, flags, kind, expected) in [
        (120, 9, 0, 11, 1),
        (u64::MAX, 1, 0, 11, 1),
        (0, u32::MAX, 0, 13, 1),
        (0, 0, 0, 13, 1),
        (0, 1, 1, 11, 2),
        (0, 1, 2, 13, 2),
    ] {
        range(sector, count, flags);
        let told = request(&driver, 0, kind, 0, &[(DATA, 16, false)]).0;
        assert_eq!(told, expected, "{kind} {sector} {count} {flags}");
    }
    assert_eq!(request(&driver, 0, 13, 0, &[(DATA, 15, false)]).0, 1, "half a range");
    assert_eq!(request(&driver, 0, 13, 0, &[(DATA, 32, false)]).0, 1, "two ranges");
    assert_eq!(request(&driver, 0, 11, 0, &[]).0, 1, "no range");
    let last = std::fs::read(image.path()).unwrap();
    assert_eq!(last[12288..32768], after[12288..32768]);
    assert_eq!(last[40960..], after[40960..]);
}

#[test]
fn what_cannot_be_done_is_an_error_to_the_guest_and_changes_nothing() {
    let image = image(8192);
    let before = std::fs::read(image.path()).unwrap();
    let driver = running(&image);
    let data = |len| [(DATA, len, false)];
    for (sector, len) in [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX / 512 + 1, 512), (0, 511), (0, 0)]
    {
        assert_eq!(request(&driver, 0, 1, sector, &data(len)).0, 1, "{sector} {len}");
        assert_eq!(request(&driver, 0, 0, sector, &[(DATA, len, true)]).0, 1, "{sector} {len}");
    }
    assert_eq!(
        request(&driver, 0, 0, 0, &[(DATA, (RAM - DATA) as u32, true)]).0,
        1,
        "more than the disk has"
    );
    assert_eq!(request(&driver, 0, 77, 0, &data(512)).0, 2, "an unknown request");
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
    assert!(lock(&driver.told).is_empty(), "none of this breaks the device");
}

#[test]
fn read_only_disk_says_so_and_takes_no_writes() {
    let image = image(8192);
    let before = std::fs::read(image.path()).unwrap();
    let driver = Driver::new(blk(&image, ",readonly", None).unwrap());
    let writes = feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(driver.offered() & (feature::READ_ONLY | writes), feature::READ_ONLY);
    driver.start(feature::ALWAYS, 1);
    for kind in [1, 11, 13] {
        assert_eq!(request(&driver, 0, kind, 0, &[(DATA, 512, false)]).0, 1);
    }
    assert_eq!(request(&driver, 0, 0, 0, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(request(&driver, 0, 4, 0, &[]).0, 0);
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn request_without_header_or_status_breaks_the_device_until_it_is_reset() {
    let image = image(8192);
    let driver = running(&image);
    for chain in [
        vec![(HEADER, 15, false), (STATUS, 1, true)],
        vec![(HEADER, 16, false)],
        vec![(STATUS, 1, true)],
        vec![(HEADER, 16, false), (DATA, 0, true)],
    ] {
        driver.submit(0, &chain);
        assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET, "{chain:?}");
        assert_eq!(driver.take(0), None);
        driver.start(ALL, 2);
        assert_eq!(request(&driver, 1, 0, 0, &[(DATA, 512, true)]), (0, 513), "it works after a reset");
    }
    assert_eq!(lock(&driver.told).len(), 1, "the user is told once");
}

/// A disk that keeps its requests.
fn held(block: u32, size: u64) -> Arc<Held> {
    Held::new(DiskInfo { size, block, read_only: false, discard: false })
}

fn held_blk(disk: &Arc<Held>, block_size: Option<u32>) -> Result<Arc<Blk>, BlkError> {
    let disk = Arc::clone(disk) as Arc<dyn BlockDevice>;
    Blk::new(BlkConfig { disk, block_size, serial: String::new(), queues: 1 })
}

#[test]
fn every_error_of_the_host_is_an_io_error_in_the_guest() {
    let disk = held(512, 1 << 20);
    let driver = Driver::running(held_blk(&disk, None).unwrap(), feature::ALWAYS, 1);
    let errors = [IoError::NoSpace, IoError::Host(IoKind::Read), IoError::Misaligned, IoError::ReadOnly];
    for error in errors {
        header(&driver, 0, 0);
        driver.submit(0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        assert_eq!(driver.take(0), None, "it is under way");
        disk.end(Err(error));
        assert!(driver.take(0).is_some());
        assert_eq!(driver.get(STATUS, 1), [1]);
    }
}

#[test]
fn reset_waits_for_requests_under_way_and_drops_their_ends() {
    let disk = held(512, 1 << 20);
    let driver = Driver::running(held_blk(&disk, None).unwrap(), feature::ALWAYS, 1);
    for _ in 0..3 {
        header(&driver, 0, 0);
        driver.submit(0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    }
    driver.set(common::STATUS, 1, 0);
    for _ in 0..3 {
        assert_ne!(driver.status(), 0, "the disk may still write to the guest's memory");
        // Writes at this time mean nothing.
        driver.set(common::STATUS, 1, 1);
        driver.function.write_registers(0x3000, &[0, 0]);
        disk.end(Ok(()));
    }
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.take(0), None);
    driver.start(feature::ALWAYS, 1);
    driver.submit(0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    disk.end(Ok(()));
    assert_eq!(driver.take(0), Some(513));
}

#[test]
fn writes_are_durable_unless_the_driver_knows_flushes() {
    let disk = held(512, 1 << 20);
    let write = |driver: &Driver| {
        header(driver, 1, 0);
        driver.submit(0, &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
        let text = disk.end(Ok(()));
        assert!(driver.take(0).is_some());
        text.contains("durable: true")
    };
    let all = feature::ALWAYS;
    let driver = Driver::running(held_blk(&disk, None).unwrap(), all & !feature::FLUSH, 1);
    assert!(write(&driver), "a driver without flushes");
    driver.set_config(WRITEBACK, &[1]);
    assert!(write(&driver), "it cannot switch");
    driver.start(all, 1);
    assert_eq!((write(&driver), driver.config::<1>(WRITEBACK)), (false, [1]));
    driver.set_config(WRITEBACK, &[0]);
    assert_eq!((write(&driver), driver.config::<1>(WRITEBACK)), (true, [0]));
    // The choice outlives saving.
    driver.function.quiesce();
    let saved = driver.function.save();
    let other = Driver::new(held_blk(&disk, None).unwrap());
    other.function.restore(&saved).unwrap();
    assert_eq!(other.config::<1>(WRITEBACK), [0]);
    assert_eq!(other.function.save(), saved);
}

#[test]
fn driver_hears_of_the_cache_before_it_is_ready() {
    let driver = Driver::new(held_blk(&held(512, 1 << 20), None).unwrap());
    for (features, cached) in [(feature::ALWAYS, 1), (feature::ALWAYS & !feature::FLUSH, 0)] {
        driver.set(common::STATUS, 1, 0);
        driver.set(common::STATUS, 1, 3);
        let features = features | crate::virtio::spec::feature::VERSION_1;
        for (half, select) in [(features & 0xffff_ffff, 0), (features >> 32, 1)] {
            driver.set(common::DRIVER_FEATURE_SELECT, 4, select);
            driver.set(common::DRIVER_FEATURE, 4, half);
        }
        driver.set(common::STATUS, 1, 11);
        assert_eq!(driver.config::<1>(WRITEBACK), [cached], "Linux asks at this moment, and never again");
    }
}

#[test]
fn disks_that_cannot_be_are_refused() {
    let refused = |block, size, asked| held_blk(&held(block, size), asked).unwrap_err();
    assert_eq!(refused(512, 4096, Some(1024)), BlkError::BlockSize(1024));
    assert_eq!(refused(4096, 8192, Some(512)), BlkError::BlockTooSmall(4096));
    assert_eq!(refused(512, 512, Some(4096)), BlkError::TooSmall { size: 512, block: 4096 });
    let disk = held_blk(&held(512, 4096 + 512), Some(4096)).unwrap();
    let driver = Driver::running(disk, feature::ALWAYS, 1);
    assert_eq!(driver.config::<8>(0), 8_u64.to_le_bytes(), "whole blocks only");
    assert_eq!(driver.config::<4>(20), 4096_u32.to_le_bytes());
}
