mod device;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;

use ringfence_memory::{CodeObserver, GuestAddress, GuestMemory};

use super::*;
use crate::testing::{ENGINES, Image, buffers, memory_file, pattern, read, write};
use crate::{Access, DiskOptions, DiskSpec, Fault, ImageError, open, run};

const MIB: usize = 1 << 20;

#[test]
fn data_comes_back_on_every_engine() {
    for engine in ENGINES {
        let image = Image::new(&pattern(MIB, 1));
        let disk = image.open(&format!(",io={engine}"));
        assert_eq!(disk.info().size, MIB as u64);
        assert_eq!(read(&disk, 4096, 8192).unwrap(), pattern(MIB, 1)[4096..12288], "{engine}");
        write(&disk, 512, &pattern(700 * 512, 9)).unwrap();
        run(&disk, Operation::Flush).unwrap();
        assert_eq!(read(&disk, 512, 700 * 512).unwrap(), pattern(700 * 512, 9), "{engine}");
        let mut expected = pattern(MIB, 1);
        expected[512..701 * 512].copy_from_slice(&pattern(700 * 512, 9));
        assert!(image.bytes() == expected, "{engine}");
    }
}

#[test]
fn direct_io_takes_memory_that_is_not_aligned() {
    // Beside the test program: folders for temporary files may lack direct I/O.
    let exe = std::env::current_exe().unwrap();
    let file = tempfile::NamedTempFile::new_in(exe.parent().unwrap()).unwrap();
    std::fs::write(file.path(), pattern(64 * 1024, 3)).unwrap();
    for engine in ENGINES {
        let spec = format!("{},cache=none,io={engine}", file.path().display()).parse().unwrap();
        let disk = open(&DiskOptions::new(spec)).unwrap();
        let block = u64::from(disk.info().block);
        let memory = Arc::new(GuestMemory::flat(64 * 1024).unwrap());
        let pieces = || {
            [(GuestAddress(0x1004), 0xffc), (GuestAddress(0x3000), 0x1004), (GuestAddress(0x6000), 0x1000)]
        };
        let fill = Buffers::guest(&memory, Access::Fill, pieces()).unwrap();
        assert!(!fill.is_aligned(512, 512));
        run(&disk, Operation::Read { offset: block, buffers: fill.clone() }).unwrap();
        let mut bytes = vec![0; 0x3000];
        fill.copy_to(0, &mut bytes);
        assert_eq!(bytes, pattern(64 * 1024, 3)[block as usize..][..0x3000], "{engine}");
        let take = Buffers::guest(&memory, Access::Take, pieces()).unwrap();
        run(&disk, Operation::Write { offset: 0x8000, buffers: take, durable: true }).unwrap();
        assert_eq!(read(&disk, 0x8000, 0x3000).unwrap(), bytes, "{engine}");
        write(&disk, 0x8000, &pattern(64 * 1024, 3)[0x8000..0xb000]).unwrap();
    }
}

#[test]
fn odd_tail_of_a_file_reads_as_zeroes_and_can_be_written() {
    for engine in ENGINES {
        let image = Image::new(&pattern(1000, 0));
        let disk = image.open(&format!(",io={engine}"));
        assert_eq!(disk.info().size, 1024);
        let mut expected = pattern(1000, 0);
        expected.resize(1024, 0);
        assert_eq!(read(&disk, 0, 1024).unwrap(), expected);
        write(&disk, 512, &[7; 512]).unwrap();
        assert_eq!(read(&disk, 512, 512).unwrap(), [7; 512]);
        assert_eq!(image.bytes().len(), 1024);
    }
}

