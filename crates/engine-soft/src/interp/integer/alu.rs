//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT, and ADCX, ADOX.

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::{Exception, Rflags};

use super::operand::{
    Immediate, Locked, Memory, Place, Register, Shape, Source, SourceRegister, for_size, operand_size, shape,
};
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::status::Status;

/// A binary operation.
trait Binary {
    fn apply<T: Int>(a: T, b: T, status: Status) -> (T, Status);
}

/// A unary operation.
trait Unary {
    fn apply<T: Int>(a: T, status: Status) -> (T, Status);
}

macro_rules! operations {
    (fresh $($name:ident => $f:ident),*) => {$(
        struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, b: T, _: Status) -> (T, Status) {
                a.$f(b)
            }
        }
    )*};
    (carrying $($name:ident => $f:ident),*) => {$(
        struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, b: T, status: Status) -> (T, Status) {
                a.$f(b, status)
            }
        }
    )*};
    (unary $($name:ident => $f:ident),*) => {$(
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Int>(a: T, status: Status) -> (T, Status) {
                a.$f(status)
            }
        }
    )*};
}

operations!(fresh Add => add, Sub => sub, And => and, Or => or, Xor => xor);
operations!(carrying Adc => adc, Sbb => sbb);
operations!(unary Inc => inc, Dec => dec, Neg => neg);

struct Not;

impl Unary for Not {
    #[inline(always)]
    fn apply<T: Int>(a: T, status: Status) -> (T, Status) {
        (T::truncate(!a.widen()), status)
    }
}

fn binary<O: Binary, T: Int, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let b = S::get::<T>(cpu, op)?;
    // An atomic place may try several times, each from the flags before.
    let before = cpu.status;
    D::modify(cpu, op, |cpu, a| {
        let (result, status) = O::apply(a, b, before);
        cpu.status = status;
        result
    })
}

/// CMP and TEST: the flags of an operation whose result is dropped.
fn compare<O: Binary, T: Int, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let b = S::get::<T>(cpu, op)?;
    let a = D::read::<T>(cpu, op)?;
    cpu.status = O::apply(a, b, cpu.status).1;
    Ok(())
}

fn unary<O: Unary, T: Int, D: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let before = cpu.status;
    D::modify(cpu, op, |cpu, a: T| {
        let (result, status) = O::apply(a, before);
        cpu.status = status;
        result
    })
}

fn pick_binary<O: Binary>(shape: Shape, size: usize) -> Option<Handler> {
    match shape {
        Shape::RR => for_size!(size, binary, [O], [Register, SourceRegister]),
        Shape::RM => for_size!(size, binary, [O], [Register, Memory]),
        Shape::RI => for_size!(size, binary, [O], [Register, Immediate]),
        Shape::MR => for_size!(size, binary, [O], [Memory, SourceRegister]),
        Shape::MI => for_size!(size, binary, [O], [Memory, Immediate]),
        Shape::LR => for_size!(size, binary, [O], [Locked, SourceRegister]),
        Shape::LI => for_size!(size, binary, [O], [Locked, Immediate]),
        _ => None,
    }
}

fn pick_compare<O: Binary>(shape: Shape, size: usize) -> Option<Handler> {
    match shape {
        Shape::RR => for_size!(size, compare, [O], [Register, SourceRegister]),
        Shape::RM => for_size!(size, compare, [O], [Register, Memory]),
        Shape::RI => for_size!(size, compare, [O], [Register, Immediate]),
        Shape::MR => for_size!(size, compare, [O], [Memory, SourceRegister]),
        Shape::MI => for_size!(size, compare, [O], [Memory, Immediate]),
        _ => None,
    }
}

fn pick_unary<O: Unary>(shape: Shape, size: usize) -> Option<Handler> {
    match shape {
        Shape::R => for_size!(size, unary, [O], [Register]),
        Shape::M => for_size!(size, unary, [O], [Memory]),
        Shape::L => for_size!(size, unary, [O], [Locked]),
        _ => None,
    }
}

/// ADCX and ADOX: addition whose carry is CF or OF and that leaves the other flags alone (SDM 2A).
fn adx<T: Int, S: Source>(cpu: &mut Cpu, op: &Op, flag: Rflags, carry: bool) -> Result<(), Exception> {
    let b = S::get::<T>(cpu, op)?;
    let sum = u128::from(cpu.reg::<T>(op.dst).widen()) + u128::from(b.widen()) + u128::from(carry);
    cpu.set_reg(op.dst, T::truncate(sum as u64));
    let out = if sum >> T::BITS != 0 { flag } else { Rflags::empty() };
    cpu.status = cpu.status.with(flag, out);
    Ok(())
}

fn adcx<T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let carry = cpu.status.cf();
    adx::<T, S>(cpu, op, Rflags::CF, carry)
}

fn adox<T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let carry = cpu.status.of();
    adx::<T, S>(cpu, op, Rflags::OF, carry)
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let shape = shape(instruction)?;
    let size = operand_size(instruction, 0);
    match instruction.mnemonic() {
        Mnemonic::Add => pick_binary::<Add>(shape, size),
        Mnemonic::Or => pick_binary::<Or>(shape, size),
        Mnemonic::Adc => pick_binary::<Adc>(shape, size),
        Mnemonic::Sbb => pick_binary::<Sbb>(shape, size),
        Mnemonic::And => pick_binary::<And>(shape, size),
        Mnemonic::Sub => pick_binary::<Sub>(shape, size),
        Mnemonic::Xor => pick_binary::<Xor>(shape, size),
        Mnemonic::Cmp => pick_compare::<Sub>(shape, size),
        Mnemonic::Test => pick_compare::<And>(shape, size),
        Mnemonic::Inc => pick_unary::<Inc>(shape, size),
        Mnemonic::Dec => pick_unary::<Dec>(shape, size),
        Mnemonic::Neg => pick_unary::<Neg>(shape, size),
        Mnemonic::Not => pick_unary::<Not>(shape, size),
        Mnemonic::Adcx if shape == Shape::RR => for_size!(size, adcx, [], [SourceRegister]),
        Mnemonic::Adcx => for_size!(size, adcx, [], [Memory]),
        Mnemonic::Adox if shape == Shape::RR => for_size!(size, adox, [], [SourceRegister]),
        Mnemonic::Adox => for_size!(size, adox, [], [Memory]),
        _ => None,
    }
}
