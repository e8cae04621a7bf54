//! MUL, IMUL, DIV, IDIV.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ringfence_x86::{Exception, Gpr};

use super::operand::{Memory, Place, Register, Source, SourceRegister, operand_size};
use crate::hostop::{Int, WideInt};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

const RAX: u8 = Gpr::Rax as u8;
const RDX: u8 = Gpr::Rdx as u8;
/// AH, where the byte forms keep the high half.
const AH: u8 = 16;

/// The register that holds the high half of a product or dividend.
const fn high_register<T: Int>() -> u8 {
    if T::SIZE == 1 { AH } else { RDX }
}

fn multiply<T: Int, S: Place, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let b = S::read::<T>(cpu, op)?;
    let a = cpu.reg::<T>(RAX);
    let (low, high, status) = if SIGNED { a.imul_wide(b, cpu.status) } else { a.mul_wide(b, cpu.status) };
    cpu.set_reg(RAX, low);
    cpu.set_reg(high_register::<T>(), high);
    cpu.status = status;
    Ok(())
}

fn divide<T: Int, S: Place, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let divisor = S::read::<T>(cpu, op)?;
    let (low, high) = (cpu.reg::<T>(RAX), cpu.reg::<T>(high_register::<T>()));
    let result = if SIGNED {
        low.idiv_wide(high, divisor, cpu.status)
    } else {
        low.div_wide(high, divisor, cpu.status)
    };
    let (quotient, remainder, status) = result.ok_or(Exception::DE)?;
    cpu.set_reg(RAX, quotient);
    cpu.set_reg(high_register::<T>(), remainder);
    cpu.status = status;
    Ok(())
}

/// IMUL with two operands, or with three where the last is an immediate.
fn multiply_into<T: WideInt, S: Source, const IMMEDIATE: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Exception> {
    let a = S::get::<T>(cpu, op)?;
    let b = if IMMEDIATE { T::truncate(op.immediate) } else { cpu.reg(op.dst) };
    let (result, status) = a.imul(b, cpu.status);
    cpu.set_reg(op.dst, result);
    cpu.status = status;
    Ok(())
}

macro_rules! one_operand {
    ($instruction:expr, $function:ident, $signed:literal) => {
        match ($instruction.op0_kind(), operand_size($instruction, 0)) {
            (OpKind::Register, 1) => Some($function::<u8, Register, $signed> as Handler),
            (OpKind::Register, 2) => Some($function::<u16, Register, $signed> as Handler),
            (OpKind::Register, 4) => Some($function::<u32, Register, $signed> as Handler),
            (OpKind::Register, 8) => Some($function::<u64, Register, $signed> as Handler),
            (_, 1) => Some($function::<u8, Memory, $signed> as Handler),
            (_, 2) => Some($function::<u16, Memory, $signed> as Handler),
            (_, 4) => Some($function::<u32, Memory, $signed> as Handler),
            (_, 8) => Some($function::<u64, Memory, $signed> as Handler),
            _ => None,
        }
    };
}

macro_rules! sized {
    ($size:expr, $source:ty, $immediate:literal) => {
        match $size {
            2 => Some(multiply_into::<u16, $source, $immediate> as Handler),
            4 => Some(multiply_into::<u32, $source, $immediate> as Handler),
            8 => Some(multiply_into::<u64, $source, $immediate> as Handler),
            _ => None,
        }
    };
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = operand_size(instruction, 0);
    match (instruction.mnemonic(), instruction.op_count()) {
        (Mnemonic::Mul, _) => one_operand!(instruction, multiply, false),
        (Mnemonic::Imul, 1) => one_operand!(instruction, multiply, true),
        (Mnemonic::Div, _) => one_operand!(instruction, divide, false),
        (Mnemonic::Idiv, _) => one_operand!(instruction, divide, true),
        (Mnemonic::Imul, count) => match (instruction.op1_kind(), count) {
            (OpKind::Register, 2) => sized!(size, SourceRegister, false),
            (OpKind::Register, _) => sized!(size, SourceRegister, true),
            (_, 2) => sized!(size, Memory, false),
            _ => sized!(size, Memory, true),
        },
        _ => None,
    }
}
