//! Translated code against the interpreter: random programs on two machines, compared wherever the translator stops.

mod generate;
mod hole;
mod privilege;
mod programs;
mod rows;
mod shadow;
mod stack;
mod tables;
mod targets;
mod vectors;

use std::sync::Arc;

use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_oracle::Random;
use ringfence_x86::segment::attribute;
use ringfence_x86::{Cr0, Cr4, Efer, Exception};

use super::{Jit, Options, SMALLEST_CODE};
use crate::code::CodeMap;
use crate::interp::cpu::{Connections, Cpu};
use crate::interp::features::host_cpuid;
use crate::interp::op::RIP;
use crate::interp::run::Interpreter;
use crate::vector::pass::host_has_avx512;

/// Two pages of code.
pub(super) const CODE: u64 = 0x3_0000;
pub(super) const CODE_LEN: usize = 0x2000;
/// Eight pages of data: the fifth is not present, the sixth read-only.
pub(super) const DATA: u64 = 0x2_0000;
const DATA_LEN: usize = 0x8000;
/// The first 2 MiB appear here once more.
const ALIAS: u64 = 0xffff_8800_0000_0000;

struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// A vCPU in 64-bit mode at CPL 0, with paging, in memory of its own.
pub(super) fn machine() -> Interpreter {
    let memory = Arc::new(GuestMemory::flat(1 << 20).unwrap());
    let write = |at: u64, value: u64| memory.write(GuestAddress(at), value).unwrap();
    write(0x1000, 0x2003);
    write(0x1000 + 8 * 272, 0x2003);
    write(0x2000, 0x3003);
    write(0x3000, 0x4003);
    for page in 0..256 {
        let bits = match page << 12 {
            // The tables themselves are out of the programs' reach, or the two soft TLBs would age differently.
            0x1000..0x5000 | 0x2_4000 => 0,
            0x2_5000 => 1,
            _ => 3,
        };
        write(0x4000 + 8 * page, page << 12 | bits);
    }
    let mut cpu = Cpu::new(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::new(host_cpuid().clone()),
    })
    .unwrap();
    // Neither x87 nor vectors, unless a test asks for them.
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::EM;
    cpu.cr4 = Cr4::PAE | Cr4::FSGSBASE;
    cpu.cr3 = 0x1000;
    cpu.efer = Efer::LME | Efer::LMA | Efer::NXE;
    cpu.segments[1].attributes |= attribute::LONG;
    cpu.segments[1].base = 0;
    cpu.segments[4].base = 0x100;
    cpu.segments[5].base = 0x40;
    cpu.update_mode();
    Interpreter::new(cpu)
}

/// Runs under the translator until an instruction faults, and tells how.
fn until_fault(m: &mut Interpreter, jit: &mut Jit) -> Exception {
    let end = (0..1_000_000).find_map(|_| jit.run(m, 1000).err());
    end.expect("the program ends")
}

/// A vCPU and the translator under test.
struct Pair {
    reference: Interpreter,
    subject: Interpreter,
    jit: Jit,
    exact: bool,
    /// One instruction at a time.
    single: bool,
    /// Programs have vector instructions.
    vectors: bool,
    /// The program under way, for messages.
    code: Vec<u8>,
    start: u64,
    /// What makes this round, and the count of instructions before it.
    seed: u64,
    origin: u64,
}

fn bytes(machine: &Interpreter, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.cpu.memory.read_bytes(GuestAddress(at), &mut bytes).unwrap();
    bytes
}

impl Pair {
    fn new(options: Options, vectors: bool) -> Self {
        let (mut reference, mut subject) = (machine(), machine());
        for cpu in [&mut reference.cpu, &mut subject.cpu].into_iter().filter(|_| vectors) {
            cpu.cr0 -= Cr0::EM;
            cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXSAVE | Cr4::OSXMMEXCPT;
            // Without AVX there is no such state, and VEX raises #UD.
            let _ = cpu.vector.set_xcr0(7);
            cpu.update_mode();
        }
        let (exact, single) = (options.exact_flags, options.region == 1);
        let jit = Jit::new(options, &subject.cpu.code).unwrap();
        Self {
            reference,
            subject,
            jit,
            exact,
            single,
            vectors,
            code: Vec::new(),
            start: 0,
            seed: 0,
            origin: 0,
        }
    }

    /// Loads a program and registers.
    fn load(&mut self, random: &mut Random, program: &generate::Program) {
        let data: Vec<u8> = (0..DATA_LEN / 8).flat_map(|_| random.bits().to_le_bytes()).collect();
        let alias = if random.chance(30) { ALIAS } else { 0 };
        let rip = CODE + program.start as u64 + alias;
        let mut regs: [u64; 16] = std::array::from_fn(|_| generate::value(random));
        for pointer in generate::POINTERS {
            regs[usize::from(pointer)] = DATA + 0x800 + random.below(0x2800);
        }
        if self.vectors {
            self.load_vectors(random, &mut regs);
        }
        regs[4] &= !7;
        let flags = random.bits();
        for machine in [&mut self.reference, &mut self.subject] {
            machine.cpu.memory.write_bytes(GuestAddress(CODE), &program.code).unwrap();
            machine.cpu.memory.write_bytes(GuestAddress(DATA), &data).unwrap();
            machine.cpu.regs[..16].copy_from_slice(&regs);
            machine.cpu.regs[RIP] = rip;
            machine.cpu.set_rflags(flags & 0x8d5);
        }
        (self.code, self.start) = (program.code.clone(), rip);
    }

