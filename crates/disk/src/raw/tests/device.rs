//! Block devices as images, on loop devices. Only root can have those: elsewhere the tests say so and do nothing.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use super::*;

/// Bytes of the device.
const SIZE: usize = 8 * MIB;

/// A loop device over an image, detached when dropped.
struct Loop {
    image: Image,
    path: PathBuf,
}

impl Loop {
    /// `None` where there are no loop devices. `block` is the logical block size.
    fn new(block: u32) -> Option<Self> {
        let image = Image::new(&pattern(SIZE, 5));
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--sector-size", &block.to_string()]).arg(image.path());
        let output = match command.output() {
            Ok(output) if output.status.success() => output,
            Ok(output) => {
                println!("skipped, no loop device: {}", String::from_utf8_lossy(&output.stderr).trim());
                return None;
            }
            Err(error) => {
                println!("skipped, no losetup: {error}");
                return None;
            }
        };
        let path = String::from_utf8_lossy(&output.stdout).trim().into();
        Some(Self { image, path })
    }

    fn spec(&self, options: &str) -> DiskSpec {
        format!("{}{options}", self.path.display()).parse().unwrap()
    }

    fn open(&self, options: &str) -> Arc<dyn BlockDevice> {
        open(&DiskOptions::new(self.spec(options))).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(status.is_ok_and(|status| status.success()), "{} stays behind", self.path.display());
    }
}

#[test]
fn block_device_has_its_size_and_keeps_data() {
    for block in [512, 4096] {
        for cache in ["writeback", "none"] {
            let Some(device) = Loop::new(block) else { return };
            for engine in ENGINES {
                let disk = device.open(&format!(",cache={cache},io={engine}"));
                let needed = if cache == "none" { block } else { 512 };
                assert_eq!((disk.info().size, disk.info().block), (SIZE as u64, needed), "{cache} {engine}");
                let bytes = pattern(64 << 10, 9);
                write(&disk, MIB as u64, &bytes).unwrap();
                run(&disk, Operation::Flush).unwrap();
                assert_eq!(read(&disk, MIB as u64, bytes.len()).unwrap(), bytes);
                assert_eq!(read(&disk, (SIZE - 4096) as u64, 4096).unwrap(), pattern(SIZE, 5)[SIZE - 4096..]);
                assert_eq!(read(&disk, SIZE as u64, 4096).unwrap_err(), IoError::OutOfRange);
                drop(disk);
                assert_eq!(device.image.bytes()[MIB..][..bytes.len()], bytes, "{cache} {engine}");
            }
        }
    }
}

#[test]
fn discards_and_zeroes_reach_a_block_device() {
    for block in [512, 4096] {
        let Some(device) = Loop::new(block) else { return };
        std::fs::File::open(device.image.path()).unwrap().sync_all().unwrap();
        let before = used(&device.image.path());
        let disk = device.open("");
        let extent = |offset: usize, len: usize| Extent { offset: offset as u64, len: len as u64 };
        run(&disk, Operation::Discard(vec![extent(MIB, 2 * MIB)])).unwrap();
        assert!(used(&device.image.path()) <= before - MIB as u64, "{block}");
        assert!(read(&disk, MIB as u64, 2 * MIB).unwrap().iter().all(|byte| *byte == 0));
        // What is no whole number of the device's blocks is kept, or written.
        run(&disk, Operation::Discard(vec![extent(512, 512), extent(4 * MIB, MIB)])).unwrap();
        for (deallocate, offset) in [(false, 5 * MIB + 512), (true, 6 * MIB + 512)] {
            let zero = Operation::WriteZeroes { extent: extent(offset, 1024), deallocate, durable: true };
            run(&disk, zero).unwrap();
            let bytes = read(&disk, (offset - 512) as u64, 2048).unwrap();
            assert!(bytes[512..1536].iter().all(|byte| *byte == 0), "{block} {deallocate}");
            assert_eq!(bytes[..512], pattern(SIZE, 5)[offset - 512..offset]);
            assert_eq!(bytes[1536..], pattern(SIZE, 5)[offset + 1024..][..512]);
        }
    }
}

#[test]
fn block_device_in_use_is_refused() {
    let Some(device) = Loop::new(512) else { return };
    let refused = |options: &str| open(&DiskOptions::new(device.spec(options))).unwrap_err().to_string();
    let writer = device.open("");
    for options in ["", ",readonly", ",ephemeral"] {
        assert!(refused(options).contains("in use") || refused(options).contains("uses it"), "{options}");
    }
    drop(writer);
    let readers = [device.open(",readonly"), device.open(",ephemeral")];
    assert!(refused("").contains("in use by another machine"));
    drop(readers);
    device.open("");
    // The host's own use, such as a mounted file system, counts too.
    let held = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
    assert!(refused("").contains("uses it"));
    drop(held);
    device.open("");
}
