//! Instructions of 32-bit code as they are found, in the terms of 64-bit code, for the translator.
//!
//! Most are the same in both: with its operands put in place, the host executes it in 64-bit mode as the guest does in 32-bit mode,
//! since 32-bit results clear the upper halves of registers in both ([`super::cpu::Cpu::set_reg`]). Some have another encoding, or one
//! that means something else; what works otherwise is left to its handler.

use iced_x86::{Code, CodeSize as Size, Decoder, Instruction, OpKind};

use super::cpu::{CodeSize, Cpu};
use super::decode::{Decoded, decode_one, ends_block, lower_disguised};
use super::found::{Found, marks};
use super::op::Op;
use super::patterns::Marks;
use super::window::Code64;

/// Finds what is at the start of some bytes of 32-bit code, as [`super::found::find`] does with 64-bit code. The operation is that of
/// the instruction as it is; displacements and distances are extended with their signs.
#[inline(never)]
pub(super) fn find<'a>(
    cpu: &'a mut Cpu,
    code: Code64<'a>,
    decoded: &'a mut Instruction,
    op: &mut Op,
) -> Option<Found<'a>> {
    let bytes = code.bytes();
    let marks = match decode_one(cpu, bytes, CodeSize::Bits32) {
        Decoded::Instruction(found) => {
            *decoded = found;
            cpu.features.disguise(decoded, bytes);
            *op = lower_disguised(cpu, decoded, bytes);
            op.displacement = i64::from(op.displacement as i32);
            if decoded.op0_kind() == OpKind::NearBranch32 {
                op.immediate = i64::from(op.immediate as i32) as u64;
            }
            let mut marks = marks_of(decoded);
            if decoded.code() == found.code() && means_the_same(cpu, bytes, &found) {
                marks |= marks::SAME;
            }
            to_64_bit(decoded);
            marks
        }
        Decoded::Bad(bad) => {
            *op = bad;
            marks::ENDS
        }
        Decoded::Truncated => return None,
    };
    let decoded = Some(&*decoded);
    Some(Found { pattern: None, length: op.length, marks, code, features: &cpu.features, decoded })
}

fn marks_of(instruction: &Instruction) -> Marks {
    let passes = instruction.is_jcc_short_or_near() && instruction.op0_kind() == OpKind::NearBranch32;
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
/// eight here.
fn is_another(code: Code) -> bool {
    matches!(code, Code::Syscall | Code::VEX_Vzeroupper | Code::VEX_Vzeroall)
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

/// Gives an instruction a form that 64-bit code has, with the same operands: INC and DEC of one byte are REX prefixes there, and absolute
/// addresses without ModRM have eight bytes.
fn to_64_bit(instruction: &mut Instruction) {
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
