//! A qcow2 image that somebody has changed, or made up, is opened, read and written. One that nobody has changed must do what
//! an array of bytes does.
#![no_main]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use ringfence_disk::{BlockDevice, Buffers, DiskOptions, Extent, HostBuffer, Operation, Request, open};

/// Bytes of the disk in the image that is changed.
const SIZE: usize = 64 << 10;
/// Bytes of the image's clusters: small, so that a few bytes of input reach every table.
const CLUSTER: usize = 512;
/// Clusters in the image: header, refcount table, refcounts, L1 table, two L2 tables, and data.
const CLUSTERS: usize = 16;

/// A folder in memory if there is one, since flushes reach the file.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FOLDER.get_or_init(|| {
        let made = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let folder = made.expect("a temporary folder can be made");
        std::fs::write(folder.path().join("below"), [0xb5; SIZE / 2]).expect("a file can be written");
        let path = folder.path().to_owned();
        (folder, path)
    });
    path
}

/// An image with its first clusters allocated; with `below` it stands on another one.
fn image(below: bool) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER * CLUSTERS];
    let mut put = |at: usize, value: u64, len: usize| {
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    };
    put(0, 0x5146_49fb, 4);
    put(4, 3, 4);
    put(20, 9, 4);
    put(24, SIZE as u64, 8);
    put(36, 2, 4);
    put(40, 3 * CLUSTER as u64, 8);
    put(48, CLUSTER as u64, 8);
    put(56, 1, 4);
    put(96, 4, 4);
    put(100, 104, 4);
    // The refcount table leads to the refcounts, the L1 table to the L2 tables, and those to data.
    put(CLUSTER, 2 * CLUSTER as u64, 8);
    for cluster in 0..CLUSTERS {
        put(2 * CLUSTER + 2 * cluster, 1, 2);
    }
    for table in 0..2 {
        put(3 * CLUSTER + 8 * table, 1 << 63 | ((4 + table) * CLUSTER) as u64, 8);
        for entry in 0..5 {
            put((4 + table) * CLUSTER + 8 * entry, 1 << 63 | ((6 + 5 * table + entry) * CLUSTER) as u64, 8);
        }
    }
    if below {
        put(8, 160, 8);
        put(16, 5, 4);
        put(104, 0xe279_2aca, 4);
        put(108, 3, 4);
        bytes[112..115].copy_from_slice(b"raw");
        bytes[160..165].copy_from_slice(b"below");
    }
    bytes
}

/// Takes bytes off an input; zeroes when there are no more.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }
}

/// Changes an image as the input says. Returns whether it did.
fn change(bytes: &mut [u8], input: &mut Input<'_>, count: u8) -> bool {
    for _ in 0..count {
        let (at, len) = (input.number() % bytes.len(), 1 + input.byte() % 12);
        for byte in bytes.iter_mut().skip(at).take(len.into()) {
            *byte = input.byte();
        }
    }
    count > 0
}

fn run(disk: &Arc<dyn BlockDevice>, operation: Operation) -> bool {
    ringfence_disk::run(disk, operation).is_ok()
}

/// Does to a disk what the input says, and to the bytes of an image that nobody has changed.
fn work(disk: &Arc<dyn BlockDevice>, input: &mut Input<'_>, mut model: Option<&mut Vec<u8>>) {
    let sectors = (disk.info().size / 512) as usize;
    while !input.0.is_empty() {
        let (what, place) = (input.byte(), input.number());
        // Far away on a large disk, too.
        let start = if what & 0x80 != 0 { sectors.wrapping_sub(1 + place % 256) } else { place } % sectors;
        let len = (1 + usize::from(input.byte()) % 64).min(sectors - start) * 512;
        let offset = (start * 512) as u64;
        let extent = Extent { offset, len: len as u64 };
        let buffer = HostBuffer::new(len);
        let buffers = Buffers::host(&buffer, len);
        let range = (start * 512)..(start * 512 + len);
        match what & 7 {
            0..=2 => {
                let data = vec![input.byte(); len];
                buffer.write(0, &data);
                let done = run(disk, Operation::Write { offset, buffers, durable: what & 8 != 0 });
                if let Some(model) = &mut model {
                    assert!(done);
                    model[range].copy_from_slice(&data);
                }
            }
            3 => {
                let done = run(
                    disk,
                    Operation::WriteZeroes { extent, deallocate: what & 8 != 0, durable: what & 16 != 0 },
                );
                if let Some(model) = &mut model {
                    assert!(done);
                    model[range].fill(0);
                }
            }
            4 if model.is_none() => {
                run(disk, Operation::Discard(vec![extent]));
            }
            5 => assert!(run(disk, Operation::Flush) || model.is_none()),
            6 => disk.submit(Request { operation: Operation::Flush, done: Box::new(|_| ()) }),
            _ => {
                let done = run(disk, Operation::Read { offset, buffers });
                if let Some(model) = &mut model {
                    let mut found = vec![0; len];
                    buffer.read(0, &mut found);
                    assert!(done && found == model[range]);
                }
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let options = input.byte();
    let below = options & 1 != 0;
    let (bytes, changed) = if options & 2 != 0 {
        // Made up from the first byte to the last.
        (std::mem::take(&mut input.0).to_vec(), true)
    } else {
        let mut bytes = image(below);
        let changed = change(&mut bytes, &mut input, options >> 4);
        (bytes, changed)
    };
    let path = folder().join("image");
    std::fs::write(&path, &bytes).expect("a file can be written");
    let cache = if options & 4 != 0 { "unsafe" } else { "writeback" };
    let folder = folder().display();
    let text = format!("{},format=qcow2,io=sync,cache={cache},backing={folder}", path.display());
    let spec = text.parse().expect("the description is one");
    let Ok(disk) = open(&DiskOptions::new(spec)) else { return };
    if disk.info().size < 512 {
        return;
    }
    let mut model = vec![0; SIZE];
    if below {
        model[..SIZE / 2].fill(0xb5);
        for table in 0..2 {
            // What is allocated is empty.
            model[table * SIZE / 2..table * SIZE / 2 + 5 * CLUSTER].fill(0);
        }
    }
    work(&disk, &mut input, if changed { None } else { Some(&mut model) });
    drop(disk);
    let again = format!("{text},readonly").parse().expect("the description is one");
    let again = open(&DiskOptions::new(again));
    assert!(changed || again.is_ok(), "an image that was sound is so after it was closed");
});
