//! Damaged images, and those that somebody has made to do harm.

use std::sync::Mutex;

use super::*;
use crate::run;
use crate::testing::{pattern, read, write};

/// An image with some data, as bytes.
fn image(folder: &Folder) -> Vec<u8> {
    let path = folder.create("good", 64 * MIB);
    let disk = folder.open("good", "");
    write(&disk, 0, &pattern(256 << 10, 1)).unwrap();
    drop(disk);
    std::fs::read(path).unwrap()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn headers_that_cannot_be_are_refused_with_what_is_wrong() {
    let folder = Folder::new();
    let good = image(&folder);
    let path = folder.path("bad");
    let (l1, reftable) = (number(&good, 40, 8) as usize, number(&good, 48, 8) as usize);
    let u32 = |at: usize, value: u32| (at, value.to_be_bytes().to_vec());
    let u64 = |at: usize, value: u64| (at, value.to_be_bytes().to_vec());
    let cases = [
        (u32(0, 0x1234), "not a qcow2 image; leave format=qcow2 out"),
        (u32(4, 1), "its version is 1"),
        (u32(4, 4), "its version is 4"),
        (u64(8, 256), "backing file's name's length is 0"),
        ((8, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 9].to_vec()), "backing file's name's place"),
        ((8, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0].to_vec()), "backing file's name's length is 1024"),
        ((8, [0, 0, 0, 0, 0, 0, 0, 104, 0, 0, 0, 4].to_vec()), "its backing file's name is not text"),
        (u32(20, 8), "cluster size as a power of two is 8, which must be 9 to 21"),
        (u32(20, 22), "which must be 9 to 21"),
        (u32(20, u32::MAX), "which must be 9 to 21"),
        (u64(24, 0), "disk size is 0"),
        (u64(24, u64::MAX), "disk size"),
        (u64(24, 1 << 50), "large enough for the disk's size"),
        (u32(32, 2), "encryption, which is not supported"),
        (u32(36, 0), "number of L1 entries is 0"),
        (u32(36, u32::MAX), "number of L1 entries"),
        (u32(36, 4 << 20), "it is cut off: its L1 table"),
        (u64(40, 0), "its L1 table is 0"),
        (u64(40, 12_345), "a multiple of the cluster size"),
        (u64(40, 1 << 50), "it is cut off: its L1 table"),
        (u64(40, !0xffff), "its L1 table is"),
        (u64(48, 1 << 50), "it is cut off: its refcount table"),
        (u64(48, 0), "its refcount table is 0"),
        (u32(56, 0), "refcount table's size is 0"),
        (u32(56, u32::MAX), "refcount table's size"),
        (u64(72, 1), "not closed when it was last used; repair it: qemu-img check -r all"),
        (u64(72, 2), "marked as damaged"),
        (u64(72, 4), "its data in a file of its own, which is not supported"),
        (u64(72, 8), "not compressed by zlib"),
        (u64(72, 16), "extended L2 entries"),
        (u64(72, 1 << 40), "unknown features (bits 0x10000000000)"),
        (u32(96, 7), "refcount width"),
        (u32(100, 0), "header length is 0"),
        (u32(100, u32::MAX), "header length"),
        (u32(108, 7), "a multiple of 48"),
        (u32(108, u32::MAX), "extensions do not end"),
        (u64(l1, 1 << 63 | 0x200), "Invalid L1 entry"),
        (u64(reftable, 0), "are not counted as used; look at it: qemu-img check"),
        (u64(number(&good, reftable, 8) as usize, 1 << 32 | 1 << 16 | 1), "are not counted as used"),
        (u64(number(&good, reftable, 8) as usize, 1 << 48 | 1 << 16 | 1), "are not counted as used"),
        (u64(number(&good, reftable, 8) as usize, 1 << 48 | 1 << 32 | 1 << 16), "are not counted as used"),
        (u64(reftable, 1 << 50), "it is cut off: its refcounts"),
        (u64(reftable, 0x2_0001), "refcount block's place"),
        (u64(reftable + 8, number(&good, reftable, 8)), "which must be its own"),
    ];
    assert_eq!(number(&good, 104, 4), 0x6803_f857, "the table of feature names comes first");
    for ((at, value), message) in cases {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(&value);
        std::fs::write(&path, bytes).unwrap();
        let text = folder.refused("bad", "");
        assert!(
            text.contains(message) && text.contains("bad as a qcow2 disk image"),
            "{at} {value:?}: {text}"
        );
    }
    for len in [1, 7, 8, 71, 100, 111, 400, reftable + 1, l1] {
        std::fs::write(&path, &good[..len]).unwrap();
        let text = folder.refused("bad", "");
        assert!(
            text.contains("cut off") || text.contains("not a qcow2") || text.contains("do not end"),
            "{len}: {text}"
        );
    }
    std::fs::write(&path, b"").unwrap();
    assert!(folder.refused("bad", "").contains("is empty"));
}

