//! An instruction's bytes with other registers and another memory operand: what most translated instructions are.
//!
//! Prefixes, opcode and immediate stay as they are (SDM 2A 2.1 to 2.3; VEX: 2.3.5). What this does not know is encoded anew by the
//! decoder's library.

use iced_x86::{EncodingKind, Instruction, OpCodeOperandKind as K};

use super::asm::Reg;

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
    /// Those of an instruction's form; `None` for those that are encoded anew.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        let table = instruction.op_code();
        if !matches!(table.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
            return None;
        }
        let modrm = table.is_group();
        let mut roles = Self { reg: NONE, rm: NONE, opcode: NONE, vvvv: NONE, modrm };
        for n in 0..table.op_count() {
            let operand = n as u8;
            match table.op_kind(n) {
                K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg => {
                    (roles.reg, roles.modrm) = (operand, true);
                }
                K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem => {
                    (roles.rm, roles.modrm) = (operand, true);
                }
                K::r16_rm | K::r32_rm | K::r64_rm => (roles.rm, roles.modrm) = (operand, true),
                K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => roles.opcode = operand,
                K::r32_vvvv | K::r64_vvvv => roles.vvvv = operand,
                K::mem | K::xmm_or_mem | K::ymm_or_mem => roles.modrm = true,
                K::xmm_reg | K::xmm_rm | K::ymm_reg | K::ymm_rm => roles.modrm = true,
                K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {}
                // Those that have the same number in translated code.
                K::al | K::cl | K::ax | K::eax | K::rax => {}
                K::imm8 | K::imm8_const_1 | K::imm8sex16 | K::imm8sex32 | K::imm8sex64 => {}
                K::imm16 | K::imm32 | K::imm32sex64 | K::imm64 => {}
                _ => return None,
            }
        }
        Some(roles)
    }
}

/// Bytes under construction.
struct Bytes {
    bytes: u128,
    length: usize,
}

impl Bytes {
    #[inline(always)]
    fn push(&mut self, byte: u8) {
        self.bytes |= u128::from(byte) << (8 * (self.length & 15));
        self.length += 1;
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x66 | 0xf2 | 0xf3 | 0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x67)
}

/// The bytes of an instruction, and how many: those in `bytes`, with registers put in place, and the memory operand, if there is
/// one, `memory.1` behind what `memory.0` points at. `None` if that cannot be encoded. AH to BH are not for this: they cannot be
/// named together with REX.
pub(super) fn rewrite(
    bytes: &[u8],
    roles: &Roles,
    registers: &Registers,
    memory: Option<(Reg, i32)>,
) -> Option<(u128, usize)> {
    let mut out = Bytes { bytes: 0, length: 0 };
    let mut rest = bytes.iter().copied();
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
        let mut displacement = None;
        if mode == 3 {
            rm = registers.get(roles.rm, rm);
        } else {
            let (base, distance) = memory?;
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
            for _ in 0..skipped {
                rest.next()?;
            }
            // No base that would want a SIB byte, or a displacement.
            debug_assert!(!matches!(base.0 & 7, 4 | 5));
            rm = base.0;
            rex &= !2;
            (placed, displacement) = match i8::try_from(distance) {
                Ok(0) => (0, None),
                Ok(_) => (0x40, Some((distance, 1))),
                Err(_) => (0x80, Some((distance, 4))),
            };
        }
        rex = rex & !5 | (reg >> 3) << 2 | rm >> 3;
        operands = Some((placed | (reg & 7) << 3 | rm & 7, displacement));
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
    if let Some((modrm, displacement)) = operands {
        out.push(modrm);
        if let Some((distance, length)) = displacement {
            for byte in &distance.to_le_bytes()[..length] {
                out.push(*byte);
            }
        }
    }
    for byte in rest {
        out.push(byte);
    }
    (out.length <= 15).then_some((out.bytes, out.length))
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Encoder, OpKind, Register};

    use super::super::facts::tests::bytes;
    use super::super::native::{Host, Kind, kind};
    use super::super::operand::place_memory;
    use super::super::registers::{A, sized};
    use super::*;
    use crate::interp::op::register_number;

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode()
    }

    #[test]
    fn rewritten_instruction_is_what_the_library_encodes() {
        let host = Host::detect();
        let mut done = [0; 2];
        for seed in 0..300_000_u64 {
            let bytes = bytes(seed);
            let mut instruction = decode(&bytes);
            if !matches!(kind(&instruction, &host).0, Kind::Same | Kind::Vector) {
                continue;
            }
            let Some(roles) = Roles::of(&instruction) else { continue };
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
            if memory {
                place_memory(&mut instruction, distance);
            }
            let operand = memory.then_some((A, distance));
            let Some((word, count)) = rewrite(&bytes[..length], &roles, &registers, operand) else {
                continue;
            };
            let mut encoder = Encoder::new(64);
            if encoder.encode(&instruction, 0).is_err() {
                continue;
            }
            let (ours, theirs) = (word.to_le_bytes(), encoder.take_buffer());
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
