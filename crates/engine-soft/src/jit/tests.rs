//! Translated code against the interpreter: random programs on two machines, compared wherever the translator stops.

mod crossings;
mod forms;
mod gather;
mod generate;
mod hole;
mod kept;
mod loops;
mod masked;
mod moves;
mod mxcsr;
mod narrow;
mod pair;
mod pending;
mod privilege;
mod programs;
mod rows;
mod shadow;
mod slots;
mod stack;
mod stack_rows;
mod strings;
mod tables;
mod targets;
mod time;
mod unmasked;
mod vectors;
mod x87;

use std::sync::Arc;

use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_oracle::Random;
use ringfence_x86::segment::attribute;
use ringfence_x86::{Cr0, Cr4, Efer, Exception};

use generate::Mix;
use pair::{Pair, run_rounds, run_rounds_of};

use super::{Jit, Options, SMALLEST_CODE};
use crate::code::CodeMap;
use crate::interp::code_address::CodeAddress;
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
    let memory = memory();
    machine_of(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::new(host_cpuid().clone()),
    })
}

/// Memory with page tables.
fn memory() -> Arc<GuestMemory> {
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
    memory
}

/// A vCPU as [`machine`]'s in such memory.
fn machine_of(connections: Connections) -> Interpreter {
    let mut cpu = Cpu::new(connections).unwrap();
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

/// Lets a vCPU execute x87 and vector instructions, with these state components if the host has them, which is returned: without AVX there is
/// no such state, and VEX raises #UD.
fn allow_vectors(cpu: &mut Cpu, components: u64) -> bool {
    cpu.cr0 -= Cr0::EM;
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXSAVE | Cr4::OSXMMEXCPT;
    let there = cpu.vector.set_xcr0(components);
    cpu.update_mode();
    there
}

/// Runs under the translator until an instruction faults, and tells how.
fn until_fault(m: &mut Interpreter, jit: &mut Jit) -> Exception {
    let end = (0..1_000_000).find_map(|_| jit.run(m, 1000).err());
    end.expect("the program ends")
}

fn bytes(machine: &Interpreter, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.cpu.memory.read_bytes(GuestAddress(at), &mut bytes).unwrap();
    bytes
}

/// Runs random programs for `count` rounds.
fn rounds(seed: u64, count: u64, options: Options) -> u64 {
    run_rounds(Pair::new(options, Mix::Integers), seed, count)
}

/// Likewise, with vector instructions.
fn vector_rounds(seed: u64, count: u64, options: Options) -> u64 {
    run_rounds(Pair::new(options, Mix::Vectors), seed, count)
}

/// Likewise, with x87 and MMX instructions, on processors that record more or less of them.
fn x87_rounds(seed: u64, count: u64, options: Options) -> u64 {
    let of = |bits| {
        let pair = Pair::new(options, Mix::X87).recording(x87::quirks(bits));
        // Most of them as the host's, which are more likely to be this way.
        let count = if bits == 0 { count / 2 } else { count / 14 };
        run_rounds(pair, seed << 8 | bits, count)
    };
    (0..8).map(of).sum()
}

fn seed(default: u64) -> u64 {
    std::env::var("RINGFENCE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

fn count(default: u64) -> u64 {
    std::env::var("RINGFENCE_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

const OPTIONS: Options =
    Options { code_size: 4 << 20, threshold: 1, region: 64, ample: 20, exact_flags: false, profile: false };

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

/// Likewise, with some exceptions not masked from the start.
fn unmasked_rounds(seed: u64, count: u64, options: Options) {
    run_rounds(Pair::new(options, Mix::Vectors).unmasked(), seed, count);
}

#[test]
fn random_unmasked_vector_instructions_one_at_a_time_run_as_in_the_interpreter() {
    unmasked_rounds(seed(16), count(1000), Options { region: 1, exact_flags: true, ..OPTIONS });
}

#[test]
fn random_unmasked_vector_programs_run_as_in_the_interpreter() {
    unmasked_rounds(seed(17), count(2000), OPTIONS);
}

#[test]
fn random_unmasked_vector_programs_with_exact_flags_run_as_in_the_interpreter() {
    unmasked_rounds(seed(18), count(2000), Options { exact_flags: true, ..OPTIONS });
}

#[test]
fn random_x87_instructions_one_at_a_time_run_as_in_the_interpreter() {
    let options = Options { region: 1, exact_flags: true, ..OPTIONS };
    assert!(x87_rounds(seed(11), count(1000), options) > 1000);
}

#[test]
fn random_x87_programs_run_as_in_the_interpreter() {
    assert!(x87_rounds(seed(12), count(3000), OPTIONS) > 1000);
}

#[test]
fn random_x87_programs_with_exact_flags_run_as_in_the_interpreter() {
    assert!(x87_rounds(seed(13), count(3000), Options { exact_flags: true, ..OPTIONS }) > 1000);
}

#[test]
fn random_x87_programs_partly_interpreted_run_as_in_the_interpreter() {
    assert!(x87_rounds(seed(14), count(3000), Options { threshold: 3, ..OPTIONS }) > 300);
}

#[test]
fn random_programs_in_the_smallest_code_memory_run_as_in_the_interpreter() {
    for (seed, mix) in [(seed(9), Mix::Integers), (seed(10), Mix::Vectors), (seed(15), Mix::X87)] {
        let mut pair = Pair::new(Options { code_size: SMALLEST_CODE, ..OPTIONS }, mix);
        run_rounds_of(&mut pair, seed, count(3000));
        // A round given up takes the counts with it.
        let sizes = &pair.jit.cache.sizes;
        let often = sizes.flushes * 200 > count(3000) && sizes.links > sizes.flushes;
        assert!(often || pair.given_up > 0, "{sizes:?}");
    }
}