/// A disk in the image `bad`, and what its user is told.
fn watched(folder: &Folder) -> (Arc<dyn BlockDevice>, Arc<Mutex<Vec<String>>>) {
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = Arc::clone(&told);
    let faults: crate::FaultObserver = Arc::new(move |fault| sink.lock().unwrap().push(fault.to_string()));
    let options = DiskOptions { faults: Some(faults), ..DiskOptions::new(folder.spec("bad", "")) };
    (open(&options).unwrap(), told)
}

#[test]
fn tables_that_lead_nowhere_are_io_errors_and_one_message() {
    let folder = Folder::new();
    let good = image(&folder);
    let path = folder.path("bad");
    let l1 = number(&good, 40, 8) as usize;
    let l2 = (number(&good, l1, 8) & 0x00ff_ffff_ffff_fe00) as usize;
    let entry = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        bytes
    };
    let cases = [
        ("an L2 table behind the end", entry(l1, 1 << 63 | 1 << 50)),
        ("data behind the end", entry(l2, 1 << 63 | 1 << 50)),
        ("an L2 entry that is not aligned", entry(l2, 1 << 63 | 0x200)),
        ("data that was cut off", good[..good.len() - (256 << 10)].to_vec()),
        ("compressed data behind the end", entry(l2, 1 << 62 | 1 << 49)),
        ("compressed data that is none", entry(l2, 1 << 62 | 0x1000)),
    ];
    for (what, bytes) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let (disk, told) = watched(&folder);
        for _ in 0..3 {
            assert_eq!(read(&disk, 0, 4096).unwrap_err(), IoError::Host(IoKind::Read), "{what}");
        }
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 1, "{what}: {told:?}");
        assert!(told[0].contains("reading the disk image") && told[0].contains("qemu-img check"), "{told:?}");
        // The rest of the disk is there; zeroes, since nothing was written.
        if !what.contains("L2") {
            assert_eq!(read(&disk, 32 * MIB, 512).unwrap(), [0; 512], "{what}");
        }
    }
}

#[test]
fn l2_table_that_leads_to_the_header_harms_nothing_but_the_image() {
    let folder = Folder::new();
    let mut bytes = image(&folder);
    std::fs::write(folder.path("secret"), "secret".repeat(1000)).unwrap();
    let l1 = number(&bytes, 40, 8) as usize;
    let l2 = (number(&bytes, l1, 8) & 0x00ff_ffff_ffff_fe00) as usize;
    // Where guest and header meet: the guest becomes the author of its own image.
    bytes[l2..l2 + 8].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    std::fs::write(folder.path("bad"), bytes).unwrap();
    let (disk, _) = watched(&folder);
    let result = read(&disk, 0, 512);
    if result.is_ok() {
        let _ = write(&disk, 0, &[0; 512]);
    }
    let _ = run(&disk, Operation::Flush);
    drop(disk);
    assert_eq!(std::fs::read(folder.path("secret")).unwrap().len(), 6000);
}
