//! Writes code and runs it, in all the ways that programs do, and compares each result with what the code should give.
//! `writes_code SEED SCALE FILE`: `FILE`, a file or a scratch disk, is overwritten and read back past the page cache. Prints
//! one line for each way, its name and a digest; the same seed and scale give the same lines on every computer.
//!
//! Built on its own as a static program and run both on the host and in a guest. x86-64 promises that a store to code shows at
//! once to the CPU that made it, if it went through the same linear address (SDM 3A 9.1.3, 12.6); through another one a
//! serializing instruction must come between, which is CPUID here.

use std::arch::asm;
use std::arch::x86_64::__cpuid;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    fn mmap(address: *mut c_void, len: usize, access: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn munmap(address: *mut c_void, len: usize) -> i32;
    fn mprotect(address: *mut c_void, len: usize, access: i32) -> i32;
    fn memfd_create(name: *const u8, flags: u32) -> i32;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

const PAGE: usize = 4096;
const READ_WRITE: i32 = 3;
const READ_EXECUTE: i32 = 5;
const ANY: i32 = 7;
const SHARED: i32 = 1;
const PRIVATE: i32 = 2;
const FIXED: i32 = 0x10;
const ANONYMOUS: i32 = 0x20;
const O_DIRECT: i32 = 0o40000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 29
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }

    /// Mostly a few times, so that code is decoded but not translated; sometimes often.
    fn times(&mut self) -> usize {
        [1, 2, 5, 12, 40, 120][self.below(6)]
    }
}

/// FNV-1a over words.
struct Digest(u64);

impl Digest {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(17);
    }
}

