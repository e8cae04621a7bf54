//! MOV and its relatives, LEA, sign extensions, conditional moves, BSWAP, XLAT.

use iced_x86::{ConditionCode, FlowControl, Instruction, Mnemonic};
use ringfence_x86::{Exception, Gpr};

use super::operand::{
    Immediate, Memory, Place, Register, Shape, Source, SourceRegister, for_size, for_wide_size, operand_size,
    shape,
};
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

fn mov<T: Int, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<T>(cpu, op)?;
    D::write(cpu, op, value)
}

fn zero_extend<F: Int, T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<F>(cpu, op)?.widen();
    cpu.set_reg(op.dst, T::truncate(value));
    Ok(())
}

fn sign_extend<F: Int, T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<F>(cpu, op)?.sign_extend();
    cpu.set_reg(op.dst, T::truncate(value as u64));
    Ok(())
}

fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let address = cpu.effective_address(op);
    cpu.set_reg(op.dst, T::truncate(address));
    Ok(())
}

/// The source is read whatever the condition says, and a 32-bit destination is zero-extended either way (SDM 2A).
fn cmov<T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<T>(cpu, op)?;
    let old = cpu.reg::<T>(op.dst);
    let value = if cpu.status.condition(op.condition) { value } else { old };
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn setcc<D: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = u8::from(cpu.status.condition(op.condition));
    D::write(cpu, op, value)
}

fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.reg::<T>(op.dst).widen();
    let swapped = match T::SIZE {
        // Undefined by the manual; processors give zero.
        2 => 0,
        4 => u64::from((value as u32).swap_bytes()),
        _ => value.swap_bytes(),
    };
    cpu.set_reg(op.dst, T::truncate(swapped));
    Ok(())
}

fn reversed<T: Int>(value: T) -> T {
    T::truncate(value.widen().swap_bytes() >> (64 - T::BITS))
}

fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.read::<T>(op)?;
    cpu.set_reg(op.dst, reversed(value));
    Ok(())
}

fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.reg::<T>(op.src);
    cpu.write(op, reversed(value))
}

/// CBW, CWDE, CDQE: the accumulator's lower half, sign-extended.
fn extend_accumulator<F: Int, T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let value = cpu.reg::<F>(Gpr::Rax as u8).sign_extend();
    cpu.set_reg(Gpr::Rax as u8, T::truncate(value as u64));
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign, into (R|E)DX.
fn spread_sign<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let sign = cpu.reg::<T>(Gpr::Rax as u8).sign_extend() >> 63;
    cpu.set_reg(Gpr::Rdx as u8, T::truncate(sign as u64));
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let offset = cpu.regs[Gpr::Rbx as usize].wrapping_add(u64::from(cpu.reg::<u8>(Gpr::Rax as u8)));
    let linear = cpu.linear(op.segment, offset & op.address_mask, 1, false)?;
    let value = cpu.load::<u8>(op.segment, linear)?;
    cpu.set_reg(Gpr::Rax as u8, value);
    Ok(())
}

macro_rules! extension {
    ($function:ident, $from:expr, $to:expr, $source:ty) => {
        match $from {
            1 => for_wide_size!($to, $function, [u8], [$source]),
            2 => for_wide_size!($to, $function, [u16], [$source]),
            4 => for_wide_size!($to, $function, [u32], [$source]),
            _ => None,
        }
    };
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = operand_size(instruction, 0);
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti if plain(instruction) => match shape(instruction)? {
            Shape::RR => for_size!(size, mov, [], [Register, SourceRegister]),
            Shape::RM => for_size!(size, mov, [], [Register, Memory]),
            Shape::RI => for_size!(size, mov, [], [Register, Immediate]),
            Shape::MR => for_size!(size, mov, [], [Memory, SourceRegister]),
            Shape::MI => for_size!(size, mov, [], [Memory, Immediate]),
            _ => None,
        },
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => {
            let from = operand_size(instruction, 1);
            let signed = instruction.mnemonic() != Mnemonic::Movzx;
            // MOVSXD with equal sizes is a plain move.
            if from == size {
                return match shape(instruction)? {
                    Shape::RR => for_size!(size, mov, [], [Register, SourceRegister]),
                    _ => for_size!(size, mov, [], [Register, Memory]),
                };
            }
            match (signed, shape(instruction)?) {
                (false, Shape::RR) => extension!(zero_extend, from, size, SourceRegister),
                (false, _) => extension!(zero_extend, from, size, Memory),
                (true, Shape::RR) => extension!(sign_extend, from, size, SourceRegister),
                (true, _) => extension!(sign_extend, from, size, Memory),
            }
        }
        Mnemonic::Lea => for_wide_size!(size, lea, [], []),
        Mnemonic::Bswap => for_wide_size!(size, bswap, [], []),
        Mnemonic::Movbe if shape(instruction)? == Shape::RM => for_wide_size!(size, movbe_load, [], []),
        Mnemonic::Movbe => for_wide_size!(size, movbe_store, [], []),
        Mnemonic::Cbw => Some(extend_accumulator::<u8, u16>),
        Mnemonic::Cwde => Some(extend_accumulator::<u16, u32>),
        Mnemonic::Cdqe => Some(extend_accumulator::<u32, u64>),
        Mnemonic::Cwd => Some(spread_sign::<u16>),
        Mnemonic::Cdq => Some(spread_sign::<u32>),
        Mnemonic::Cqo => Some(spread_sign::<u64>),
        Mnemonic::Xlatb => Some(xlat),
        _ if conditional(instruction, 2) => match shape(instruction)? {
            Shape::RR => for_wide_size!(size, cmov, [], [SourceRegister]),
            _ => for_wide_size!(size, cmov, [], [Memory]),
        },
        _ if conditional(instruction, 1) => match shape(instruction)? {
            Shape::R => Some(setcc::<Register>),
            _ => Some(setcc::<Memory>),
        },
        _ => None,
    }
}

/// A conditional instruction with `operands` operands that is no branch: CMOVcc has two, SETcc one.
fn conditional(instruction: &Instruction, operands: u32) -> bool {
    instruction.condition_code() != ConditionCode::None
        && instruction.flow_control() == FlowControl::Next
        && instruction.op_count() == operands
}

/// MOV between general-purpose registers, memory and immediates.
fn plain(instruction: &Instruction) -> bool {
    (0..2).all(|i| {
        let register = instruction.op_register(i);
        instruction.op_kind(i) != iced_x86::OpKind::Register || register.is_gpr()
    })
}
