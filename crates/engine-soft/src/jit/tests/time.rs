//! RDTSC and RDTSCP, where time is the host's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ringfence_x86::msr;

use super::*;
use crate::interp::testing::{Lab, at};

const RDTSC: &[u8] = &[0x0f, 0x31, 0x0f, 0x0b];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9, 0x0f, 0x0b];
const KHZ: u32 = 1_000_000;

/// A clock that has had time to find out how fast the host's counter is.
fn clock() -> Arc<VirtualClock> {
    let clock = Arc::new(VirtualClock::new(ClockMode::Host, KHZ));
    thread::sleep(Duration::from_millis(30));
    clock.now();
    clock
}

/// Whether this host's counter tells time.
fn has_line(clock: &VirtualClock) -> bool {
    clock.line().exists()
}

/// A vCPU whose time is a clock's, and the translator.
struct Reader {
    lab: Lab,
    jit: Jit,
}

impl Reader {
    fn new(clock: Arc<VirtualClock>) -> Self {
        let mut lab = Lab::long();
        lab.m.cpu.clock = clock;
        let options = Options { profile: true, code_size: 1 << 20, ..OPTIONS };
        let jit = Jit::new(options, &lab.m.cpu.code).unwrap();
        Self { lab, jit }
    }

    /// How often translated code has called the handler.
    fn handed(&self) -> u64 {
        let forms = super::super::handed(&self.lab.m.cpu);
        forms.iter().filter(|(form, _)| form.starts_with("Rdtsc")).map(|(_, count)| count).sum()
    }

    /// Executes an instruction: the counter, or the exception that it raised; and whether the handler was called.
    fn read(&mut self, code: &[u8]) -> (Result<u64, Exception>, bool) {
        let handed = self.handed();
        let start = if self.lab.m.cpu.cpl == 3 { at::USER_CODE } else { at::CODE };
        self.lab.m.cpu.regs[RIP] = start;
        self.lab.code(code);
        self.lab.m.cpu.regs[..3].fill(u64::MAX);
        let end = until_fault(&mut self.lab.m, &mut self.jit);
        let cpu = &self.lab.m.cpu;
        let value = if cpu.regs[RIP] == start {
            Err(end)
        } else {
            assert_eq!((end, (cpu.regs[0] | cpu.regs[2]) >> 32), (Exception::UD, 0));
            Ok(cpu.regs[2] << 32 | cpu.regs[0])
        };
        (value, self.handed() != handed)
    }
}

#[test]
fn translated_time_is_the_clocks_and_kvmclocks() {
    let clock = clock();
    let mut reader = Reader::new(Arc::clone(&clock));
    let page = at::DATA;
    reader.lab.m.cpu.write_msr(msr::KVM_SYSTEM_TIME, page | 1).unwrap();
    reader.lab.m.cpu.write_msr(msr::TSC_AUX, 0x1234_5678).unwrap();
    for (what, offset) in [("as it starts", 0), ("ahead", 1 << 50), ("behind", u64::MAX - 4_000_000_000)] {
        reader.lab.m.cpu.write_msr(msr::TSC_ADJUST, offset).unwrap();
        for code in [RDTSC, RDTSCP] {
            let before = clock.now().0;
            let (value, handed) = reader.read(code);
            let after = clock.now().0;
            assert_eq!(handed, !has_line(&clock), "{what}");
            let value = value.unwrap();
            let time = value.wrapping_sub(offset);
            assert!((before..=after).contains(&time), "{what}: {before}, {time}, {after}");
            // KVM's page: the time that it tells by this value of the counter.
            let (tsc, ns) = (reader.lab.get::<u64>(page + 8), reader.lab.get::<u64>(page + 16));
            let (scale, shift) = (reader.lab.get::<u32>(page + 24), reader.lab.get::<u8>(page + 28) as i8);
            let ticks = value.wrapping_sub(tsc);
            let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let told = ns + ((u128::from(ticks) * u128::from(scale)) >> 32) as u64;
            assert!(told.abs_diff(time) <= 1, "{what}: {told}, {time}");
        }
        assert_eq!(reader.lab.m.cpu.regs[1], 0x1234_5678);
    }
    // Writing the counter moves the offset.
    reader.lab.m.cpu.write_msr(msr::TSC, 7_000_000).unwrap();
    let (value, _) = reader.read(RDTSC);
    assert!((7_000_000..1_000_000_000).contains(&value.unwrap()), "{value:?}");
}