/// Memory of the program's own, unmapped when dropped.
struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize, access: i32, flags: i32, fd: i32) -> Self {
        // SAFETY: a new mapping where the kernel has room.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        assert!(start as isize != -1, "mmap: {}", std::io::Error::last_os_error());
        Self { start: start.cast(), len }
    }

    fn private(pages: usize, access: i32) -> Self {
        Self::new(pages * PAGE, access, PRIVATE | ANONYMOUS, -1)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.wrapping_add(offset)
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping, and no Rust reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset), bytes.len()) };
        fence();
    }

    /// The same a byte at a time.
    fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        for (byte, at) in bytes.iter().zip(offset..) {
            // SAFETY: as above; `at` checks.
            unsafe { self.at(at).write_volatile(*byte) };
        }
        fence();
    }

    fn protect(&self, access: i32) {
        // SAFETY: all of a mapping of ours.
        assert_eq!(unsafe { mprotect(self.start.cast(), self.len, access) }, 0);
    }

    fn call(&self, offset: usize, argument: u64) -> u64 {
        // SAFETY: callers have written a function there.
        let function: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(self.at(offset)) };
        function(argument)
    }

    /// Calls it some times and compares each result.
    fn check(&self, offset: usize, steps: &[Step], random: &mut Random, digest: &mut Digest) {
        for _ in 0..random.times() {
            let argument = random.next();
            let expected = run(steps, argument);
            assert_eq!(self.call(offset, argument), expected, "{steps:x?} of {argument:#x} at {:p}", self.at(offset));
            digest.add(expected);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing of it is in use any more.
        unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// Keeps the compiler from moving stores behind the call of what they wrote.
fn fence() {
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
}

/// An instruction on rax.
#[derive(Clone, Copy, Debug)]
enum Step {
    Add(i32),
    Xor(i32),
    Multiply(i32),
    Rotate(u8),
    /// Adds 3 if the lowest bit is set: a branch.
    Odd,
}

fn steps(random: &mut Random, count: usize) -> Vec<Step> {
    let step = |_| {
        let number = random.next() as i32;
        match random.below(5) {
            0 => Step::Add(number),
            1 => Step::Xor(number),
            2 => Step::Multiply(number | 1),
            3 => Step::Rotate(number as u8 & 63),
            _ => Step::Odd,
        }
    };
    (0..count).map(step).collect()
}

/// What the steps make of a number.
fn run(steps: &[Step], argument: u64) -> u64 {
    steps.iter().fold(argument, |value, step| match *step {
        Step::Add(n) => value.wrapping_add(n as i64 as u64),
        Step::Xor(n) => value ^ n as i64 as u64,
        Step::Multiply(n) => value.wrapping_mul(n as i64 as u64),
        Step::Rotate(n) => value.rotate_left(u32::from(n)),
        Step::Odd => value + if value & 1 == 1 { 3 } else { 0 },
    })
}

/// `mov rax, rdi`
const TAKE: [u8; 3] = [0x48, 0x89, 0xf8];
const RETURN: u8 = 0xc3;

fn body(steps: &[Step]) -> Vec<u8> {
    let mut code = Vec::new();
    for step in steps {
        match *step {
            Step::Add(n) => code.extend([&[0x48, 0x05][..], &n.to_le_bytes()].concat()),
            Step::Xor(n) => code.extend([&[0x48, 0x35][..], &n.to_le_bytes()].concat()),
            Step::Multiply(n) => code.extend([&[0x48, 0x69, 0xc0][..], &n.to_le_bytes()].concat()),
            Step::Rotate(n) => code.extend([0x48, 0xc1, 0xc0, n]),
            // test al, 1; je over; add rax, 3
            Step::Odd => code.extend([0xa8, 1, 0x74, 4, 0x48, 0x83, 0xc0, 3]),
        }
    }
    code
}

fn function(steps: &[Step]) -> Vec<u8> {
    [&TAKE[..], &body(steps), &[RETURN]].concat()
}

/// A page for each function, given back after its use, so that pages of code become others.
fn fresh(random: &mut Random, digest: &mut Digest, scale: usize) {
    for _ in 0..scale * 8 {
        let pages = Mapping::private(1 + random.below(3), ANY);
        let steps = steps(random, 6);
        let code = function(&steps);
        let at = random.below(pages.len - code.len());
        pages.write(at, &code);
        pages.check(at, &steps, random, digest);
    }
}

/// Rewrites the same pages, at places that come near each other and lie across page ends.
fn rewritten(random: &mut Random, digest: &mut Digest, scale: usize) {
    let pages = Mapping::private(4, ANY);
    for _ in 0..scale * 30 {
        let count = 1 + random.below(8);
        let steps = steps(random, count);
        let code = function(&steps);
        let at = match random.below(3) {
            0 => random.below(pages.len - code.len()),
            1 => PAGE * (1 + random.below(3)) - random.below(code.len()),
            _ => 128 + random.below(64),
        };
        if random.below(2) == 0 {
            pages.write(at, &code);
        } else {
            pages.write_bytes(at, &code);
        }
        pages.check(at, &steps, random, digest);
    }
}

/// Code that counts in its own page, at all distances; and is rewritten now and then.
fn beside_data(random: &mut Random, digest: &mut Digest, scale: usize) {
    let pages = Mapping::private(2, ANY);
    for _ in 0..scale {
        let steps = steps(random, 3);
        let at = random.below(256);
        // mov rax, rdi; add [rip + distance], rax; …; ret
        let head = [&TAKE[..], &[0x48, 0x01, 0x05]].concat();
        let rest = [body(&steps), vec![RETURN]].concat();
        let end = head.len() + 4 + rest.len();
        let data = at + end + [0, 1, 8, 64, 200, 4096][random.below(6)] + random.below(16);
        let distance = (data - at - head.len() - 4) as i32;
        pages.write(at, &[&head[..], &distance.to_le_bytes(), &rest].concat());
        pages.write(data, &[0; 8]);
        let mut sum = 0_u64;
        for _ in 0..random.times() * 4 {
            let argument = random.next();
            assert_eq!(pages.call(at, argument), run(&steps, argument), "at {at}, data at {data}");
            sum = sum.wrapping_add(argument);
        }
        // SAFETY: inside the mapping.
        let found = unsafe { pages.at(data).cast::<u64>().read_unaligned() };
        assert_eq!(found, sum, "at {at}, data at {data}");
        digest.add(sum);
    }
}

/// Never writable and executable at once.
fn protected(random: &mut Random, digest: &mut Digest, scale: usize) {
    let pages = Mapping::private(2, READ_WRITE);
    for _ in 0..scale * 3 {
        let steps = steps(random, 5);
        let code = function(&steps);
        let at = PAGE - random.below(code.len() + 64);
        pages.protect(READ_WRITE);
        pages.write(at, &code);
        pages.protect(READ_EXECUTE);
        pages.check(at, &steps, random, digest);
    }
}

fn shared_memory(len: usize) -> File {
    // SAFETY: a name that ends; the descriptor is ours.
    let file = unsafe { File::from_raw_fd(memfd_create(c"code".as_ptr().cast(), 0)) };
    file.set_len(len as u64).expect("memory");
    file
}

/// Written through one mapping, executed through two others.
fn second_mapping(random: &mut Random, digest: &mut Digest, scale: usize) {
    let memory = shared_memory(2 * PAGE);
    let to = Mapping::new(2 * PAGE, READ_WRITE, SHARED, memory.as_raw_fd());
    let from = [(); 2].map(|()| Mapping::new(2 * PAGE, READ_EXECUTE, SHARED, memory.as_raw_fd()));
    for round in 0..scale * 6 {
        let steps = steps(random, 5);
        let code = function(&steps);
        let at = PAGE - random.below(code.len() + 64);
        if round % 3 == 2 {
            memory.write_all_at(&code, at as u64).expect("memory is written");
        } else {
            to.write(at, &code);
        }
        __cpuid(0);
        from[round % 2].check(at, &steps, random, digest);
        from[(round + 1) % 2].check(at, &steps, random, digest);
    }
}

/// The kernel writes the code: from a file, and through a pipe.
fn read_by_the_kernel(random: &mut Random, digest: &mut Digest, scale: usize) {
    let file = shared_memory(PAGE);
    let (mut out, mut into) = std::io::pipe().expect("a pipe");
    let pages = Mapping::private(2, ANY);
    for round in 0..scale * 3 {
        let steps = steps(random, 5);
        let code = function(&steps);
        let at = PAGE - random.below(code.len() + 64);
        // SAFETY: inside the mapping; nothing else refers to it meanwhile.
        let target = unsafe { std::slice::from_raw_parts_mut(pages.at(at), code.len()) };
        if round % 2 == 0 {
            file.write_all_at(&code, 7).expect("the file takes it");
            file.read_exact_at(target, 7).expect("the file gives it");
        } else {
            into.write_all(&code).expect("the pipe takes it");
            out.read_exact(target).expect("the pipe gives it");
        }
        fence();
        pages.check(at, &steps, random, digest);
    }
}

/// The disk writes the code. True if past the page cache.
fn read_by_the_disk(path: &str, random: &mut Random, digest: &mut Digest, scale: usize) -> bool {
    let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    let direct = open(O_DIRECT).is_ok();
    let disk = open(if direct { O_DIRECT } else { 0 }).expect("a file or disk");
    let pages = Mapping::private(2, ANY);
    let from = Mapping::private(2, READ_WRITE);
    for _ in 0..scale {
        let steps = steps(random, 5);
        let code = function(&steps);
        let at = PAGE - random.below(code.len() + 64);
        from.write(at, &code);
        let block = random.below(8) as u64 * PAGE as u64;
        // SAFETY: both are whole mappings, and nothing else refers to them meanwhile.
        let (source, target) = unsafe {
            (std::slice::from_raw_parts(from.start, from.len), std::slice::from_raw_parts_mut(pages.start, pages.len))
        };
        disk.write_all_at(source, block).expect("the disk takes it");
        disk.read_exact_at(target, block).expect("the disk gives it");
        fence();
        pages.check(at, &steps, random, digest);
    }
    direct
}

/// One thread writes code, another runs it, in turn.
fn two_threads(random: &mut Random, digest: &mut Digest, scale: usize) {
    let pages = Mapping::private(1, ANY);
    let (turn, result) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = pages.start as u64;
    let rounds = scale as u64 * 2;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the other thread has written a function there before the turn is this one's.
            let function: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(start) };
            for round in 0..rounds {
                while turn.load(Ordering::Acquire) != 2 * round + 1 {
                    std::thread::yield_now();
                }
                __cpuid(0);
                result.store((0..20).fold(round, |value, _| function(value)), Ordering::Relaxed);
                turn.store(2 * round + 2, Ordering::Release);
            }
        });
        for round in 0..rounds {
            let steps = steps(random, 4);
            pages.write(0, &function(&steps));
            turn.store(2 * round + 1, Ordering::Release);
            while turn.load(Ordering::Acquire) != 2 * round + 2 {
                std::thread::yield_now();
            }
            let expected = (0..20).fold(round, |value, _| run(&steps, value));
            assert_eq!(result.load(Ordering::Relaxed), expected, "{steps:x?}");
            digest.add(expected);
        }
    });
}