#[test]
fn wrong_requests_are_refused() {
    let image = Image::new(&[0; 4096]);
    let disk = image.open("");
    assert_eq!(read(&disk, 4096, 512).unwrap_err(), IoError::OutOfRange);
    assert_eq!(read(&disk, u64::MAX - 511, 512).unwrap_err(), IoError::OutOfRange);
    assert_eq!(read(&disk, 100, 512).unwrap_err(), IoError::Misaligned);
    assert_eq!(write(&disk, 0, &[0; 100]).unwrap_err(), IoError::Misaligned);
    let far = Extent { offset: 0, len: 8192 };
    assert_eq!(run(&disk, Operation::Discard(vec![far])).unwrap_err(), IoError::OutOfRange);
    drop(disk);
    let disk = image.open(",readonly");
    assert!(disk.info().read_only);
    assert_eq!(write(&disk, 0, &[0; 512]).unwrap_err(), IoError::ReadOnly);
    let all = Extent { offset: 0, len: 4096 };
    assert_eq!(run(&disk, Operation::Discard(vec![all])).unwrap_err(), IoError::ReadOnly);
    let zero = Operation::WriteZeroes { extent: all, deallocate: true, durable: false };
    assert_eq!(run(&disk, zero).unwrap_err(), IoError::ReadOnly);
    run(&disk, Operation::Flush).unwrap();
}

#[test]
fn second_writer_is_refused_until_the_first_is_gone() {
    let image = Image::new(&[0; 4096]);
    let try_open = |options: &str| open(&DiskOptions::new(image.spec(options)));
    let first = image.open("");
    for options in ["", ",readonly", ",ephemeral"] {
        let error = try_open(options).unwrap_err();
        assert!(matches!(error, ImageError::InUse { .. }), "{error}");
    }
    drop(first);
    let reader = image.open(",readonly");
    let other = image.open(",ephemeral");
    assert!(matches!(try_open("").unwrap_err(), ImageError::InUse { .. }));
    drop((reader, other));
    image.open("");
}

#[test]
fn writer_that_is_about_to_go_is_waited_for() {
    let image = Image::new(&[0; 4096]);
    let first = image.open("");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(80));
            drop(first);
        });
        image.open("");
    });
}

#[test]
fn what_is_no_image_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let empty = folder.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    let cases = [
        (folder.path().join("missing"), "No such file or directory"),
        (folder.path().to_owned(), "is a folder, not a disk image"),
        (pipe, "is a pipe, not a disk image"),
        ("/dev/null".into(), "is a character device, not a disk image"),
        (empty, "is empty; give it a size first"),
    ];
    for (path, message) in cases {
        for options in ["", ",readonly", ",ephemeral"] {
            let spec = format!("{}{options}", path.display()).parse().unwrap();
            let error = open(&DiskOptions::new(spec)).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains(&path.display().to_string()), "{error}");
        }
    }
}

