//! 32-bit code, translated and interpreted.

pub(super) mod generate;
mod programs;
mod turns;

use ringfence_memory::GuestAddress;
use ringfence_x86::SegmentRegister;
use ringfence_x86::segment::{DescriptorTable, Segment, Selector};

use super::*;

/// Where the descriptor table is: a page that programs can read only.
const TABLE: u64 = 0x5000;
/// The first 2 MiB appear here once more.
pub(super) const ALIAS32: u64 = 0xc000_0000;

/// Selectors of descriptors.
pub(super) mod selector {
    pub(in super::super) const CODE64: u16 = 0x08;
    pub(in super::super) const DATA: u16 = 0x10;
    pub(in super::super) const CODE32: u16 = 0x18;
    /// Data that ends at 128 KiB and some.
    pub(in super::super) const SHORT: u16 = 0x20;
    /// Data of 4 GiB that starts somewhere in a page.
    pub(in super::super) const AHEAD: u16 = 0x28;
    /// Data of 4 GiB that cannot be written.
    pub(in super::super) const READABLE: u16 = 0x30;
}

/// A segment's descriptor that has been accessed: base, limit in pages, access byte, flags.
fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16) << 48
        | flags << 52
        | (base >> 24) << 56
}

/// Loads a segment register from the table.
pub(super) fn load(cpu: &mut Cpu, register: SegmentRegister, selector: u16) {
    let raw = cpu.memory.read::<u64>(GuestAddress(TABLE + u64::from(selector))).unwrap();
    cpu.segments[register as usize] = Segment::from_descriptor(Selector(selector), raw);
}

/// Gives a vCPU of [`machine`]'s descriptors, and makes its code 32-bit code (`narrow`), or 64-bit code.
pub(super) fn prepare(cpu: &mut Cpu, narrow: bool) {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    const DATA: u64 = 0x93;
    const CODE: u64 = 0x9b;
    let entries = [
        (selector::CODE64, descriptor(0, 0xf_ffff, CODE, 0xa)),
        (selector::DATA, descriptor(0, 0xf_ffff, DATA, 0xc)),
        (selector::CODE32, descriptor(0, 0xf_ffff, CODE, 0xc)),
        (selector::SHORT, descriptor(0, 0x21, DATA, 0xc)),
        (selector::AHEAD, descriptor(0x2_0ffe, 0xf_ffff, DATA, 0xc)),
        (selector::READABLE, descriptor(0, 0xf_ffff, 0x91, 0xc)),
    ];
    for (selector, raw) in entries {
        cpu.memory.write(GuestAddress(TABLE + u64::from(selector)), raw).unwrap();
    }
    cpu.memory.write(GuestAddress(0x4000 + 8 * (TABLE >> 12)), TABLE | 1).unwrap();
    cpu.memory.write(GuestAddress(0x2000 + 8 * (ALIAS32 >> 30)), 0x3003_u64).unwrap();
    cpu.gdtr = DescriptorTable { base: TABLE, limit: 0x37 };
    load(cpu, Cs, if narrow { selector::CODE32 } else { selector::CODE64 });
    for register in [Ds, Es, Ss] {
        load(cpu, register, selector::DATA);
    }
    load(cpu, Fs, selector::AHEAD);
    load(cpu, Gs, 0);
    cpu.update_mode();
}

fn narrow_rounds(seed: u64, count: u64, options: Options, mix: Mix) -> u64 {
    let mut pair = Pair::of(options, mix, pair::Modes::Narrow);
    run_rounds_of(&mut pair, seed, count);
    assert!(pair.share() > 85, "{} %", pair.share());
    pair.jit.cache.sizes.regions
}

#[test]
fn random_32_bit_instructions_one_at_a_time_run_as_in_the_interpreter() {
    let options = Options { region: 1, exact_flags: true, ..OPTIONS };
    assert!(narrow_rounds(seed(21), count(1000), options, Mix::Integers) > 1000);
}

#[test]
fn random_32_bit_programs_run_as_in_the_interpreter() {
    assert!(narrow_rounds(seed(22), count(3000), OPTIONS, Mix::Integers) > 1000);
}

#[test]
fn random_32_bit_programs_with_exact_flags_run_as_in_the_interpreter() {
    assert!(
        narrow_rounds(seed(23), count(3000), Options { exact_flags: true, ..OPTIONS }, Mix::Integers) > 1000
    );
}

#[test]
fn random_32_bit_programs_partly_interpreted_run_as_in_the_interpreter() {
    assert!(narrow_rounds(seed(24), count(3000), Options { threshold: 3, ..OPTIONS }, Mix::Integers) > 300);
}

#[test]
fn random_32_bit_vector_programs_run_as_in_the_interpreter() {
    assert!(narrow_rounds(seed(25), count(3000), OPTIONS, Mix::Vectors) > 1000);
}

#[test]
fn random_32_bit_x87_programs_run_as_in_the_interpreter() {
    for bits in 0..8 {
        let mut pair = Pair::of(OPTIONS, Mix::X87, pair::Modes::Narrow).recording(super::x87::quirks(bits));
        run_rounds_of(&mut pair, seed(29) << 8 | bits, count(3000) / 6);
    }
}

#[test]
fn random_programs_in_both_modes_run_as_in_the_interpreter() {
    for (seed, mix) in [(seed(26), Mix::Integers), (seed(27), Mix::Vectors), (seed(28), Mix::X87)] {
        let mut pair = Pair::of(OPTIONS, mix, pair::Modes::Both);
        run_rounds_of(&mut pair, seed, count(3000));
        assert!(pair.jit.cache.sizes.regions > 1000 && pair.share() > 85, "{} %", pair.share());
    }
}
