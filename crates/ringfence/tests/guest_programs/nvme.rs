//! Keeps two NVMe disks busy under the guest's own kernel: admin commands in hot loops, direct and file I/O with every
//! byte checked, and in the second half controller resets. `nvme SECONDS SEED`; the first disk has a file system on
//! /mnt, the second, /dev/nvme1n1 with blocks of 4096 bytes, is scratch. Prints what was done, or panics.
//!
//! Built on its own as a static program. Commands go through the kernel's pass-through (linux/nvme_ioctl.h).

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, argument: *mut u8) -> i32;
}

const NVME_IOCTL_ADMIN_CMD: u64 = 0xc048_4e41;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const O_DIRECT: i32 = 0o40000;

const BLOCK: usize = 4096;
/// Blocks of each half of the scratch disk, which has a thread of its own.
const HALF: u64 = 1024;
const MIB: usize = 1 << 20;

static RESETTING: AtomicBool = AtomicBool::new(false);
static STOP: AtomicBool = AtomicBool::new(false);
static ADMIN: AtomicU64 = AtomicU64::new(0);
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);
static RAW: AtomicU64 = AtomicU64::new(0);
static FILES: AtomicU64 = AtomicU64::new(0);
static RESETS: AtomicU64 = AtomicU64::new(0);

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Memory that direct I/O takes.
#[repr(C, align(4096))]
struct Page([u8; BLOCK]);

struct Buffer(Vec<Page>);

impl Buffer {
    fn new(blocks: usize) -> Self {
        Self((0..blocks).map(|_| Page([0; BLOCK])).collect())
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: pages are plain bytes, one after the other.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * BLOCK) }
    }
}

/// struct nvme_admin_cmd.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

struct Admin {
    device: File,
    page: Buffer,
}

impl Admin {
    /// Runs a command that must end with `status`. `None` if a reset may have come between.
    fn run(&mut self, opcode: u8, namespace: u32, words: [u32; 2], data: usize, status: i32) -> Option<u32> {
        let [cdw10, cdw11] = words;
        let mut command = Command { opcode, namespace, cdw10, cdw11, ..Command::default() };
        if data > 0 {
            self.page.bytes().fill(0xa5);
            (command.address, command.data_len) = (self.page.bytes().as_mut_ptr() as u64, data as u32);
        }
        let resetting = RESETTING.load(Relaxed);
        // SAFETY: the kernel reads and writes the command and as much of the page as it says.
        let ended = unsafe { ioctl(self.device.as_raw_fd(), NVME_IOCTL_ADMIN_CMD, (&raw mut command).cast()) };
        ADMIN.fetch_add(1, Relaxed);
        // Host path error, aborted by the host: the kernel's own answers while it resets the controller.
        if resetting && (ended < 0 || matches!(ended & 0x7ff, 0x370 | 0x371)) {
            INTERRUPTED.fetch_add(1, Relaxed);
            return None;
        }
        let error = std::io::Error::last_os_error();
        assert_eq!(ended & 0x7ff, status, "opcode {opcode:#x} {words:x?}: {error}");
        Some(command.result)
    }

    fn text(&mut self, at: usize, len: usize) -> String {
        String::from_utf8_lossy(&self.page.bytes()[at..at + len]).trim_end().to_owned()
    }
}

fn admin(number: u32, mut random: Random) {
    let device = File::open(format!("/dev/nvme{number}")).expect("a controller");
    let mut admin = Admin { device, page: Buffer::new(1) };
    while !STOP.load(Relaxed) {
        match random.below(12) {
            0 | 1 => {
                if admin.run(0x06, 0, [1, 0], BLOCK, 0).is_some() {
                    assert_eq!(admin.text(4, 20), format!("disk{number}"), "the controller's serial number");
                }
            }
            2 => {
                if admin.run(0x06, 1, [0, 0], BLOCK, 0).is_some() {
                    let shift = admin.page.bytes()[130];
                    assert_eq!(shift, if number == 1 { 12 } else { 9 }, "block size");
                }
            }
            3 => {
                if admin.run(0x06, 0, [2, 0], BLOCK, 0).is_some() {
                    assert_eq!(admin.page.bytes()[..8], [1, 0, 0, 0, 0, 0, 0, 0], "the only namespace");
                }
            }
            4 => drop(admin.run(0x06, 9, [0, 0], BLOCK, 0x0b)),
            5 => {
                let (log, len) = [(1, 64), (2, 512), (3, 512), (5, 4096)][random.below(4) as usize];
                if admin.run(0x02, u32::MAX, [log | (len / 4 - 1) << 16, 0], len as usize, 0).is_some() && log == 2 {
                    assert_eq!(admin.page.bytes()[1..3], 300_u16.to_le_bytes(), "temperature");
                }
            }
            6 => drop(admin.run(0x02, u32::MAX, [0x77 | 127 << 16, 0], 512, 0x109)),
            7 => {
                let feature = [1, 2, 4, 5, 6, 7, 8, 10, 11][random.below(9) as usize];
                admin.run(0x0a, 0, [feature, 0], 0, 0);
            }
            8 => {
                // Warm enough for an event now and then, which the kernel asks for.
                let threshold = 290 + random.below(60) as u32;
                let set = admin.run(0x09, 0, [4, threshold], 0, 0);
                let got = admin.run(0x0a, 0, [4, 0], 0, 0);
                if let (Some(_), Some(got)) = (set, got) {
                    // A reset puts the first value back.
                    assert!(got == threshold || (RESETTING.load(Relaxed) && got == 0xffff), "{got}");
                }
            }
            9 => {
                // The kernel has the only pair of queues; there is no second, and no third to be deleted.
                admin.run(0x05, 0, [2 | 15 << 16, 1], BLOCK, 0x101);
                admin.run(0x00, 0, [3, 0], 0, 0x101);
            }
            10 => drop(admin.run(0x08, 0, [1 | 0xfff << 16, 0], 0, 0).map(|result| assert_eq!(result, 1))),
            _ => drop(admin.run(0x7d, 0, [0, 0], 0, 0x01)),
        }
    }
}