fn used(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn discard_gives_space_back() {
    let image = Image::new(&pattern(4 * MIB, 5));
    std::fs::File::open(image.path()).unwrap().sync_all().unwrap();
    let before = used(&image.path());
    let disk = image.open("");
    let extents = [(MIB, MIB), (0, 0), (3 * MIB, MIB / 2)];
    let extents = extents.map(|(offset, len)| Extent { offset: offset as u64, len: len as u64 });
    run(&disk, Operation::Discard(extents.to_vec())).unwrap();
    assert!(used(&image.path()) <= before - (MIB as u64), "{} of {before}", used(&image.path()));
    assert_eq!(read(&disk, MIB as u64, 4096).unwrap(), [0; 4096]);
    assert_eq!(image.bytes().len(), 4 * MIB);
    assert_eq!(read(&disk, 0, 4096).unwrap(), pattern(4096, 5));
}

#[test]
fn zeroes_are_written_with_and_without_help_of_the_file_system() {
    let image = Image::new(&pattern(MIB, 5));
    let (file, path) = memory_file(MIB as u64, false);
    std::fs::write(&path, pattern(MIB, 5)).unwrap();
    for (path, engine) in [&image.path(), &path].into_iter().zip(["threads", "sync", "uring"].iter().cycle())
    {
        for deallocate in [false, true] {
            let spec = format!("{},io={engine}", path.display()).parse().unwrap();
            let disk = open(&DiskOptions::new(spec)).unwrap();
            write(&disk, 0, &pattern(MIB, 5)).unwrap();
            let extent = Extent { offset: 512, len: (MIB - 1024) as u64 };
            run(&disk, Operation::WriteZeroes { extent, deallocate, durable: true }).unwrap();
            let bytes = read(&disk, 0, MIB).unwrap();
            assert_eq!(bytes[..512], pattern(MIB, 5)[..512]);
            assert!(bytes[512..MIB - 512].iter().all(|b| *b == 0), "{} {deallocate}", path.display());
            assert_eq!(bytes[MIB - 512..], pattern(MIB, 5)[MIB - 512..]);
        }
    }
    drop(file);
}

/// Opens with an observer that keeps the messages.
fn watched(spec: DiskSpec) -> (Arc<dyn BlockDevice>, Arc<Mutex<Vec<String>>>) {
    let messages: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = Arc::clone(&messages);
    let faults: crate::FaultObserver =
        Arc::new(move |fault: &Fault| sink.lock().unwrap().push(fault.to_string()));
    let options = DiskOptions { faults: Some(faults), ..DiskOptions::new(spec) };
    (open(&options).unwrap(), messages)
}

#[test]
fn failing_writes_reach_the_caller_each_time_and_the_user_once() {
    let (_file, path) = memory_file(4096, true);
    let (disk, messages) = watched(DiskSpec::new(&path));
    for _ in 0..3 {
        assert_eq!(write(&disk, 512, &[1; 512]).unwrap_err(), IoError::Host(IoKind::Write));
    }
    assert_eq!(read(&disk, 512, 512).unwrap(), [0; 512]);
    let messages = messages.lock().unwrap();
    assert_eq!(messages.len(), 1, "{messages:?}");
    let expected =
        format!("writing the disk image {} failed at byte 512: Operation not permitted", path.display());
    assert!(messages[0].starts_with(&expected), "{}", messages[0]);
}

#[test]
fn file_made_shorter_by_somebody_gives_an_error() {
    for engine in ENGINES {
        let image = Image::new(&[1; 8192]);
        let (disk, messages) = watched(image.spec(&format!(",io={engine}")));
        std::fs::OpenOptions::new().write(true).open(image.path()).unwrap().set_len(4096).unwrap();
        assert_eq!(read(&disk, 2048, 4096).unwrap_err(), IoError::Host(IoKind::Read), "{engine}");
        assert_eq!(messages.lock().unwrap().len(), 1);
    }
}

/// An engine on which calls of one kind fail.
#[derive(Debug)]
struct Failing {
    inner: crate::engine::Inline<Task>,
    code: i32,
    fails: fn(&FileOp) -> bool,
}

impl Engine for Failing {
    fn submit(&self, task: Task) {
        if (self.fails)(&task.op) {
            task.finish(Err(io::Error::from_raw_os_error(self.code)));
        } else {
            self.inner.submit(task);
        }
    }

    fn kick(&self) {
        self.inner.kick();
    }
}

fn failing(image: &Image, code: i32, fails: fn(&FileOp) -> bool) -> Arc<dyn BlockDevice> {
    with_failing(image, CacheMode::Writeback, code, fails)
}

fn with_failing(
    image: &Image,
    cache: CacheMode,
    code: i32,
    fails: fn(&FileOp) -> bool,
) -> Arc<dyn BlockDevice> {
    let engine: Arc<dyn Engine> = Arc::new(Failing { inner: Default::default(), code, fails });
    let running = Arc::new(crate::engine::start_inline::<Task>().1);
    let file = ImageFile::open(&image.path(), true, false).unwrap();
    let options = RawOptions::new(false, cache, false);
    Arc::new(RawDisk::new(file, options, &engine, &running, Faults::new(&image.path(), None)))
}

#[test]
fn after_a_failed_flush_nothing_is_promised_any_more() {
    let image = Image::new(&[0; 4096]);
    let disk = failing(&image, libc::EIO, |op| matches!(op, FileOp::Sync));
    write(&disk, 0, &[1; 512]).unwrap();
    let lost = IoError::Host(IoKind::Flush);
    assert_eq!(run(&disk, Operation::Flush).unwrap_err(), lost);
    assert_eq!(run(&disk, Operation::Flush).unwrap_err(), lost);
    assert_eq!(write(&disk, 0, &[2; 512]).unwrap_err(), lost);
    assert_eq!(read(&disk, 0, 512).unwrap(), [1; 512]);
}

#[test]
fn durable_write_that_cannot_be_made_durable_is_a_failed_flush() {
    let durable = || Operation::Write { offset: 0, buffers: buffers(&[1; 512]), durable: true };
    let image = Image::new(&[0; 4096]);
    let disk = failing(&image, libc::EIO, |op| matches!(op, FileOp::Write { durable: true, .. }));
    let lost = IoError::Host(IoKind::Flush);
    assert_eq!(run(&disk, durable()).unwrap_err(), lost);
    assert_eq!(run(&disk, Operation::Flush).unwrap_err(), lost, "other writes may be lost, too");
    drop(disk);
    // One that cannot even be written leaves the rest as it was.
    let disk = failing(&image, libc::ENOSPC, |op| matches!(op, FileOp::Write { .. }));
    assert_eq!(run(&disk, durable()).unwrap_err(), IoError::NoSpace);
    run(&disk, Operation::Flush).unwrap();
}

#[test]
fn ranges_that_the_file_system_will_not_take_are_written_or_kept() {
    let image = Image::new(&[1; 4096]);
    let disk = failing(&image, libc::EINVAL, |op| matches!(op, FileOp::Allocate { .. }));
    let extent = Extent { offset: 512, len: 1024 };
    run(&disk, Operation::Discard(vec![extent, extent])).unwrap();
    assert!(disk.info().discard, "others may do");
    assert_eq!(read(&disk, 512, 512).unwrap(), [1; 512]);
    run(&disk, Operation::WriteZeroes { extent, deallocate: true, durable: false }).unwrap();
    assert_eq!(read(&disk, 0, 2048).unwrap(), [[1; 512], [0; 512], [0; 512], [1; 512]].concat());
}

#[test]
fn full_host_is_told_apart_from_a_broken_one() {
    let image = Image::new(&[0; 4096]);
    for code in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
        let disk = failing(&image, code, |op| matches!(op, FileOp::Write { .. }));
        assert_eq!(write(&disk, 0, &[1; 512]).unwrap_err(), IoError::NoSpace);
    }
}

