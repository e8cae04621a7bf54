//! Shifts and rotates.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ringfence_x86::{Exception, Gpr, Rflags};

use super::operand::{
    Immediate, Memory, Place, Register, Shape, Source, SourceRegister, for_size, operand_size, shape,
};
use crate::hostop::{self, Int, WideInt};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::status::Status;

trait Shift {
    /// Rotates that carry no CF along.
    const ROTATES: bool = false;
    fn apply<T: Int>(a: T, count: u8, status: Status) -> (T, Status);
}

trait DoubleShift {
    fn apply<T: WideInt>(a: T, b: T, count: u8, status: Status) -> (T, Status);
}

macro_rules! shifts {
    ($($name:ident => $f:ident $(, $rotates:literal)?);*) => {$(
        struct $name;
        impl Shift for $name {
            $(const ROTATES: bool = $rotates;)?
            #[inline(always)]
            fn apply<T: Int>(a: T, count: u8, status: Status) -> (T, Status) {
                a.$f(count, status)
            }
        }
    )*};
}

shifts!(Shl => shl; Shr => shr; Sar => sar; Rol => rol, true; Ror => ror, true; Rcl => rcl; Rcr => rcr);

struct Shld;
struct Shrd;

impl DoubleShift for Shld {
    #[inline(always)]
    fn apply<T: WideInt>(a: T, b: T, count: u8, status: Status) -> (T, Status) {
        a.shld(b, count, status)
    }
}

impl DoubleShift for Shrd {
    #[inline(always)]
    fn apply<T: WideInt>(a: T, b: T, count: u8, status: Status) -> (T, Status) {
        a.shrd(b, count, status)
    }
}

/// The count is masked by the operand size as the host does it; a memory operand is written even for a count of
/// zero, as on hardware.
fn single<O: Shift, T: Int, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let count = S::get::<u8>(cpu, op)?;
    let before = cpu.status;
    D::modify(cpu, op, |cpu, a: T| {
        let (result, mut status) = O::apply(a, count, before);
        let once = count & (T::BITS.max(32) - 1) as u8 == 1;
        if O::ROTATES
            && S::IS_IMMEDIATE
            && D::IS_REGISTER
            && !once
            && hostop::constant_rotations_keep_overflow()
        {
            status = status.with(Rflags::OF, Rflags::from_bits_truncate(before.to_rflags()));
        }
        cpu.status = status;
        result
    })
}

/// SHLD and SHRD by an immediate or by CL.
fn double<O: DoubleShift, T: WideInt, D: Place, const BY_CL: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Exception> {
    let count = if BY_CL { cpu.reg::<u8>(Gpr::Rcx as u8) } else { op.immediate as u8 };
    let b = cpu.reg::<T>(op.src);
    let before = cpu.status;
    D::modify(cpu, op, |cpu, a: T| {
        let (result, status) = O::apply(a, b, count, before);
        cpu.status = status;
        result
    })
}

fn pick<O: Shift>(instruction: &Instruction, size: usize) -> Option<Handler> {
    match shape(instruction)? {
        Shape::RR => for_size!(size, single, [O], [Register, SourceRegister]),
        Shape::RI => for_size!(size, single, [O], [Register, Immediate]),
        Shape::MR => for_size!(size, single, [O], [Memory, SourceRegister]),
        Shape::MI => for_size!(size, single, [O], [Memory, Immediate]),
        _ => None,
    }
}

fn pick_double<O: DoubleShift>(instruction: &Instruction, size: usize) -> Option<Handler> {
    macro_rules! sized {
        ($place:ty, $by_cl:literal) => {
            match size {
                2 => Some(double::<O, u16, $place, $by_cl> as Handler),
                4 => Some(double::<O, u32, $place, $by_cl> as Handler),
                8 => Some(double::<O, u64, $place, $by_cl> as Handler),
                _ => None,
            }
        };
    }
    match (instruction.op0_kind(), instruction.op2_kind()) {
        (OpKind::Register, OpKind::Register) => sized!(Register, true),
        (OpKind::Register, _) => sized!(Register, false),
        (_, OpKind::Register) => sized!(Memory, true),
        _ => sized!(Memory, false),
    }
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = operand_size(instruction, 0);
    match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => pick::<Shl>(instruction, size),
        Mnemonic::Shr => pick::<Shr>(instruction, size),
        Mnemonic::Sar => pick::<Sar>(instruction, size),
        Mnemonic::Rol => pick::<Rol>(instruction, size),
        Mnemonic::Ror => pick::<Ror>(instruction, size),
        Mnemonic::Rcl => pick::<Rcl>(instruction, size),
        Mnemonic::Rcr => pick::<Rcr>(instruction, size),
        Mnemonic::Shld => pick_double::<Shld>(instruction, size),
        Mnemonic::Shrd => pick_double::<Shrd>(instruction, size),
        _ => None,
    }
}