#[test]
fn counted_time_is_the_handlers() {
    let mut reader = Reader::new(Arc::new(VirtualClock::new(ClockMode::Counted, 0)));
    for count in [0, 1000] {
        reader.lab.m.cpu.clock.advance_to(ringfence_engine::VirtualTime(count));
        let retired = reader.lab.m.cpu.retired;
        assert_eq!(reader.read(RDTSC), (Ok(retired.max(count)), true));
    }
}

#[test]
fn time_is_the_handlers_where_the_program_may_not_have_it() {
    let mut reader = Reader::new(clock());
    for (user, tsd) in [(false, true), (true, false), (true, true)] {
        if user {
            reader.lab.user();
        }
        reader.lab.m.cpu.cr4.set(Cr4::TSD, tsd);
        for code in [RDTSC, RDTSCP] {
            let (value, handed) = reader.read(code);
            assert_eq!(value.is_ok(), !(user && tsd));
            assert!(value.is_ok() || value == Err(Exception::GP0));
            assert!(!tsd || handed);
        }
    }
}

#[test]
fn line_that_was_left_alone_is_the_handlers() {
    let clock = clock();
    let mut reader = Reader::new(Arc::clone(&clock));
    assert_eq!(reader.read(RDTSC).1, !has_line(&clock));
    // Longer than a line reaches.
    thread::sleep(Duration::from_millis(2200));
    let (value, handed) = reader.read(RDTSC);
    assert!(handed && value.is_ok_and(|value| value <= clock.tsc() && value > 2_200_000_000));
    assert_eq!(reader.read(RDTSC).1, !has_line(&clock));
}

/// Reads the latest time that anybody has seen at `[rdi]`, then the counter, and puts that there, `r12` times; then UD2 with `r12` zero.
/// Where the counter is behind what somebody has seen, UD2 comes before that.
fn race(read_counter: &[u8; 5]) -> Vec<u8> {
    let rest = [
        0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
        0x48, 0x09, 0xd0, // or rax, rdx
        0x48, 0x39, 0xd8, // cmp rax, rbx
        0x72, 0x10, // jb to the end
        0x48, 0x89, 0xc1, // mov rcx, rax
        0x48, 0x89, 0xd8, // mov rax, rbx
        0xf0, 0x48, 0x0f, 0xb1, 0x0f, // lock cmpxchg [rdi], rcx
        0x49, 0xff, 0xcc, // dec r12
        0x75, 0xdc, // jnz to the start
        0x0f, 0x0b, // ud2
    ];
    // mov rbx, [rdi]
    [&[0x48, 0x8b, 0x1f], &read_counter[..], &rest].concat()
}

/// LFENCE and RDTSC, without which the counter may be read before memory is; RDTSCP, which waits by itself.
const ORDERED: [&[u8; 5]; 2] = [&[0x0f, 0xae, 0xe8, 0x0f, 0x31], &[0x0f, 0x01, 0xf9, 0x66, 0x90]];

#[test]
fn translated_time_never_goes_back_between_cpus() {
    const READS: u64 = 1_000_000;
    let (clock, memory) = (clock(), memory());
    for (start, read_counter) in [CODE, CODE + 0x1000].into_iter().zip(ORDERED) {
        memory.write_bytes(GuestAddress(start), &race(read_counter)).unwrap();
    }
    let code = CodeMap::new(Arc::clone(&memory));
    let connections = Connections {
        code,
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::clone(&clock),
        cpuid: Arc::new(host_cpuid().clone()),
    };
    let run = &|start| {
        let mut m = machine_of(connections.clone());
        let mut jit = Jit::new(Options { profile: true, ..OPTIONS }, &m.cpu.code).unwrap();
        (m.cpu.regs[RIP], m.cpu.regs[7], m.cpu.regs[12]) = (start, DATA, READS);
        let end = until_fault(&mut m, &mut jit);
        assert_eq!((end, m.cpu.regs[12]), (Exception::UD, 0), "{} behind {}", m.cpu.regs[0], m.cpu.regs[3]);
        m.cpu.translated.interpreted
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let cpus = [CODE, CODE + 0x1000].map(|start| scope.spawn(move || run(start)));
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // Another line each time.
                clock.skip(Duration::ZERO);
                clock.now();
                thread::sleep(Duration::from_micros(20));
            }
        });
        let handed = cpus.map(|cpu| cpu.join());
        done.store(true, Ordering::Relaxed);
        for handed in handed {
            let handed = handed.expect("time never goes back");
            assert!(handed < READS / 10 || !has_line(&clock), "{handed} calls of the handler");
        }
    });
}
