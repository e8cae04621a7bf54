//! A disk beside an array of bytes that has had the same done to it.

use super::*;
use crate::run;
use crate::testing::{pattern, read, write};

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Does `count` random things to a disk, and the same to the bytes; looks at some of them.
fn work(disk: &Arc<dyn BlockDevice>, bytes: &mut [u8], random: &mut Random, count: u64, name: &str) {
    let sectors = bytes.len() as u64 / 512;
    for step in 0..count {
        let most = if random.below(8) == 0 { 600 } else { 24 };
        let len = 1 + random.below(most);
        let start = random.below(sectors - len);
        let (offset, len) = (start * 512, len * 512);
        let range = offset as usize..(offset + len) as usize;
        let extent = Extent { offset, len };
        match random.below(16) {
            0..8 => {
                let data = pattern(len as usize, step as u8);
                write(disk, offset, &data).unwrap();
                bytes[range].copy_from_slice(&data);
            }
            8 | 9 => {
                let deallocate = random.below(2) == 0;
                run(disk, Operation::WriteZeroes { extent, deallocate, durable: false }).unwrap();
                bytes[range].fill(0);
            }
            10 => {
                run(disk, Operation::Discard(vec![extent])).unwrap();
                // Either zeroes or what was there, in each place.
                let now = read(disk, offset, len as usize).unwrap();
                for (was, is) in bytes[range].iter_mut().zip(now) {
                    assert!(is == *was || is == 0, "{name}: a discard makes {was} {is}");
                    *was = is;
                }
            }
            11 => run(disk, Operation::Flush).unwrap(),
            _ => {
                let found = read(disk, offset, len as usize).unwrap();
                assert!(found == bytes[range], "{name}: step {step}, {len} bytes at {offset}");
            }
        }
    }
    let found = read(disk, 0, bytes.len()).unwrap();
    assert!(found == bytes, "{name}: all");
}

#[test]
fn disk_does_what_an_array_of_bytes_does_and_stays_clean() {
    for (seed, options) in [",io=threads", ",io=sync", ",cache=none", ",cache=unsafe"].iter().enumerate() {
        let folder = Folder::new();
        let path = folder.create("disk", 8 * MIB);
        let mut bytes = vec![0; 8 << 20];
        let mut random = Random(0x1234_5678 + seed as u64);
        for round in 0..3 {
            let disk = folder.open("disk", options);
            work(&disk, &mut bytes, &mut random, 300, &format!("{options} round {round}"));
            drop(disk);
            is_clean(&path);
            assert!(
                as_raw(&folder, &path).is_none_or(|found| found == bytes),
                "{options}: QEMU reads the same"
            );
        }
    }
}

#[test]
fn images_of_every_kind_that_qemu_makes_do_what_an_array_does() {
    let kinds = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "preallocation=metadata",
        "preallocation=full,cluster_size=16384",
        "lazy_refcounts=on",
    ];
    for (seed, kind) in kinds.iter().enumerate() {
        let folder = Folder::new();
        let path = folder.path("disk");
        let path_text = path.to_str().unwrap();
        if qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, path_text, "8M"], &[]).is_none() {
            return;
        }
        let mut bytes = vec![0; 8 << 20];
        let mut random = Random(0x8765_4321 + seed as u64);
        for options in ["", ",cache=none", ""] {
            let disk = folder.open("disk", options);
            work(&disk, &mut bytes, &mut random, 200, kind);
            drop(disk);
            is_clean(&path);
            assert!(as_raw(&folder, &path).unwrap() == bytes, "{kind}: QEMU reads the same");
        }
    }
}

