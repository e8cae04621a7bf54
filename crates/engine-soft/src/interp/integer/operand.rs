//! Where operands come from and go to, as types, so that each handler is compiled for its own shape.

use iced_x86::{Instruction, OpKind};
use ringfence_x86::Exception;

use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::Op;

/// Something to read.
pub(super) trait Source {
    /// Whether this is [`Op::immediate`].
    const IS_IMMEDIATE: bool = false;
    /// Its value.
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception>;
}

/// Something to change.
pub(super) trait Place {
    /// Whether this is [`Op::dst`], a register.
    const IS_REGISTER: bool = false;
    /// Replaces the value by `f` of it. Faults come before `f` runs.
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnMut(&mut Cpu, T) -> T) -> Result<(), Exception>;
    /// Reads the value only.
    fn read<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception>;
    /// Writes the value only.
    fn write<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Exception>;
}

/// The register in [`Op::src`].
pub(super) struct SourceRegister;
/// The register in [`Op::dst`].
pub(super) struct Register;
/// The memory operand.
pub(super) struct Memory;
/// The memory operand under LOCK.
pub(super) struct Locked;
/// The immediate.
pub(super) struct Immediate;

impl Source for SourceRegister {
    #[inline(always)]
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception> {
        Ok(cpu.reg(op.src))
    }
}

impl Source for Memory {
    #[inline(always)]
    fn get<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception> {
        cpu.read(op)
    }
}

impl Source for Immediate {
    const IS_IMMEDIATE: bool = true;
    #[inline(always)]
    fn get<T: Int>(_: &mut Cpu, op: &Op) -> Result<T, Exception> {
        Ok(T::truncate(op.immediate))
    }
}

impl Place for Register {
    const IS_REGISTER: bool = true;
    #[inline(always)]
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, mut f: impl FnMut(&mut Cpu, T) -> T) -> Result<(), Exception> {
        let value = cpu.reg(op.dst);
        let new = f(cpu, value);
        cpu.set_reg(op.dst, new);
        Ok(())
    }

    #[inline(always)]
    fn read<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception> {
        Ok(cpu.reg(op.dst))
    }

    #[inline(always)]
    fn write<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Exception> {
        cpu.set_reg(op.dst, value);
        Ok(())
    }
}

impl Place for Memory {
    #[inline(always)]
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnMut(&mut Cpu, T) -> T) -> Result<(), Exception> {
        cpu.modify(op, f)
    }

    #[inline(always)]
    fn read<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception> {
        cpu.read(op)
    }

    #[inline(always)]
    fn write<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Exception> {
        cpu.write(op, value)
    }
}

impl Place for Locked {
    #[inline(always)]
    fn modify<T: Int>(cpu: &mut Cpu, op: &Op, f: impl FnMut(&mut Cpu, T) -> T) -> Result<(), Exception> {
        cpu.modify_locked(op, f)
    }

    fn read<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Exception> {
        cpu.read(op)
    }

    fn write<T: Int>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Exception> {
        cpu.write(op, value)
    }
}

/// Kinds of the first two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One register.
    R,
    /// One memory operand.
    M,
    /// One memory operand under LOCK.
    L,
    /// Register, register.
    RR,
    /// Register, memory.
    RM,
    /// Memory, register.
    MR,
    /// Memory under LOCK, register.
    LR,
    /// Register, immediate.
    RI,
    /// Memory, immediate.
    MI,
    /// Memory under LOCK, immediate.
    LI,
}

/// The shape of an instruction with one or two explicit operands, if it has one.
pub(super) fn shape(instruction: &Instruction) -> Option<Shape> {
    #[derive(PartialEq)]
    enum Kind {
        R,
        M,
        I,
    }
    let kind = |i| match instruction.op_kind(i) {
        OpKind::Register => Some(Kind::R),
        OpKind::Memory => Some(Kind::M),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(Kind::I),
        _ => None,
    };
    let locked = instruction.has_lock_prefix();
    let first = kind(0)?;
    if instruction.op_count() == 1 {
        return match first {
            Kind::R => Some(Shape::R),
            Kind::M if locked => Some(Shape::L),
            Kind::M => Some(Shape::M),
            Kind::I => None,
        };
    }
    match (first, kind(1)?) {
        (Kind::R, Kind::R) => Some(Shape::RR),
        (Kind::R, Kind::M) => Some(Shape::RM),
        (Kind::R, Kind::I) => Some(Shape::RI),
        (Kind::M, Kind::R) => Some(if locked { Shape::LR } else { Shape::MR }),
        (Kind::M, Kind::I) => Some(if locked { Shape::LI } else { Shape::MI }),
        _ => None,
    }
}

/// Size in bytes of an explicit operand.
pub(super) fn operand_size(instruction: &Instruction, i: u32) -> usize {
    match instruction.op_kind(i) {
        OpKind::Register => instruction.op_register(i).size(),
        OpKind::Memory => instruction.memory_size().size(),
        _ => 0,
    }
}

/// `function::<before…, T, after…>` for the operand size.
macro_rules! for_size {
    ($size:expr, $function:ident) => { for_size!($size, $function, , ) };
    ($size:expr, $function:ident, [$($before:ty),*]) => { for_size!($size, $function, [$($before),*], []) };
    ($size:expr, $function:ident, [$($before:ty),*], [$($after:ty),*]) => {
        match $size {
            1 => Some($function::<$($before,)* u8 $(, $after)*> as $crate::interp::op::Handler),
            2 => Some($function::<$($before,)* u16 $(, $after)*> as $crate::interp::op::Handler),
            4 => Some($function::<$($before,)* u32 $(, $after)*> as $crate::interp::op::Handler),
            8 => Some($function::<$($before,)* u64 $(, $after)*> as $crate::interp::op::Handler),
            _ => None,
        }
    };
}

/// As [`for_size`], for instructions without byte forms.
macro_rules! for_wide_size {
    ($size:expr, $function:ident, [$($before:ty),*], [$($after:ty),*]) => {
        match $size {
            2 => Some($function::<$($before,)* u16 $(, $after)*> as $crate::interp::op::Handler),
            4 => Some($function::<$($before,)* u32 $(, $after)*> as $crate::interp::op::Handler),
            8 => Some($function::<$($before,)* u64 $(, $after)*> as $crate::interp::op::Handler),
            _ => None,
        }
    };
}

pub(super) use {for_size, for_wide_size};