/// Pages that jump one to the next. Now one is rewritten, now another page comes to be at its address, now a child
/// rewrites its own copy.
fn chained(random: &mut Random, digest: &mut Digest, scale: usize) {
    const LINKS: usize = 5;
    let pages = Mapping::private(LINKS, ANY);
    let mut parts: Vec<Vec<Step>> = vec![Vec::new(); LINKS];
    let write = |link: usize, steps: &[Step], to: &Mapping, page: usize| {
        let mut code = if link == 0 { TAKE.to_vec() } else { Vec::new() };
        code.extend(body(steps));
        if link + 1 < LINKS {
            // jmp to the next page's start
            let distance = (PAGE - code.len() - 5) as i32;
            code.push(0xe9);
            code.extend(distance.to_le_bytes());
        } else {
            code.push(RETURN);
        }
        to.write(page * PAGE, &code);
    };
    for (link, part) in parts.iter_mut().enumerate() {
        *part = steps(random, 2);
        write(link, part, &pages, link);
    }
    for round in 0..scale * 6 {
        let link = random.below(LINKS);
        let new = steps(random, 2);
        if round % 2 == 0 {
            write(link, &new, &pages, link);
        } else {
            let memory = shared_memory(PAGE);
            let other = Mapping::new(PAGE, READ_WRITE, SHARED, memory.as_raw_fd());
            write(link, &new, &other, 0);
            // SAFETY: replaces a page of ours.
            let placed = unsafe {
                mmap(pages.at(link * PAGE).cast(), PAGE, ANY, [PRIVATE, SHARED][random.below(2)] | FIXED, memory.as_raw_fd(), 0)
            };
            assert_eq!(placed.cast(), pages.at(link * PAGE));
        }
        parts[link] = new;
        let all = parts.concat();
        pages.check(0, &all, random, digest);
        if round % 64 == 63 {
            // Private copies: what the child writes must not be seen here.
            let copy = Mapping::private(1, ANY);
            let (ours, theirs) = (steps(random, 3), steps(random, 3));
            copy.write(0, &function(&ours));
            copy.check(0, &ours, random, digest);
            // SAFETY: the child only writes, computes and ends.
            let pid = unsafe { fork() };
            if pid == 0 {
                copy.write(0, &function(&theirs));
                let good = (0..100).all(|n| copy.call(0, n) == run(&theirs, n));
                // SAFETY: ends the child.
                unsafe { _exit(if good { 5 } else { 6 }) };
            }
            copy.check(0, &ours, random, digest);
            let mut status = 0;
            // SAFETY: a child of ours.
            assert_eq!(unsafe { waitpid(pid, &mut status, 0) }, pid);
            assert_eq!(status, 5 << 8, "the child's own code");
            copy.check(0, &ours, random, digest);
        }
    }
}