#[test]
fn file_system_without_holes_keeps_data_and_is_asked_once() {
    let image = Image::new(&[1; 4096]);
    let disk = failing(&image, libc::EOPNOTSUPP, |op| matches!(op, FileOp::Allocate { .. }));
    assert!(disk.info().discard);
    let extent = Extent { offset: 0, len: 4096 };
    run(&disk, Operation::Discard(vec![extent, extent])).unwrap();
    assert!(!disk.info().discard);
    assert_eq!(read(&disk, 0, 4096).unwrap(), [1; 4096]);
    run(&disk, Operation::WriteZeroes { extent, deallocate: true, durable: true }).unwrap();
    assert_eq!(read(&disk, 0, 4096).unwrap(), [0; 4096]);
}

#[test]
fn unsafe_cache_never_flushes() {
    let image = Image::new(&[0; 4096]);
    let disk = with_failing(&image, CacheMode::Unsafe, libc::EIO, |op| {
        matches!(op, FileOp::Sync | FileOp::Write { durable: true, .. })
    });
    run(&disk, Operation::Flush).unwrap();
    run(&disk, Operation::Write { offset: 0, buffers: buffers(&[1; 512]), durable: true }).unwrap();
}

#[derive(Default)]
struct Log(Mutex<Vec<u64>>);

impl CodeObserver for Log {
    fn code_written(&self, address: GuestAddress, _: u64) {
        self.0.lock().unwrap().push(address.0);
    }
}

#[test]
fn guest_memory_hears_of_a_read_before_the_request_is_done() {
    for engine in ENGINES {
        let image = Image::new(&pattern(512 * 1024, 0));
        let disk = image.open(&format!(",io={engine}"));
        let memory = Arc::new(GuestMemory::flat(MIB as u64).unwrap());
        let log = Arc::new(Log::default());
        memory.set_code_observer(Arc::clone(&log) as _);
        memory.set_code_page(GuestAddress(0x3000), true);
        // Longer than what is tried on the caller's thread, and shorter.
        for len in [0x4_8000, 0x4000] {
            let buffers = Buffers::guest(&memory, Access::Fill, [(GuestAddress(0), len)]).unwrap();
            let (sender, receiver) = std::sync::mpsc::channel();
            let seen = Arc::clone(&log);
            let done = Box::new(move |_| sender.send(std::mem::take(&mut *seen.0.lock().unwrap())).unwrap());
            disk.submit(Request { operation: Operation::Read { offset: 0, buffers }, done });
            disk.kick();
            assert_eq!(receiver.recv().unwrap(), [0x3000], "{engine}");
        }
    }
}
