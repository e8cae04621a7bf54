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
    let image = || ImageFile::open(&path, true, false).unwrap();
    let header = Header::read(&image()).unwrap();
    let order = Order::new(&image(), &header, true).unwrap();
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
    let image = || ImageFile::open(&path, true, false).unwrap();
    let header = Header::read(&image()).unwrap();
    let order = Order::new(&image(), &header, true).unwrap();
    for _ in 0..2 {
        let fails = || Err(io::Error::from_raw_os_error(libc::EIO));
        let slices = [IoSlice::new(&[0; 8])];
        let result = order.write(header.l1.start, &slices, fails, || panic!("not safe yet"), image);
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}

#[test]
fn image_that_is_left_at_any_moment_has_leaks_at_most() {
    let kinds = [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=4",
        "cluster_size=512,refcount_bits=8",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "compat=0.10,cluster_size=512",
    ];
    for kind in kinds {
        let folder = Folder::new();
        let path = folder.path("disk");
        let text = path.to_str().unwrap();
        if qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, text, "64M"], &[]).is_none() {
            return;
        }
        for options in ["", ",cache=unsafe"] {
            let disk = folder.open("disk", options);
            for step in 0..25_u64 {
                // Far from each other, so that new tables are needed all the time.
                let offset = step * 7919 * 4096 % (63 * MIB);
                write(&disk, offset, &pattern(if step % 8 == 0 { 300 << 10 } else { 4096 }, 1)).unwrap();
                match step % 5 {
                    0 => crate::run(&disk, Operation::Flush).unwrap(),
                    1 => {
                        let extent = Extent { offset: offset & !0xffff, len: 65536 };
                        crate::run(&disk, Operation::Discard(vec![extent])).unwrap();
                    }
                    _ => (),
                }
                // What a machine that is killed now leaves.
                let left = folder.path("left");
                std::fs::copy(&path, &left).unwrap();
                let output = std::process::Command::new("qemu-img")
                    .args(["check", "-f", "qcow2"])
                    .arg(&left)
                    .output()
                    .unwrap();
                assert!(
                    matches!(output.status.code(), Some(0 | 3)),
                    "{kind}{options}: step {step}: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
        }
    }
}