/// Fills a block so that it differs from every other and from itself at another time.
fn fill(block: &mut [u8], number: u64, mark: u64) {
    for (word, at) in block.chunks_exact_mut(8).zip(0_u64..) {
        word.copy_from_slice(&(mark << 40 ^ number << 16 ^ at).to_le_bytes());
    }
}

/// Reads and writes one half of the scratch disk past the guest's page cache, up to 1 MiB at a time.
fn raw(half: u64, mut random: Random) {
    let mut options = OpenOptions::new();
    let disk = options.read(true).write(true).custom_flags(O_DIRECT).open("/dev/nvme1n1").expect("a scratch disk");
    let mut buffer = Buffer::new(MIB / BLOCK);
    let mut expected = [0; BLOCK];
    // What each block was filled with last; 0 is zeroes, `None` anything.
    let mut marks = vec![None; HALF as usize];
    let mut mark = 0;
    while !STOP.load(Relaxed) {
        let blocks = [1, 1 + random.below(16), 256][random.below(3) as usize];
        let first = random.below(HALF - blocks);
        let range = first as usize..(first + blocks) as usize;
        let (at, len) = ((half * HALF + first) * BLOCK as u64, blocks as usize * BLOCK);
        let mut request = [at, len as u64];
        let request = request.as_mut_ptr().cast();
        match random.below(8) {
            0..=2 => {
                mark += 1;
                for (block, number) in buffer.bytes()[..len].chunks_exact_mut(BLOCK).zip(first..) {
                    fill(block, number, mark);
                }
                disk.write_all_at(&buffer.bytes()[..len], at).expect("the disk takes data");
                marks[range].fill(Some(mark));
            }
            3..=5 => {
                disk.read_exact_at(&mut buffer.bytes()[..len], at).expect("the disk gives data");
                for (block, number) in buffer.bytes()[..len].chunks_exact(BLOCK).zip(first..) {
                    match marks[number as usize] {
                        None => continue,
                        Some(0) => expected.fill(0),
                        Some(mark) => fill(&mut expected, number, mark),
                    }
                    assert!(*block == expected, "block {number} of half {half}");
                }
            }
            6 if random.below(2) == 0 => {
                // SAFETY: the kernel reads two numbers.
                assert_eq!(unsafe { ioctl(disk.as_raw_fd(), BLKZEROOUT, request) }, 0);
                marks[range].fill(Some(0));
            }
            6 => {
                // SAFETY: the kernel reads two numbers.
                assert_eq!(unsafe { ioctl(disk.as_raw_fd(), BLKDISCARD, request) }, 0);
                marks[range].fill(None);
            }
            _ => disk.sync_data().expect("the disk flushes"),
        }
        RAW.fetch_add(1, Relaxed);
    }
}

/// Writes files durably and reads them past the page cache.
fn files(mut random: Random) {
    let mut buffer = Buffer::new(64);
    let mut expected = Buffer::new(64);
    for round in 0_u64.. {
        if STOP.load(Relaxed) {
            return;
        }
        let path = format!("/mnt/{}", round % 12);
        let len = BLOCK * (1 + random.below(64) as usize);
        fill(&mut expected.bytes()[..len], round, 1);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(&path).expect("a file");
        file.write_all_at(&expected.bytes()[..len], 0).expect("room for it");
        file.sync_all().expect("the file system flushes");
        let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(&path).expect("the file");
        file.read_exact_at(&mut buffer.bytes()[..len], 0).expect("its data");
        assert!(buffer.bytes()[..len] == expected.bytes()[..len], "{path}");
        FILES.fetch_add(1, Relaxed);
    }
}

/// Resets one controller after the other.
fn resets(until: Instant, mut random: Random) {
    while Instant::now() < until {
        let path = format!("/sys/class/nvme/nvme{}/reset_controller", random.below(2));
        match std::fs::write(&path, "1") {
            Ok(()) => RESETS.fetch_add(1, Relaxed),
            // The kernel is at it already, after a reset that it found necessary itself: that is none of ours.
            Err(error) => panic!("{path}: {error}"),
        };
        thread::sleep(Duration::from_millis(random.below(60)));
    }
}

fn main() {
    let argument = |index| std::env::args().nth(index).and_then(|word| word.parse().ok()).expect("nvme SECONDS SEED");
    let (seconds, seed): (u64, u64) = (argument(1), argument(2));
    let random = |thread: u64| Random(seed.wrapping_add(thread).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let begin = Instant::now();
    let half = Duration::from_secs(seconds) / 2;
    thread::scope(|scope| {
        // A thread that panics ends the whole program, with its message.
        scope.spawn(|| admin(0, random(1)));
        scope.spawn(|| admin(1, random(2)));
        scope.spawn(|| raw(0, random(3)));
        scope.spawn(|| raw(1, random(4)));
        scope.spawn(|| files(random(5)));
        thread::sleep(half);
        RESETTING.store(true, Relaxed);
        // A command that was sent before may still run.
        thread::sleep(Duration::from_millis(200));
        resets(begin + 2 * half, random(6));
        STOP.store(true, Relaxed);
    });
    let counts = [&ADMIN, &RAW, &FILES, &RESETS, &INTERRUPTED].map(|count| count.load(Relaxed));
    println!("@nvme {} {} {} {} {}", counts[0], counts[1], counts[2], counts[3], counts[4]);
}