    /// Loads vector registers, and makes pointers such as vector operands want: aligned, or near the end of a page.
    fn load_vectors(&mut self, random: &mut Random, regs: &mut [u64; 16]) {
        let aligned = random.chance(85);
        for pointer in generate::POINTERS {
            let pointer = &mut regs[usize::from(pointer)];
            if random.chance(25) {
                *pointer = (*pointer & !0xfff) + 0x1000 * random.below(2) - random.below(0x60);
            }
            if aligned {
                *pointer &= !31;
            }
        }
        let mut state = self.reference.cpu.vector.unit.vector_state();
        // The upper halves are clear often, and what lies above is nobody's here: mostly, where it exists at all.
        let words = if is_x86_feature_detected!("avx512f") && random.chance(20) {
            8
        } else if random.chance(50) {
            4
        } else {
            2
        };
        for register in &mut state.zmm[..16] {
            *register = std::array::from_fn(|i| if i < words { vectors::word(random) } else { 0 });
        }
        let wide = host_has_avx512() && random.chance(60);
        for register in state.zmm[16..].iter_mut().filter(|_| wide) {
            *register = std::array::from_fn(|_| vectors::word(random));
        }
        for register in state.k.iter_mut().filter(|_| wide) {
            *register = random.bits() >> random.below(64);
        }
        state.mxcsr = 0x1f80;
        for machine in [&mut self.reference, &mut self.subject] {
            let _ = machine.cpu.vector.set_xcr0(if wide { 0xe7 } else { 7 });
            machine.cpu.vector.unit.set_vector_state(&state);
        }
    }

    /// One run of the translator, and the interpreter up to the same count. The exception, if there was one.
    fn advance(&mut self, limit: u64) -> Option<Exception> {
        let before = self.subject.cpu.retired;
        let outcome = self.jit.run(&mut self.subject, limit);
        // x87 state is the thread's while it is in use, and two machines share this one.
        self.subject.cpu.vector.unit.park();
        let count = self.subject.cpu.retired - before;
        assert!(count <= limit, "{count} instructions where {limit} were allowed");
        let (start, mut expected) = (self.reference.cpu.retired, Ok(()));
        loop {
            let done = self.reference.cpu.retired - start;
            if done > count || expected.is_err() || done == count && outcome.is_ok() {
                break;
            }
            let left = (count - done).max(u64::from(outcome.is_err()));
            expected = self.reference.run_block(left as usize);
        }
        self.reference.cpu.vector.unit.park();
        assert_eq!(outcome, expected, "{}", self.context());
        self.compare(outcome.is_err());
        outcome.err()
    }

    fn compare(&self, faulted: bool) {
        let (a, b) = (&self.reference.cpu, &self.subject.cpu);
        assert_eq!(a.regs, b.regs, "registers: {}", self.context());
        assert_eq!(a.retired, b.retired, "count: {}", self.context());
        assert_eq!(a.flags, b.flags, "system flags: {}", self.context());
        if self.exact {
            // Otherwise flags that nothing will look at may differ; a wrong one that something looks at shows there.
            assert_eq!(a.status.canonical(), b.status.canonical(), "flags: {}", self.context());
        }
        if self.vectors {
            self.compare_vectors();
        }
        if faulted {
            assert_eq!(a.fault_address, b.fault_address, "fault address: {}", self.context());
        }
    }

    fn compare_vectors(&self) {
        let (a, b) = (&self.reference.cpu.vector.unit, &self.subject.cpu.vector.unit);
        if !a.same(b) {
            let (a, b) = (a.vector_state(), b.vector_state());
            for i in (0..32).filter(|&i| a.zmm[i] != b.zmm[i]) {
                println!("zmm{i}: {:x?}\nbecame {:x?}", a.zmm[i], b.zmm[i]);
            }
            panic!("vectors, MXCSR {:#x} and {:#x}: {}", a.mxcsr, b.mxcsr, self.context());
        }
    }

    fn compare_memory(&self) {
        for (at, len) in [(DATA, DATA_LEN), (CODE, CODE_LEN)] {
            let (a, b) = (bytes(&self.reference, at, len), bytes(&self.subject, at, len));
            if let Some(i) = (0..len).find(|&i| a[i] != b[i]) {
                panic!("memory at {:#x}: {:#x} became {:#x}: {}", at + i as u64, a[i], b[i], self.context());
            }
        }
    }

