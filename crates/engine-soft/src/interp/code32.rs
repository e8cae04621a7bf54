//! Instructions of 32-bit code in the terms of 64-bit code, for the translator.
//!
//! Most are the same in both: with its operands put in place, the host executes it in 64-bit mode as the guest does in 32-bit mode,
//! since 32-bit results clear the upper halves of registers in both ([`super::cpu::Cpu::set_reg`]). Some have another encoding, or one
//! that means something else; what works otherwise is left to its handler.

use iced_x86::{Code, CodeSize as Size, Decoder, Instruction, OpKind};

use super::cpu::{CodeSize, Cpu};
use super::decode::ends_block;
use super::found::{counts_in_cx, is_counted, marks};
use super::op::Op;
use super::patterns::Marks;

/// Gives an instruction that was `decoded` from some bytes, and may have become another `instruction`, the terms of 64-bit code; its
/// operation's displacement and distance are extended with their signs. Gives what else is known of it.
pub(super) fn adapt(
    cpu: &Cpu,
    bytes: &[u8],
    decoded: &Instruction,
    instruction: &mut Instruction,
    op: &mut Op,
) -> Marks {
    op.displacement = i64::from(op.displacement as i32);
    if instruction.op0_kind() == OpKind::NearBranch32 {
        op.immediate = i64::from(op.immediate as i32) as u64;
    }
    let (marks, code) = (marks_of(instruction), instruction.code());
    to_64_bit(instruction);
    if code != instruction.code() && has_other_bytes(instruction) {
        marks | marks::OTHER | marks::SAME
    } else if decoded.code() == code && means_the_same(cpu, bytes, decoded) {
        marks | marks::SAME
    } else {
        marks
    }
}

fn marks_of(instruction: &Instruction) -> Marks {
    let counted = is_counted(instruction) && !counts_in_cx(instruction);
    let branches = instruction.is_jcc_short_or_near() || counted;
    let passes = branches && instruction.op0_kind() == OpKind::NearBranch32;
    let mark = |there, mark| if there { mark } else { 0 };
    marks::EXISTS
        | mark(ends_block(instruction, CodeSize::Bits32) || loads_far_pointer(instruction), marks::ENDS)
        | mark(passes, marks::PASSES)
        | mark(instruction.flow_control() == iced_x86::FlowControl::Next, marks::FLOWS)
        | mark(is_another(instruction.code()), marks::HANDLED)
}

/// LDS, LES, LFS and LGS: translated code relies on what the first two load.
fn loads_far_pointer(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(instruction.mnemonic(), M::Lds | M::Les | M::Lfs | M::Lgs)
}

/// Whether an instruction has one of 64-bit code that does something else: SYSCALL, and what clears vector registers, of which there are
/// eight here. VZEROUPPER is translated as what it is.
fn is_another(code: Code) -> bool {
    matches!(code, Code::Syscall | Code::VEX_Vzeroall)
}

/// Whether the bytes of an instruction are one of 64-bit code that differs in nothing but its operand in memory.
fn means_the_same(cpu: &Cpu, bytes: &[u8], instruction: &Instruction) -> bool {
    let bytes = bytes.get(..instruction.len()).unwrap_or(bytes);
    let other = Decoder::with_ip(64, bytes, 0, cpu.features.decoder_options()).decode();
    // Addresses of 16 bits are laid out otherwise.
    let short = instruction.memory_base().size() == 2 || instruction.memory_index().size() == 2;
    other.code() == instruction.code()
        && other.len() == instruction.len()
        && !short
        && (0..instruction.op_count()).all(|n| {
            let kind = instruction.op_kind(n);
            kind == other.op_kind(n)
                && (kind != OpKind::Register || instruction.op_register(n) == other.op_register(n))
        })
}

/// Whether [`other_bytes`] are the same instruction as one to which [`to_64_bit`] has given another form.
fn has_other_bytes(instruction: &Instruction) -> bool {
    instruction.memory_displ_size() != 2 && instruction.len() < super::decode::MAX_LENGTH
}

/// The bytes of an instruction to which [`to_64_bit`] gives another form, in that form, and how many they are. That has a byte more: ModRM,
/// with a register or with an address alone.
#[inline(never)]
pub(super) fn other_bytes(bytes: [u8; 16], length: u8) -> ([u8; 16], u8) {
    let is_prefix =
        |byte| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3);
    let at = bytes.iter().take_while(|&&byte| is_prefix(byte)).count().min(13);
    let opcode = bytes[at];
    let mut other = bytes;
    other[at + 2..].copy_from_slice(&bytes[at + 1..15]);
    [other[at], other[at + 1]] = match opcode {
        0x40..0x50 => [0xff, 0xc0 | opcode & 15],
        // From and to AL, and from and to AX or EAX, the other way round.
        _ => [0x88 | (opcode & 3 ^ 2), 0x05],
    };
    (other, length + 1)
}

/// Gives an instruction a form that 64-bit code has, with the same operands: INC and DEC of one byte are REX prefixes there, and absolute
/// addresses without ModRM have eight bytes.
pub(super) fn to_64_bit(instruction: &mut Instruction) {
    let code = match instruction.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        code => code,
    };
    instruction.set_code(code);
    instruction.set_code_size(Size::Code64);
}

#[cfg(test)]
mod tests {
    use super::super::found::tests::show_of;
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn bytes_in_place_of_others_are_the_same_instruction_in_64_bit_code() {
        let prefixes: [&[u8]; 8] =
            [&[], &[0x66], &[0x65], &[0x66, 0x2e], &[0x67], &[0xf3], &[0x26, 0x66, 0x67], &[0x3e; 13]];
        let mut lab = Lab::long();
        for opcode in (0x40..0x50).chain(0xa0..0xa4) {
            let mut others = 0;
            for prefix in prefixes {
                let bytes = [prefix, &[opcode, 0x45, 0x41, 0xa1, 0xf2, 0x44]].concat();
                show_of::<true>(&mut lab.m.cpu, &bytes, |found, _| {
                    let (other, length) = found.host_bytes();
                    if !found.is_the_hosts() {
                        assert_eq!(length, found.length);
                        return;
                    }
                    others += 1;
                    assert_eq!(length, found.length + 1);
                    let bytes = &other[..length.into()];
                    let host = Decoder::with_ip(64, bytes, 0, iced_x86::DecoderOptions::NONE).decode();
                    let guest = found.instruction();
                    assert_eq!((host.code(), host.len()), (guest.code(), bytes.len()), "{bytes:x?}");
                    for n in 0..guest.op_count() {
                        assert_eq!(host.op_kind(n), guest.op_kind(n), "{bytes:x?}");
                        assert_eq!(host.op_register(n), guest.op_register(n), "{bytes:x?}");
                    }
                });
            }
            // With addresses of 16 bits, or too long for a byte more, they are not.
            assert_eq!(others, if opcode < 0x50 { 8 } else { 5 }, "{opcode:x}");
        }
    }
}
