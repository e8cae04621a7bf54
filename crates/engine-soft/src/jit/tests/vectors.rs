//! Vector instructions for random programs: SSE and AVX forms over the same registers and data.

use iced_x86::{Decoder, DecoderOptions};
use ringfence_oracle::Random;

use super::gather;
use super::generate::{POINTERS, destination};

/// What follows an opcode.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// ModRM with anything.
    Any,
    /// ModRM with memory.
    Memory,
    /// ModRM with registers.
    Registers,
    /// ModRM with registers and one of these extensions.
    Extension(&'static [u8]),
}

use Form::{Any, Extension, Memory, Registers};

/// Mandatory prefixes, as VEX numbers them.
pub(super) const NONE: u8 = 0;
pub(super) const P66: u8 = 1;
pub(super) const F3: u8 = 2;
pub(super) const F2: u8 = 3;

/// Prefixes, opcode map (1: 0F, 2: 0F 38, 3: 0F 3A), opcodes from the first to the last, form, whether a byte follows.
pub(super) type Template = (&'static [u8], u8, u8, u8, Form, bool);

const PS_PD: &[u8] = &[NONE, P66];
const ALL: &[u8] = &[NONE, P66, F3, F2];
const SCALAR: &[u8] = &[F3, F2];

/// Instructions that have a legacy and a VEX form.
const TABLE: &[Template] = &[
    // Moves, aligned and not.
    (ALL, 1, 0x10, 0x11, Any, false),
    (&[NONE, P66, F3], 1, 0x12, 0x12, Any, false),
    (PS_PD, 1, 0x13, 0x13, Memory, false),
    (&[NONE, P66, F3], 1, 0x16, 0x16, Any, false),
    (PS_PD, 1, 0x17, 0x17, Memory, false),
    (PS_PD, 1, 0x28, 0x29, Any, false),
    (PS_PD, 1, 0x28, 0x29, Memory, false),
    (PS_PD, 1, 0x2b, 0x2b, Memory, false),
    (&[P66, F3], 1, 0x6f, 0x6f, Any, false),
    (&[P66, F3], 1, 0x7f, 0x7f, Any, false),
    (&[P66, F3], 1, 0x6f, 0x6f, Memory, false),
    (&[P66, F3], 1, 0x7f, 0x7f, Memory, false),
    (&[P66], 1, 0x6e, 0x6e, Any, false),
    (&[P66, F3], 1, 0x7e, 0x7e, Any, false),
    (&[P66], 1, 0xd6, 0xd6, Any, false),
    (&[P66], 1, 0xe7, 0xe7, Memory, false),
    (&[F2], 1, 0xf0, 0xf0, Memory, false),
    (&[P66], 2, 0x2a, 0x2a, Memory, false),
    // Arithmetic of floating point.
    (ALL, 1, 0x51, 0x51, Any, false),
    (&[NONE, F3], 1, 0x52, 0x53, Any, false),
    (PS_PD, 1, 0x54, 0x57, Any, false),
    (ALL, 1, 0x58, 0x59, Any, false),
    (ALL, 1, 0x5c, 0x5f, Any, false),
    (&[P66, F2], 1, 0x7c, 0x7d, Any, false),
    (&[P66, F2], 1, 0xd0, 0xd0, Any, false),
    (ALL, 1, 0xc2, 0xc2, Any, true),
    (&[P66], 3, 0x08, 0x0b, Any, true),
    (&[P66], 3, 0x40, 0x41, Any, true),
    // Shuffles.
    (PS_PD, 1, 0x14, 0x15, Any, false),
    (PS_PD, 1, 0xc6, 0xc6, Any, true),
    (&[P66, F3, F2], 1, 0x70, 0x70, Any, true),
    (&[P66], 3, 0x0c, 0x0f, Any, true),
    (&[P66], 2, 0x00, 0x00, Any, false),
    (&[P66], 3, 0x21, 0x21, Any, true),
    // Comparisons that set flags.
    (PS_PD, 1, 0x2e, 0x2f, Any, false),
    (PS_PD, 1, 0x2e, 0x2f, Any, false),
    (&[P66], 2, 0x17, 0x17, Any, false),
    (&[P66], 2, 0x17, 0x17, Any, false),
    (&[P66], 3, 0x60, 0x63, Any, true),
    // Conversions, those with general registers among them.
    (SCALAR, 1, 0x2a, 0x2a, Any, false),
    (SCALAR, 1, 0x2c, 0x2d, Any, false),
    (SCALAR, 1, 0x2a, 0x2a, Any, false),
    (SCALAR, 1, 0x2c, 0x2d, Any, false),
    (ALL, 1, 0x5a, 0x5a, Any, false),
    (&[NONE, P66, F3], 1, 0x5b, 0x5b, Any, false),
    (&[P66, F3, F2], 1, 0xe6, 0xe6, Any, false),
    (PS_PD, 1, 0x50, 0x50, Registers, false),
    (&[P66], 1, 0xd7, 0xd7, Registers, false),
    (&[P66], 1, 0xc4, 0xc4, Any, true),
    (&[P66], 1, 0xc5, 0xc5, Registers, true),
    (&[P66], 3, 0x14, 0x17, Any, true),
    (&[P66], 3, 0x20, 0x20, Any, true),
    (&[P66], 3, 0x22, 0x22, Any, true),
    (&[P66], 2, 0x20, 0x25, Any, false),
    (&[P66], 2, 0x30, 0x35, Any, false),
    // Integers.
    (&[P66], 1, 0x60, 0x6d, Any, false),
    (&[P66], 1, 0x71, 0x71, Extension(&[2, 4, 6]), true),
    (&[P66], 1, 0x72, 0x72, Extension(&[2, 4, 6]), true),
    (&[P66], 1, 0x73, 0x73, Extension(&[2, 3, 6, 7]), true),
    (&[P66], 1, 0x74, 0x76, Any, false),
    (&[P66], 1, 0xd1, 0xd5, Any, false),
    (&[P66], 1, 0xd8, 0xdf, Any, false),
    (&[P66], 1, 0xe0, 0xe5, Any, false),
    (&[P66], 1, 0xe8, 0xef, Any, false),
    (&[P66], 1, 0xf1, 0xf6, Any, false),
    (&[P66], 1, 0xf8, 0xfe, Any, false),
    (&[P66], 1, 0xf7, 0xf7, Registers, false),
    (&[P66], 2, 0x01, 0x0b, Any, false),
    (&[P66], 2, 0x1c, 0x1e, Any, false),
    (&[P66], 2, 0x28, 0x29, Any, false),
    (&[P66], 2, 0x2b, 0x2b, Any, false),
    (&[P66], 2, 0x37, 0x41, Any, false),
    (&[P66], 2, 0xdb, 0xdf, Any, false),
    (&[P66], 3, 0x42, 0x42, Any, true),
    (&[P66], 3, 0x44, 0x44, Any, true),
    // STMXCSR.
    (&[NONE], 1, 0xae, 0xae, Form::Memory, false),
];

/// Those that have a VEX form only.
const VEX: &[Template] = &[
    (&[P66], 2, 0x0c, 0x0f, Any, false),
    (&[P66], 2, 0x13, 0x13, Any, false),
    (&[P66], 2, 0x16, 0x16, Any, false),
    (&[P66], 2, 0x18, 0x19, Any, false),
    (&[P66], 2, 0x1a, 0x1a, Memory, false),
    (&[P66], 2, 0x2c, 0x2f, Memory, false),
    (&[P66], 2, 0x36, 0x36, Any, false),
    (&[P66], 2, 0x45, 0x47, Any, false),
    (&[P66], 2, 0x58, 0x59, Any, false),
    (&[P66], 2, 0x5a, 0x5a, Memory, false),
    (&[P66], 2, 0x78, 0x79, Any, false),
    (&[P66], 2, 0x8c, 0x8c, Memory, false),
    (&[P66], 2, 0x8e, 0x8e, Memory, false),
    (&[P66], 2, 0x96, 0x9f, Any, false),
    (&[P66], 2, 0xa6, 0xaf, Any, false),
    (&[P66], 2, 0xb6, 0xbf, Any, false),
    (&[P66], 3, 0x00, 0x02, Any, true),
    (&[P66], 3, 0x04, 0x06, Any, true),
    (&[P66], 3, 0x18, 0x19, Any, true),
    (&[P66], 3, 0x38, 0x39, Any, true),
    (&[P66], 3, 0x46, 0x46, Any, true),
    (&[P66], 3, 0x4a, 0x4c, Any, true),
];

/// Instructions on opmask registers, VEX-encoded.
const MASKS: &[Template] = &[
    (&[NONE, P66], 1, 0x41, 0x47, Registers, false),
    (&[NONE, P66], 1, 0x4a, 0x4b, Registers, false),
    (ALL, 1, 0x90, 0x93, Any, false),
    (&[NONE, P66, F2], 1, 0x92, 0x93, Registers, false),
    (&[NONE, P66], 1, 0x98, 0x99, Registers, false),
    (&[P66], 3, 0x30, 0x33, Registers, true),
];

/// Those that have an EVEX form only.
const EVEX: &[Template] = &[
    (ALL, 1, 0x6f, 0x6f, Any, false),
    (ALL, 1, 0x7f, 0x7f, Any, false),
    (ALL, 1, 0x78, 0x7b, Any, false),
    (&[P66], 2, 0x10, 0x17, Any, false),
    (&[P66], 2, 0x19, 0x1b, Any, false),
    (&[P66, F3], 2, 0x25, 0x2a, Any, false),
    (&[P66], 2, 0x36, 0x3f, Any, false),
    (&[P66], 2, 0x42, 0x47, Any, false),
    (&[P66], 2, 0x4c, 0x4f, Any, false),
    (&[P66], 2, 0x54, 0x55, Any, false),
    (&[P66], 2, 0x58, 0x5b, Any, false),
    (&[P66], 2, 0x62, 0x66, Any, false),
    (&[P66], 2, 0x70, 0x7f, Any, false),
    (&[P66], 2, 0x83, 0x83, Any, false),
    (&[P66], 2, 0x88, 0x8d, Any, false),
    (&[P66], 2, 0xb4, 0xb5, Any, false),
    (&[P66], 2, 0xc4, 0xc4, Any, false),
    (&[P66], 3, 0x03, 0x03, Any, true),
    (&[P66], 3, 0x18, 0x1b, Any, true),
    (&[P66], 3, 0x1e, 0x1f, Any, true),
    (&[P66], 3, 0x23, 0x27, Any, true),
    (&[P66], 3, 0x38, 0x3b, Any, true),
    (&[P66], 3, 0x3e, 0x3f, Any, true),
    (&[P66], 3, 0x50, 0x57, Any, true),
    (&[P66], 3, 0x70, 0x73, Any, true),
];

/// The operands after an opcode, and the bits of REX that they want. Addresses are multiples of 32 more often than not, if
/// the pointers are.
fn operands(random: &mut Random, form: Form, out: &mut Vec<u8>) -> u8 {
    let mut rex = 0;
    let reg = match form {
        Extension(extensions) => random.pick(extensions),
        _ => {
            rex |= (random.below(2) as u8) << 2;
            destination(random)
        }
    };
    let registers = match form {
        Any => random.chance(50),
        Memory => false,
        Registers | Extension(_) => true,
    };
    if registers {
        rex |= random.below(2) as u8;
        out.push(0xc0 | reg << 3 | destination(random));
        return rex;
    }
    let base = if random.chance(95) { random.pick(&POINTERS) } else { random.below(16) as u8 };
    rex |= base >> 3;
    let near = random.chance(60);
    out.push(if near { 0x40 } else { 0x80 } | reg << 3 | base & 7);
    if base & 7 == 4 {
        out.push(0x24);
    }
    let mask = if random.chance(90) { !31 } else { !0 };
    if near {
        out.push(random.bits() as u8 & mask as u8);
    } else {
        let distance = (random.below(0x2000) as i32 - 0x800) & mask;
        out.extend_from_slice(&distance.to_le_bytes());
    }
    rex
}

pub(super) fn legacy(random: &mut Random, template: Template) -> Vec<u8> {
    let (prefixes, map, first, last, form, constant) = template;
    let mut tail = Vec::new();
    let mut rex = 0x40 | operands(random, form, &mut tail);
    if random.chance(30) {
        rex |= 8;
    }
    let mut out = Vec::new();
    if random.chance(3) {
        out.push(random.pick(&[0x64, 0x65, 0x67]));
    }
    match random.pick(prefixes) {
        P66 => out.push(0x66),
        F3 => out.push(0xf3),
        F2 => out.push(0xf2),
        _ => {}
    }
    if rex != 0x40 || random.chance(20) {
        out.push(rex);
    }
    out.push(0x0f);
    match map {
        2 => out.push(0x38),
        3 => out.push(0x3a),
        _ => {}
    }
    finish(random, out, first, last, tail, constant)
}

fn vex(random: &mut Random, template: Template) -> Vec<u8> {
    let (prefixes, map, first, last, form, constant) = template;
    let mut tail = Vec::new();
    let rex = operands(random, form, &mut tail);
    // No register, which many forms demand, is register 0 in others.
    let other = if random.chance(50) { 0 } else { random.below(16) as u8 };
    let wide = u8::from(random.chance(25)) << 7;
    let long = u8::from(random.chance(50)) << 2;
    let third = wide | (!other & 15) << 3 | long | random.pick(prefixes);
    finish(random, vec![0xc4, (!rex & 7) << 5 | map, third], first, last, tail, constant)
}

fn evex(random: &mut Random, template: Template) -> Vec<u8> {
    let (prefixes, map, first, last, form, constant) = template;
    let mut tail = Vec::new();
    let rex = operands(random, form, &mut tail);
    let high = random.below(4) as u8;
    let other = if random.chance(30) { 0 } else { random.below(32) as u8 };
    let wide = u8::from(random.chance(50)) << 7;
    // All of the operand in memory more often than not: what is masked goes another way.
    let mask = if random.chance(70) { 0 } else { random.below(8) as u8 | u8::from(random.chance(50)) << 7 };
    let long = if random.chance(2) { 3 } else { random.below(3) as u8 };
    let marks = mask | long << 5 | u8::from(random.chance(15)) << 4 | (!other >> 4 & 1) << 3;
    let first_byte = (!rex & 7) << 5 | (!high & 1) << 4 | map;
    let first_byte = if tail[0] >= 0xc0 { first_byte ^ (high & 2) << 5 } else { first_byte };
    let second = wide | (!other & 15) << 3 | 4 | random.pick(prefixes);
    finish(random, vec![0x62, first_byte, second, marks], first, last, tail, constant)
}

fn finish(
    random: &mut Random,
    mut out: Vec<u8>,
    first: u8,
    last: u8,
    mut tail: Vec<u8>,
    constant: bool,
) -> Vec<u8> {
    let opcode = first + random.below(u64::from(last - first) + 1) as u8;
    out.push(opcode);
    if opcode == 0xae {
        tail[0] = tail[0] & !0x38 | 3 << 3;
    }
    out.append(&mut tail);
    if constant {
        out.push(random.bits() as u8);
    }
    out
}

/// Values for MXCSR: as at reset, with DAZ and FTZ, with other roundings; and such as let exceptions through.
const MXCSR: [u32; 6] = [0x1f80, 0x1f80, 0x9fc0, 0x7f80, 0x3fbf, 0x5f80];
const UNMASKED: [u32; 3] = [0x1f00, 0x0000, 0x0f80];

/// Eight bytes of a register: often numbers that floating-point instructions make something of.
pub(super) fn word(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => (random.below(2000) as f64 - 1000.0).to_bits(),
        1 => {
            let mut single = || u64::from((random.below(2000) as f32 / 16.0 - 60.0).to_bits());
            single() << 32 | single()
        }
        2 => 0,
        _ => random.bits(),
    }
}

