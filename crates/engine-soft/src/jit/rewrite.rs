//! An instruction's bytes with other registers and another memory operand: what most translated instructions are.
//!
//! Prefixes, opcode and immediate stay as they are (SDM 2A 2.1 to 2.3; VEX: 2.3.5). What this does not know is encoded anew by the
//! decoder's library.

use std::cmp::Ordering;

use iced_x86::{Encoder, EncodingKind, Instruction, OpKind, Register};

use super::asm::{Mem, Reg, at};
use super::operand::place_memory;
use super::registers::{A, sized};

/// No operand.
const NONE: u8 = 7;

/// Where an instruction of some form has its operands, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Roles {
    /// In ModRM's field `reg`.
    reg: u8,
    /// In ModRM's field `r/m`, if that is a general-purpose register.
    rm: u8,
    /// In the opcode's low bits.
    opcode: u8,
    /// In VEX.
    vvvv: u8,
    /// There is a ModRM byte.
    modrm: bool,
}

/// The registers that take the place of general-purpose ones, by operand. Others stay as they are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers([Option<Reg>; 8]);

impl Registers {
    /// Puts a register in an operand's place.
    pub(super) fn set(&mut self, operand: u32, reg: Reg) {
        self.0[operand as usize % 8] = Some(reg);
    }

    fn get(&self, operand: u8, old: u8) -> u8 {
        self.0[usize::from(operand) % 8].map_or(old, |reg| reg.0)
    }

    /// Each that is put in some operand's place.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Reg)> {
        self.0.into_iter().enumerate().filter_map(|(n, reg)| Some((n as u32, reg?)))
    }
}

impl Roles {
    /// Those of an instruction's form, found by looking at what becomes of the bytes when an operand is another register; `None` if
    /// such instructions are to be encoded anew.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        if !matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
            return None;
        }
        let kinds = || (0..instruction.op_count()).map(|n| instruction.op_kind(n));
        let modrm = kinds().any(|kind| kind == OpKind::Memory);
        let mut roles = Self { reg: NONE, rm: NONE, opcode: NONE, vvvv: NONE, modrm };
        let mut example = *instruction;
        if modrm {
            place_memory(&mut example, at(A, 0));
        }
        for n in 0..instruction.op_count() {
            // AH to BH would forbid all that follows.
            if matches!(example.op_register(n), Register::AH | Register::CH | Register::DH | Register::BH) {
                example.set_op_register(n, Register::BL);
            }
        }
        // An operand in memory that has no ModRM byte cannot be put anywhere else.
        encoded(&example)?;
        for (n, kind) in (0..).zip(kinds()) {
            let register = instruction.op_register(n);
            if kind != OpKind::Register || !register.is_gpr() {
                continue;
            }
            let with = |reg| {
                let mut example = example;
                example.set_op_register(n, sized(reg, register.size()));
                encoded(&example)
            };
            // An implied one stays what it is: it has the same number in translated code.
            let (Some(one), Some(other)) = (with(Reg(9)), with(Reg(10))) else { continue };
            let at = (0..one.len()).find(|&i| one[i] != other[i])?;
            let opcode = opcode_at(&one);
            // The numbers differ in their two low bits.
            match (at.cmp(&opcode), one[at] ^ other[at]) {
                (Ordering::Less, 0x18) => roles.vvvv = n as u8,
                (Ordering::Equal, 3) => roles.opcode = n as u8,
                (Ordering::Greater, 0x18) => (roles.reg, roles.modrm) = (n as u8, true),
                (Ordering::Greater, 3) => (roles.rm, roles.modrm) = (n as u8, true),
                _ => return None,
            }
        }
        Some(roles)
    }
}

fn encoded(instruction: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).ok()?;
    Some(encoder.take_buffer())
}

/// Where an instruction's opcode is, the last byte of it.
fn opcode_at(bytes: &[u8]) -> usize {
    let prefixes = bytes.iter().take_while(|&&byte| is_prefix(byte)).count();
    match bytes[prefixes..] {
        [0xc4, ..] => prefixes + 3,
        [0xc5, ..] => prefixes + 2,
        [0x40..0x50, 0x0f, 0x38 | 0x3a, ..] => prefixes + 3,
        [0x40..0x50, 0x0f, ..] | [0x0f, 0x38 | 0x3a, ..] => prefixes + 2,
        [0x40..0x50, ..] | [0x0f, ..] => prefixes + 1,
        _ => prefixes,
    }
}

/// Bytes under construction.
struct Bytes {
    bytes: [u8; 32],
    length: usize,
}

