//! Where operands lie, and the registers and displacements that lead there.

use iced_x86::{Instruction, OpKind, Register};

use super::encode::Encoded;
use super::state;
use crate::case::{Case, Mode};
use crate::layout::{self, BASE, CODE, DATA, PAGE};
use crate::random::Random;

/// A linear address for an operand of `size` bytes: mostly well inside a page, sometimes across two, sometimes where
/// it faults.
pub(crate) fn target(random: &mut Random, size: u64, mode: Mode) -> u64 {
    let size = size.clamp(1, PAGE);
    let before =
        |random: &mut Random, boundary: u64| boundary - 1 - random.below(size.max(2) - 1).min(size - 1);
    match random.below(100) {
        0..72 => {
            let page = if random.chance(8) { DATA[2] } else { DATA[random.pick(&[0, 1, 3])] };
            let room = PAGE - size + 1;
            let align = match random.below(4) {
                0 | 1 => 64,
                2 => size.next_power_of_two().min(64),
                _ => 1,
            };
            page.address + random.below(room) / align * align
        }
        72..80 => before(random, DATA[1].address),
        80..84 => before(random, DATA[2].address),
        84..86 => before(random, DATA[2].address + PAGE),
        86..89 => before(random, DATA[3].address),
        89..92 => BASE + 0x9000 + random.below(0x1000),
        92..95 => DATA[2].address + random.below(PAGE - size + 1),
        95..97 => CODE + random.below(0x1f00),
        97 => random.below(BASE),
        _ if mode == Mode::Bits64 => match random.below(5) {
            // Not canonical, or partly so.
            0 => 1 << 47 | random.bits() >> 20,
            1 => (1 << 47) - random.below(size + 1),
            2 => random.bits(),
            3 => random.below(size + 8).wrapping_neg(),
            _ => random.bits() | 0xffff << 48,
        },
        // The ends of the segments.
        _ => random.pick(&[BASE + 0x1_0000, BASE + 0x9000, 0xffff_ffff]).wrapping_sub(random.below(size + 2)),
    }
}

/// The base of a segment as the address unit adds it.
fn segment_base(case: &Case, register: Register) -> u64 {
    let index = match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        _ => 5,
    };
    if case.mode() != Mode::Bits64 {
        return layout::descriptor(case.segments[index]).map_or(0, |segment| segment.base);
    }
    match register {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => 0,
    }
}

/// What `linear` is as an offset in a segment.
pub(crate) fn offset_in(case: &Case, segment: Register, linear: u64) -> u64 {
    linear.wrapping_sub(segment_base(case, segment))
}

/// Sets `register`, keeping what is in the bits above its width.
pub(crate) fn set_register(case: &mut Case, register: Register, value: u64) {
    let full = register.full_register();
    if !(Register::RAX..=Register::R15).contains(&full) {
        return;
    }
    let slot = &mut case.gpr[full as usize - Register::RAX as usize];
    let mask = match register.size() {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let shift =
        if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) { 8 } else { 0 };
    *slot = *slot & !(mask << shift) | (value & mask) << shift;
}

/// The value of a general-purpose register, zero-extended.
pub(crate) fn register(case: &Case, register: Register) -> u64 {
    let full = register.full_register();
    if !(Register::RAX..=Register::R15).contains(&full) {
        return 0;
    }
    let value = case.gpr[full as usize - Register::RAX as usize];
    match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Makes the instruction's explicit memory operand lie at linear address `target` (or a few bytes beside it, where
/// base and index are the same register). Changes registers, or the displacement if there is no base.
pub(crate) fn aim(random: &mut Random, case: &mut Case, encoded: &mut Encoded, target: u64) {
    let instruction = encoded.instruction;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let scale = u64::from(instruction.memory_index_scale());
    let displacement = instruction.memory_displacement64();
    let offset = offset_in(case, instruction.memory_segment(), target);
    if instruction.is_ip_rel_memory_operand() {
        set_displacement(encoded, offset.wrapping_sub(instruction.next_ip()));
    } else if index.is_vector_register() {
        scatter(random, case, &instruction);
        let first = case.vectors.zmm[index.number()][0] as i32 as u64;
        let wanted = offset.wrapping_sub(displacement);
        let wanted = if random.chance(50) { wanted.wrapping_sub(first.wrapping_mul(scale)) } else { wanted };
        if base == Register::None {
            set_displacement(encoded, offset);
        } else {
            set_register(case, base, wanted);
        }
    } else if base == Register::None && index == Register::None {
        set_displacement(encoded, offset);
    } else if base == Register::None {
        let value = random.below(64);
        set_register(case, index, value);
        set_displacement(encoded, offset.wrapping_sub(value.wrapping_mul(scale)));
    } else if index == Register::None {
        set_register(case, base, offset.wrapping_sub(displacement));
    } else if base == index {
        set_register(case, base, offset.wrapping_sub(displacement) / (scale + 1));
    } else {
        if random.chance(60) {
            set_register(case, index, random.below(256).wrapping_sub(64));
        }
        let value = sign_extended(register(case, index), index.size()).wrapping_mul(scale);
        set_register(case, base, offset.wrapping_sub(displacement).wrapping_sub(value));
    }
}

fn sign_extended(value: u64, size: usize) -> u64 {
    if size == 8 { value } else { value & 0xffff_ffff }
}

fn set_displacement(encoded: &mut Encoded, value: u64) {
    if encoded.offsets.has_displacement() {
        encoded.bytes.set(encoded.offsets.displacement_offset(), encoded.offsets.displacement_size(), value);
    }
}

/// Gives the lanes of a gather's or scatter's index register small values, and now and then a wild one.
fn scatter(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let wide = instruction.vsib().is_some_and(|wide| wide);
    let number = instruction.memory_index().number();
    let lanes = &mut case.vectors.zmm[number][..state::present_words(number)];
    let wild = random.chance(25);
    let mut lane = || {
        if wild && random.chance(12) {
            random.bits() >> random.below(48)
        } else {
            random.below(192).wrapping_sub(64)
        }
    };
    for value in lanes.iter_mut() {
        *value = if wide { lane() } else { lane() & 0xffff_ffff | lane() << 32 };
    }
}

/// The addresses of implicit memory operands: strings, MASKMOV, XLAT.
pub(crate) fn aim_implicit(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let size = instruction.memory_size().size().max(1) as u64;
    for operand in 0..instruction.op_count() {
        let pointer = match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => Register::RSI,
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => Register::RDI,
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => Register::RDI,
            _ => continue,
        };
        let segment = match instruction.op_kind(operand) {
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => Register::ES,
            _ => instruction.memory_segment(),
        };
        let address = target(random, size, case.mode());
        let offset = offset_in(case, segment, address);
        set_register(case, pointer, offset);
    }
}
