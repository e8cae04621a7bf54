//! What is on stable storage before what.

use std::io::IoSlice;
use std::sync::atomic::AtomicU32;

use super::*;
use crate::file::ImageFile;
use crate::qcow2::header::Header;
use crate::qcow2::order::Order;
use crate::testing::{pattern, write};

#[test]
fn table_in_use_is_written_to_when_all_before_is_safe_and_other_places_at_once() {
    let folder = Folder::new();
    let path = folder.create("disk", 64 * MIB);
    write(&folder.open("disk", ""), 0, &pattern(65536, 1)).unwrap();
    let image = || ImageFile::open(&path, false, false).unwrap();
    let header = Header::read(&image()).unwrap();
    let order = Order::new(&image(), &header).unwrap();
    let syncs = AtomicU32::new(0);
    // How often a write of so many bytes has had to wait.
    let write = |offset: u64, bytes: &[u8]| {
        let before = syncs.load(Ordering::Relaxed);
        let sync = || {
            syncs.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        order.write(offset, &[IoSlice::new(bytes)], sync, || Ok(()), image).unwrap();
        order.wrote();
        syncs.load(Ordering::Relaxed) - before
    };
    let l1 = header::bytes(&image(), header.l1.clone(), "").unwrap();
    let l2 = header::entries(&l1).next().unwrap() & header::OFFSET;
    let refcounts = header.refcount_blocks(&image()).unwrap()[0];
    let cluster = 65536;
    let free = 100 * cluster;
    for (what, offset) in [("L1", header.l1.start), ("L2", l2), ("refcounts", refcounts), ("header", 0)] {
        assert_eq!(write(offset, &[0; 512]), 1, "{what}");
    }
    assert_eq!(write(l2 + 512, &[0; 512]), 1, "also in the midst of it");
    assert_eq!(write(free, &[0; 65536]), 0, "nothing leads there yet");
    assert_eq!(write(header.l1.start, &free.to_be_bytes()), 1);
    assert_eq!(write(free, &[0; 65536]), 1, "now it is an L2 table");
    let next = free + cluster;
    assert_eq!(write(next, &[0; 65536]), 0);
    assert_eq!(write(header.reftable.start + 8, &next.to_be_bytes()), 1);
    assert_eq!(write(next, &[0; 65536]), 1, "now it holds refcounts");
    // Nothing was written since: nothing to wait for.
    order.sync(|| Ok(())).unwrap();
    order.write(l2, &[IoSlice::new(&[0; 8])], || panic!("all is safe"), || Ok(()), image).unwrap();
}

#[test]
fn failure_to_make_safe_is_told_again_and_nothing_is_written() {
    let folder = Folder::new();
    let path = folder.create("disk", 64 * MIB);
    let image = || ImageFile::open(&path, false, false).unwrap();
    let header = Header::read(&image()).unwrap();
    let order = Order::new(&image(), &header).unwrap();
    for _ in 0..2 {
        let fails = || Err(io::Error::from_raw_os_error(libc::EIO));
        let slices = [IoSlice::new(&[0; 8])];
        let result = order.write(header.l1.start, &slices, fails, || panic!("not safe yet"), image);
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