/// One vector instruction, or a short row of instructions about them; rarely one that no processor knows.
pub(super) fn instruction(random: &mut Random) -> Vec<u8> {
    loop {
        let bytes = candidate(random);
        let known = !Decoder::new(64, &bytes, DecoderOptions::NONE).decode().is_invalid();
        if known || random.chance(2) {
            return bytes;
        }
    }
}

fn candidate(random: &mut Random) -> Vec<u8> {
    type Encode = fn(&mut Random, Template) -> Vec<u8>;
    let (table, encode): (&[Template], Encode) = match random.below(100) {
        0..3 => return vec![0xc5, 0xf8, 0x77],
        3 => return vec![0xc5, 0xfc, 0x77],
        4..6 => {
            let value = if random.chance(10) { random.pick(&UNMASKED) } else { random.pick(&MXCSR) };
            // Rarely with a bit that is one of AMD's, or of nobody's.
            let value =
                if random.chance(5) { value | random.pick(&[1 << 17, 1 << 16, 1 << 31]) } else { value };
            // push value; ldmxcsr or vldmxcsr [rsp], or of what is there by another register; pop rax
            let mut out = vec![0x68];
            out.extend_from_slice(&value.to_le_bytes());
            let load: &[u8] = random.pick(&[
                &[0x0f, 0xae, 0x14, 0x24],
                &[0x0f, 0xae, 0x14, 0x24],
                &[0xc5, 0xf8, 0xae, 0x14, 0x24],
                &[0x54, 0x5d, 0x0f, 0xae, 0x55, 0x00],
            ]);
            out.extend_from_slice(load);
            out.push(0x58);
            return out;
        }
        6..12 => return gather::instruction(random),
        12..52 => (TABLE, legacy),
        52..80 => (TABLE, vex),
        80..85 => (MASKS, vex),
        85..89 => (VEX, vex),
        89..93 => (TABLE, evex),
        93..96 => (VEX, evex),
        _ => (EVEX, evex),
    };
    let template = random.pick(table);
    encode(random, template)
}