/// A store of `size` bytes at r9: the code, which takes the value from rdx, ymm0 or, in the last case, [rsi].
#[derive(Clone, Copy, Debug)]
enum Store {
    Move(usize),
    Exchange(usize),
    Push,
    /// Through rdi, which is the same address.
    Repeat(usize),
}

impl Store {
    const ALL: [Self; 14] = [
        Self::Move(1),
        Self::Move(2),
        Self::Move(4),
        Self::Move(8),
        Self::Move(16),
        Self::Move(32),
        Self::Exchange(1),
        Self::Exchange(2),
        Self::Exchange(4),
        Self::Exchange(8),
        Self::Push,
        Self::Repeat(3),
        Self::Repeat(32),
        Self::Repeat(100),
    ];

    fn size(self) -> usize {
        match self {
            Self::Move(size) | Self::Exchange(size) | Self::Repeat(size) => size,
            Self::Push => 8,
        }
    }

    fn code(self, avx: bool) -> &'static [u8] {
        match self {
            Self::Move(1) => &[0x41, 0x88, 0x11],
            Self::Move(2) => &[0x66, 0x41, 0x89, 0x11],
            Self::Move(4) => &[0x41, 0x89, 0x11],
            Self::Move(8) => &[0x49, 0x89, 0x11],
            // movups [r9], xmm0
            Self::Move(16) => &[0x41, 0x0f, 0x11, 0x01],
            // vmovups [r9], ymm0; or movups [r9], xmm0; movups [r9 + 16], xmm1
            Self::Move(_) if avx => &[0xc4, 0xc1, 0x7c, 0x11, 0x01],
            Self::Move(_) => &[0x41, 0x0f, 0x11, 0x01, 0x41, 0x0f, 0x11, 0x49, 0x10],
            Self::Exchange(1) => &[0x41, 0x86, 0x11],
            Self::Exchange(2) => &[0x66, 0x41, 0x87, 0x11],
            Self::Exchange(4) => &[0x41, 0x87, 0x11],
            Self::Exchange(_) => &[0x49, 0x87, 0x11],
            // xchg rsp, r9; push rdx; xchg rsp, r9
            Self::Push => &[0x4c, 0x87, 0xcc, 0x52, 0x4c, 0x87, 0xcc],
            // rep movsb
            Self::Repeat(_) => &[0xf3, 0xa4],
        }
    }

    /// Calls a function that begins with the store, and gives what it leaves in eax.
    ///
    /// # Safety
    /// `function` changes nothing but what its store does, at `target`, and rax, rcx, rsi, rdi.
    unsafe fn call(self, function: *const u8, target: *mut u8, data: &[u8; 128], avx: bool) -> u32 {
        let r9 = if matches!(self, Self::Push) { target.wrapping_add(8) } else { target };
        let result: u64;
        // SAFETY: by this function's contract; `data` holds as much as is read.
        unsafe {
            if avx {
                asm!("vmovups ymm0, [{}]", in(reg) data, out("ymm0") _);
            }
            asm!(
                "test {avx:e}, {avx:e}", "jz 2f", "vmovups ymm0, [rsi]", "jmp 3f", "2:",
                "movups xmm0, [rsi]", "movups xmm1, [rsi + 16]", "3:",
                "mov rdx, [rsi]", "xor eax, eax", "call r11",
                avx = in(reg) u32::from(avx), in("r9") r9, in("r11") function, inout("rdi") target => _,
                inout("rsi") data.as_ptr() => _, inout("rcx") self.size() => _, out("rax") result,
                lateout("rdx") _, clobber_abi("C"),
            );
        }
        result as u32
    }
}

