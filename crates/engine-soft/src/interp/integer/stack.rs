//! PUSH and POP of general operands, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ringfence_x86::{Exception, Gpr, SegmentRegister};

use super::operand::for_wide_size;
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

const RSP: usize = Gpr::Rsp as usize;
const RBP: u8 = Gpr::Rbp as u8;
const SS: u8 = SegmentRegister::Ss as u8;

fn push_register<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.reg::<T>(op.dst);
    cpu.push(value)
}

fn push_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.read::<T>(op)?;
    cpu.push(value)
}

fn push_immediate<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.push(T::truncate(op.immediate))
}

fn pop_register<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.pop::<T>()?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// The address of the destination is computed after the stack pointer has moved (SDM 2B, POP).
fn pop_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let before = cpu.regs[RSP];
    let value = cpu.pop::<T>()?;
    cpu.write(op, value).inspect_err(|_| cpu.regs[RSP] = before)
}

/// PUSHA: eight registers, the stack pointer as it was before.
fn push_all<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let before = cpu.regs[RSP];
    for i in 0..8 {
        let value = if i == RSP { T::truncate(before) } else { cpu.reg(i as u8) };
        cpu.push::<T>(value).inspect_err(|_| cpu.regs[RSP] = before)?;
    }
    Ok(())
}

/// POPA: eight registers, the stack pointer's slot skipped.
fn pop_all<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    // One after the other: a fault leaves those before it loaded, and the stack pointer as it was.
    for slot in 0..8 {
        let value = cpu.peek::<T>((slot * T::SIZE) as u64)?;
        if 7 - slot != RSP {
            cpu.set_reg((7 - slot) as u8, value);
        }
    }
    cpu.set_stack_pointer(cpu.stack_pointer().wrapping_add(8 * T::SIZE as u64));
    Ok(())
}

/// ENTER (SDM 2A): a frame of `immediate` bytes at nesting level `aux`.
fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let size = T::SIZE as u64;
    let level = u64::from(op.aux % 32);
    let mask = cpu.stack_mask;
    let (old_sp, mut frame) = (cpu.regs[RSP], cpu.regs[usize::from(RBP)]);
    let result = (|| {
        cpu.push(cpu.reg::<T>(RBP))?;
        // All of it, even where the stack uses only the low half (SDM 2A: the operand size decides what RBP gets).
        let top = cpu.regs[RSP];
        for _ in 1..level {
            frame = frame.wrapping_sub(size);
            let linear = cpu.linear(SS, frame & mask, size, false)?;
            let value = cpu.load::<T>(SS, linear)?;
            cpu.push(value)?;
        }
        if level > 0 {
            cpu.push(T::truncate(top))?;
        }
        let bottom = cpu.stack_pointer().wrapping_sub(op.immediate & 0xffff) & mask;
        // The new top must be writable (SDM 2A): a push that would follow may not be the first to notice.
        let linear = cpu.linear(SS, bottom, size, true)?;
        cpu.probe(SS, linear, T::SIZE, true)?;
        cpu.set_stack_pointer(bottom);
        Ok(top)
    })();
    match result {
        Ok(top) => {
            cpu.set_reg(RBP, T::truncate(top));
            Ok(())
        }
        Err(exception) => {
            cpu.regs[RSP] = old_sp;
            Err(exception)
        }
    }
}

fn leave<T: Int>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let before = cpu.regs[RSP];
    cpu.set_stack_pointer(cpu.regs[usize::from(RBP)]);
    let value = cpu.pop::<T>().inspect_err(|_| cpu.regs[RSP] = before)?;
    cpu.set_reg(RBP, value);
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    // How far the stack pointer moves tells the operand size, whatever the operand is.
    let moved = instruction.stack_pointer_increment().unsigned_abs();
    match instruction.mnemonic() {
        Mnemonic::Push => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_gpr() => {
                for_wide_size!(moved, push_register, [], [])
            }
            OpKind::Register => None,
            OpKind::Memory => for_wide_size!(moved, push_memory, [], []),
            _ => for_wide_size!(moved, push_immediate, [], []),
        },
        Mnemonic::Pop => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_gpr() => {
                for_wide_size!(moved, pop_register, [], [])
            }
            OpKind::Register => None,
            _ => for_wide_size!(moved, pop_memory, [], []),
        },
        Mnemonic::Pusha => Some(push_all::<u16>),
        Mnemonic::Pushad => Some(push_all::<u32>),
        Mnemonic::Popa => Some(pop_all::<u16>),
        Mnemonic::Popad => Some(pop_all::<u32>),
        Mnemonic::Enter => match instruction.code() {
            iced_x86::Code::Enterw_imm16_imm8 => Some(enter::<u16>),
            iced_x86::Code::Enterd_imm16_imm8 => Some(enter::<u32>),
            iced_x86::Code::Enterq_imm16_imm8 => Some(enter::<u64>),
            _ => None,
        },
        Mnemonic::Leave => match instruction.code() {
            iced_x86::Code::Leavew => Some(leave::<u16>),
            iced_x86::Code::Leaved => Some(leave::<u32>),
            iced_x86::Code::Leaveq => Some(leave::<u64>),
            _ => None,
        },
        _ => None,
    }
}