    /// The program and where it is.
    fn context(&self) -> String {
        use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
        use std::fmt::Write;
        let offset = (self.start & 0x1fff) as usize;
        let mut formatter = GasFormatter::new();
        let (a, b) = (&self.reference.cpu, &self.subject.cpu);
        let mut text = format!("seed of round {:#x}\n", self.seed);
        for (cpu, name) in [(a, "reference"), (b, "subject  ")] {
            writeln!(
                text,
                "{name} {:x?} {:#x} retired {}",
                cpu.regs,
                cpu.rflags(),
                cpu.retired - self.origin
            )
            .unwrap();
        }
        let code = &self.code[offset..];
        for instruction in Decoder::with_ip(64, code, self.start, DecoderOptions::NONE).iter().take(60) {
            write!(text, "{:x}: ", instruction.ip()).unwrap();
            formatter.format(&instruction, &mut text);
            text.push('\n');
        }
        text
    }
}

/// Runs random programs for `count` rounds.
fn rounds(seed: u64, count: u64, options: Options) -> u64 {
    run_rounds(Pair::new(options, false), seed, count)
}

/// Likewise, with vector instructions.
fn vector_rounds(seed: u64, count: u64, options: Options) -> u64 {
    run_rounds(Pair::new(options, true), seed, count)
}

fn run_rounds(mut pair: Pair, seed: u64, count: u64) -> u64 {
    run_rounds_of(&mut pair, seed, count);
    pair.jit.cache.sizes.regions
}

fn run_rounds_of(pair: &mut Pair, seed: u64, count: u64) {
    for round in 0..count {
        let mut random = Random::new(seed << 32 | round);
        let random = &mut random;
        (pair.seed, pair.origin) = (seed << 32 | round, pair.subject.cpu.retired);
        let program = generate::program(random, pair.vectors);
        pair.load(random, &program);
        let end = pair.subject.cpu.retired + 400;
        let mut faults = 0;
        while pair.subject.cpu.retired < end && faults < 12 {
            let most = if pair.single {
                1
            } else if random.chance(50) {
                12
            } else {
                200
            };
            let limit = 1 + random.below(most);
            if pair.advance(limit).is_some() {
                faults += 1;
                let next = pair.start & !0x1fff | random.pick(&program.starts) as u64;
                // Going on elsewhere, where other flags are looked at.
                pair.subject.cpu.status = pair.reference.cpu.status;
                for machine in [&mut pair.reference, &mut pair.subject] {
                    machine.cpu.regs[RIP] = next;
                    machine.cpu.regs[4] = DATA + 0x1800;
                }
            }
        }
        pair.compare_memory();
    }
}

fn seed(default: u64) -> u64 {
    std::env::var("RINGFENCE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

fn count(default: u64) -> u64 {
    std::env::var("RINGFENCE_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

const OPTIONS: Options =
    Options { code_size: 4 << 20, threshold: 1, region: 64, exact_flags: false, profile: false };

#[test]
fn random_instructions_one_at_a_time_run_as_in_the_interpreter() {
    let options = Options { region: 1, exact_flags: true, ..OPTIONS };
    assert!(rounds(seed(4), count(1000), options) > 1000);
}

#[test]
fn random_programs_run_as_in_the_interpreter() {
    assert!(rounds(seed(1), count(3000), OPTIONS) > 1000);
}

#[test]
fn random_programs_with_exact_flags_run_as_in_the_interpreter() {
    assert!(rounds(seed(2), count(3000), Options { exact_flags: true, ..OPTIONS }) > 1000);
}

#[test]
fn random_programs_partly_interpreted_run_as_in_the_interpreter() {
    assert!(rounds(seed(3), count(3000), Options { threshold: 3, ..OPTIONS }) > 300);
}

#[test]
fn random_vector_instructions_one_at_a_time_run_as_in_the_interpreter() {
    let options = Options { region: 1, exact_flags: true, ..OPTIONS };
    assert!(vector_rounds(seed(5), count(1000), options) > 1000);
}

#[test]
fn random_vector_programs_run_as_in_the_interpreter() {
    assert!(vector_rounds(seed(6), count(3000), OPTIONS) > 1000);
}

#[test]
fn random_vector_programs_with_exact_flags_run_as_in_the_interpreter() {
    assert!(vector_rounds(seed(7), count(3000), Options { exact_flags: true, ..OPTIONS }) > 1000);
}

#[test]
fn random_vector_programs_partly_interpreted_run_as_in_the_interpreter() {
    assert!(vector_rounds(seed(8), count(3000), Options { threshold: 3, ..OPTIONS }) > 300);
}

#[test]
fn random_programs_in_the_smallest_code_memory_run_as_in_the_interpreter() {
    for (seed, vectors) in [(seed(9), false), (seed(10), true)] {
        let mut pair = Pair::new(Options { code_size: SMALLEST_CODE, ..OPTIONS }, vectors);
        run_rounds_of(&mut pair, seed, count(3000));
        let sizes = &pair.jit.cache.sizes;
        assert!(sizes.flushes * 100 > count(3000) && sizes.links > sizes.flushes, "{sizes:?}");
    }
}