/// `add eax, n`, again and again.
fn additions(random: &mut Random, count: usize) -> Vec<u8> {
    let number = |_| [&[0x05][..], &(random.next() as u32).to_le_bytes()].concat();
    (0..count).flat_map(number).collect()
}

/// What they add up to.
fn sum(code: &[u8]) -> u32 {
    let number = |five: &[u8]| u32::from_le_bytes([five[1], five[2], five[3], five[4]]);
    code.chunks_exact(5).map(number).fold(0, u32::wrapping_add)
}

/// Functions that change the numbers in the instructions that come next, the very next included: every kind of store, from
/// every place around a page's end and around the end of one of the granules in which we look at code.
fn own_stream(random: &mut Random, digest: &mut Digest, scale: usize) {
    const COUNT: usize = 24;
    let avx = is_x86_feature_detected!("avx");
    let pages = Mapping::private(2, ANY);
    let harmless = Mapping::private(1, READ_WRITE);
    for store in Store::ALL {
        let head = store.code(avx);
        let reach = COUNT * 5 - store.size();
        for start in (PAGE - 140..PAGE + 4).chain(1024 - 70..1024 + 4) {
            for distance in [0, 1, random.below(9), random.below(reach), reach] {
                // Fewer of them with a smaller scale.
                if distance > 1 && random.below(400) >= scale {
                    continue;
                }
                let (old, new) = (additions(random, COUNT), additions(random, COUNT));
                pages.write(start, &[head, &old, &[RETURN]].concat());
                let target = pages.at(start + head.len() + distance);
                let mut data = [0; 128];
                data[..store.size()].copy_from_slice(&new[distance..distance + store.size()]);
                // Often enough to be translated, or never.
                for _ in 0..[0, 3, 40][random.below(3)] {
                    // SAFETY: what was just written does so little.
                    let found = unsafe { store.call(pages.at(start), harmless.at(random.below(2048)), &data, avx) };
                    assert_eq!(found, sum(&old), "{store:?} elsewhere, from {start}");
                }
                let mut mixed = old.clone();
                mixed[distance..distance + store.size()].copy_from_slice(&new[distance..distance + store.size()]);
                let expected = sum(&mixed);
                for time in 0..2 {
                    // SAFETY: as above, and it changes itself as `mixed` says.
                    let found = unsafe { store.call(pages.at(start), target, &data, avx) };
                    assert_eq!(found, expected, "{store:?} from {start} to {distance} bytes behind, time {time}");
                    // An exchange has put it there already.
                }
                digest.add(u64::from(expected));
            }
        }
    }
}

fn main() {
    let mut words = std::env::args().skip(1);
    let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect("SEED SCALE FILE");
    let (seed, scale) = (number(), number() as usize);
    let path = words.next().expect("SEED SCALE FILE");
    type Way = fn(&mut Random, &mut Digest, usize);
    let ways: [(&str, Way); 9] = [
        ("fresh", fresh),
        ("rewritten", rewritten),
        ("beside-data", beside_data),
        ("protected", protected),
        ("second-mapping", second_mapping),
        ("read", read_by_the_kernel),
        ("threads", two_threads),
        ("chained", chained),
        ("own-stream", own_stream),
    ];
    for (number, (name, way)) in ways.into_iter().enumerate() {
        let mut digest = Digest::new();
        let begin = std::time::Instant::now();
        way(&mut Random(seed ^ (number as u64) << 32), &mut digest, scale);
        println!("{name} {:016x}", digest.0);
        eprintln!("{name}: {} ms", begin.elapsed().as_millis());
    }
    let mut digest = Digest::new();
    let direct = read_by_the_disk(&path, &mut Random(!seed), &mut digest, scale);
    println!("disk {:016x}", digest.0);
    eprintln!("past the page cache: {direct}");
}