#[test]
fn compressed_clusters_and_snapshots_of_qemu_are_read_and_kept() {
    let folder = Folder::new();
    let mut bytes: Vec<u8> = (0..4 << 20).map(|i: u32| (i >> 11) as u8).collect();
    std::fs::write(folder.path("raw"), &bytes).unwrap();
    let (raw, path) = (folder.path("raw"), folder.path("disk"));
    if qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2"], &[&raw, &path]).is_none() {
        return;
    }
    qemu_img(&["snapshot", "-c", "before"], &[&path]);
    let mut random = Random(99);
    for round in 0..2 {
        let disk = folder.open("disk", "");
        assert!(read(&disk, 0, bytes.len()).unwrap() == bytes);
        work(&disk, &mut bytes, &mut random, 200, &format!("round {round}"));
        drop(disk);
        is_clean(&path);
    }
    qemu_img(&["snapshot", "-a", "before"], &[&path]);
    assert!(as_raw(&folder, &path).unwrap() == std::fs::read(&raw).unwrap(), "the snapshot is as it was");
}

#[test]
fn writers_side_by_side_lose_nothing() {
    const WRITERS: usize = 6;
    let folder = Folder::new();
    let path = folder.create("disk", 6 * MIB);
    let disk = folder.open("disk", "");
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let disk = Arc::clone(&disk);
            scope.spawn(move || {
                // Sectors of all writers share every cluster.
                let mut random = Random(writer as u64 + 1);
                for round in 0..3_u8 {
                    for sector in (writer..6 << 11).step_by(WRITERS) {
                        let seed = (sector as u8).wrapping_add(round);
                        match random.below(40) {
                            0 => run(&disk, Operation::Flush).unwrap(),
                            1 => {
                                let extent = Extent { offset: sector as u64 * 512, len: 512 };
                                let operation =
                                    Operation::WriteZeroes { extent, deallocate: true, durable: false };
                                run(&disk, operation).unwrap();
                            }
                            2 => {
                                // Another writer's, which is about to write it again or has read it.
                                let offset = sector as u64 * 512;
                                read(&disk, offset, 512).unwrap();
                            }
                            _ => (),
                        }
                        write(&disk, sector as u64 * 512, &pattern(512, seed)).unwrap();
                    }
                }
            });
        }
    });
    for sector in 0..6 << 11_usize {
        let seed = (sector as u8).wrapping_add(2);
        assert_eq!(read(&disk, sector as u64 * 512, 512).unwrap(), pattern(512, seed), "sector {sector}");
    }
    drop(disk);
    is_clean(&path);
}

#[test]
fn discard_gives_room_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let path = folder.create("disk", 64 * MIB);
    let disk = folder.open("disk", "");
    write(&disk, 0, &pattern(32 << 20, 3)).unwrap();
    run(&disk, Operation::Flush).unwrap();
    let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(taken() >= 32 * MIB);
    run(&disk, Operation::Discard(vec![Extent { offset: 0, len: 16 * MIB }])).unwrap();
    let extent = Extent { offset: 16 * MIB, len: 8 * MIB };
    run(&disk, Operation::WriteZeroes { extent, deallocate: true, durable: true }).unwrap();
    assert!(taken() <= 10 * MIB, "{} bytes are still taken", taken());
    assert_eq!(read(&disk, 24 * MIB, 512).unwrap(), pattern(32 << 20, 3)[24 << 20..(24 << 20) + 512]);
    // What was given back is used again before the file grows.
    let len = std::fs::metadata(&path).unwrap().len();
    write(&disk, 40 * MIB, &pattern(16 << 20, 4)).unwrap();
    drop(disk);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), len);
    is_clean(&path);
}

#[test]
fn short_read_from_the_page_cache_needs_no_thread() {
    let folder = Folder::new();
    folder.create("disk", MIB);
    let disk = folder.open("disk", "");
    write(&disk, 0, &pattern(8192, 1)).unwrap();
    run(&disk, Operation::Flush).unwrap();
    let caller = std::thread::current().id();
    let (sender, receiver) = std::sync::mpsc::channel();
    let buffers = crate::testing::buffers(&[0; 8192]);
    let operation = Operation::Read { offset: 0, buffers: buffers.clone() };
    let done = Box::new(move |result| sender.send((result, std::thread::current().id())).unwrap());
    disk.submit(Request { operation, done });
    assert_eq!(receiver.try_recv().unwrap(), (Ok(()), caller), "done before submit returns");
    let mut bytes = [0; 8192];
    buffers.copy_to(0, &mut bytes);
    assert_eq!(bytes[..], pattern(8192, 1));
}