impl Bytes {
    #[inline(always)]
    fn push(&mut self, byte: u8) {
        self.bytes[self.length & 31] = byte;
        self.length += 1;
    }

    /// All of them as a number, the lowest first, if they are an instruction's.
    #[inline(always)]
    fn finish(&self) -> Option<(u128, usize)> {
        let bytes = self.bytes.first_chunk()?;
        (self.length <= 15).then(|| (u128::from_le_bytes(*bytes), self.length))
    }
}

/// Bytes taken one by one.
struct Rest<'a> {
    bytes: &'a [u8; 16],
    at: usize,
    length: usize,
}

impl Rest<'_> {
    #[inline(always)]
    fn next(&mut self) -> Option<u8> {
        let byte = self.bytes[self.at & 15];
        self.at += 1;
        (self.at <= self.length).then_some(byte)
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x66 | 0xf2 | 0xf3 | 0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x67)
}

/// The bytes of an instruction, and how many: the first `length` in `bytes`, with registers put in place, and the memory operand, if there is
/// one, which has a base. `None` if that cannot be encoded. AH to BH are not for this: they cannot be
/// named together with REX.
pub(super) fn rewrite(
    bytes: &[u8; 16],
    length: usize,
    roles: &Roles,
    registers: &Registers,
    memory: Option<Mem>,
) -> Option<(u128, usize)> {
    let mut out = Bytes { bytes: [0; 32], length: 0 };
    let mut rest = Rest { bytes, at: 0, length };
    let mut next = rest.next()?;
    while is_prefix(next) {
        // Segment and address size are those of the operand in memory, which is another now. Elsewhere they have no meaning.
        if matches!(next, 0x66 | 0xf2 | 0xf3 | 0xf0) {
            out.push(next);
        }
        next = rest.next()?;
    }
    // In the order of REX: W, R, X, B.
    let mut rex = 0;
    let mut vex = None;
    match next {
        0x40..0x50 => {
            rex = next;
            next = rest.next()?;
            // A prefix behind REX takes it away, and so does another.
            if is_prefix(next) || next & 0xf0 == 0x40 {
                return None;
            }
        }
        0xc4 => {
            let (first, second) = (rest.next()?, rest.next()?);
            rex = !first >> 5 & 7 | second >> 4 & 8;
            vex = Some((first & 0x1f, second & 0x7f));
            next = rest.next()?;
        }
        0xc5 => {
            let first = rest.next()?;
            rex = !first >> 5 & 4;
            vex = Some((1, first & 0x7f));
            next = rest.next()?;
        }
        _ => {}
    }
    // The opcode: at most two bytes before the last.
    let mut escape: [Option<u8>; 2] = [None; 2];
    if vex.is_none() && next == 0x0f {
        escape[0] = Some(next);
        next = rest.next()?;
        if matches!(next, 0x38 | 0x3a) {
            escape[1] = Some(next);
            next = rest.next()?;
        }
    }
    let mut opcode = next;
    if roles.opcode != NONE {
        let reg = registers.get(roles.opcode, opcode & 7 | (rex & 1) << 3);
        opcode = opcode & !7 | reg & 7;
        rex = rex & !1 | reg >> 3;
    }
    let mut operands = None;
    if roles.modrm {
        let modrm = rest.next()?;
        let mode = modrm >> 6;
        let mut reg = modrm >> 3 & 7 | (rex & 4) << 1;
        reg = registers.get(roles.reg, reg);
        let mut rm = modrm & 7 | (rex & 1) << 3;
        let mut placed = 0xc0;
        let (mut sib, mut displacement) = (None, None);
        if mode == 3 {
            rm = registers.get(roles.rm, rm);
        } else {
            let Mem { base, index, disp: distance } = memory?;
            let base = base?;
            let mut low = modrm & 7;
            if low == 4 {
                // Without a base, a displacement follows as without a SIB byte.
                low = rest.next()? & 7;
            }
            let skipped = match mode {
                0 if low == 5 => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
            rest.at += skipped;
            if rest.at > length {
                return None;
            }
            // No base that would want a SIB byte, or a displacement.
            debug_assert!(!matches!(base.0 & 7, 4 | 5));
            rm = base.0;
            rex &= !2;
            if let Some((index, shift)) = index {
                rex |= (index.0 >> 3) << 1;
                sib = Some(shift << 6 | (index.0 & 7) << 3 | base.0 & 7);
            }
            (placed, displacement) = match i8::try_from(distance) {
                Ok(0) => (0, None),
                Ok(_) => (0x40, Some((distance, 1))),
                Err(_) => (0x80, Some((distance, 4))),
            };
        }
        rex = rex & !5 | (reg >> 3) << 2 | rm >> 3;
        let low = if sib.is_some() { 4 } else { rm & 7 };
        operands = Some((placed | (reg & 7) << 3 | low, sib, displacement));
    }
    match vex {
        None => {
            if rex != 0 {
                out.push(0x40 | rex);
            }
            for byte in escape.into_iter().flatten() {
                out.push(byte);
            }
        }
        Some((map, second)) => {
            let vvvv = registers.get(roles.vvvv, !second >> 3 & 15);
            out.push(0xc4);
            out.push((!rex & 7) << 5 | map);
            out.push((rex & 8) << 4 | (!vvvv & 15) << 3 | second & 7);
        }
    }
    out.push(opcode);
    if let Some((modrm, sib, displacement)) = operands {
        out.push(modrm);
        if let Some(sib) = sib {
            out.push(sib);
        }
        if let Some((distance, length)) = displacement {
            for &byte in &distance.to_le_bytes()[..length] {
                out.push(byte);
            }
        }
    }
    while let Some(byte) = rest.next() {
        out.push(byte);
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::super::facts::Forms;
    use super::super::native::{Host, Kind, kind};
    use super::*;
    use crate::interp::handlers::tests::bytes;
    use crate::interp::op::register_number;

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode()
    }

    #[test]
    fn rewritten_instruction_is_what_the_library_encodes() {
        let host = Host::detect();
        let mut forms = Forms::new(host);
        let mut done = [0; 2];
        for seed in 0..300_000_u64 {
            let bytes = bytes(seed);
            let mut instruction = decode(&bytes);
            if !matches!(kind(&instruction, &host).0, Kind::Same | Kind::Vector) {
                continue;
            }
            // As found from whichever instruction of the form came first.
            let Some(roles) = forms.of_instruction(&instruction).roles else { continue };
            let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
            let high = |n| register_number(instruction.op_register(n)) >= 16;
            let mut general = (0..instruction.op_count()).filter(|&n| {
                instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_gpr()
            });
            if general.clone().any(high) || instruction.memory_index().is_vector_register() {
                continue;
            }
            let length = instruction.len();
            let mut registers = Registers::default();
            // One register of the guest's is moved, wherever it is no implied one.
            let moved = general.find(|&n| register_number(instruction.op_register(n)) >= 3);
            if let Some(n) = moved {
                let (old, to) = (instruction.op_register(n).full_register(), Reg(9 + (seed % 3) as u8));
                for n in 0..instruction.op_count() {
                    let register = instruction.op_register(n);
                    if instruction.op_kind(n) == OpKind::Register && register.full_register() == old {
                        registers.set(n, to);
                        instruction.set_op_register(n, sized(to, register.size()));
                    }
                }
            }
            let distance = [0, 8, -128, 128, -0x1234_5678][seed as usize % 5];
            let index = [None, Some((Reg(seed as u8 % 16), seed as u8 >> 4 & 3))][seed as usize / 64 % 2];
            let index = index.filter(|&(reg, _)| reg.0 != 4);
            let operand = Mem { index, ..at(A, distance) };
            if memory {
                place_memory(&mut instruction, operand);
            }
            let operand = memory.then_some(operand);
            let mut all = [0x5a; 16];
            all[..15].copy_from_slice(&bytes);
            let Some((word, count)) = rewrite(&all, length, &roles, &registers, operand) else {
                continue;
            };
            let Some(theirs) = encoded(&instruction) else { continue };
            let ours = word.to_le_bytes();
            let (mut one, mut other) = (decode(&ours[..count]), decode(&theirs));
            assert_eq!(one.len(), count, "{:x?} became {:x?}", &bytes[..length], &ours[..count]);
            // Prefixes without a meaning may be missing in theirs.
            for instruction in [&mut one, &mut other] {
                instruction.set_len(0);
                instruction.set_next_ip(0);
                instruction.set_has_rep_prefix(false);
                instruction.set_has_repne_prefix(false);
                instruction.set_memory_displ_size(0);
                instruction.set_segment_prefix(Register::None);
            }
            assert_eq!(one, other, "{:x?} became {:x?}", &bytes[..length], &ours[..count]);
            done[usize::from(memory)] += 1;
        }
        assert!(done.iter().all(|&done| done > 20_000), "{done:?}");
    }
}
