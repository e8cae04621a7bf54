//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::{Exception, Gpr, Rflags};

use super::operand::{Locked, Memory, Place, Register, Shape, for_size, operand_size, shape};
use crate::hostop::{Int, compare_exchange_16};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

const RAX: u8 = Gpr::Rax as u8;
const RDX: u8 = Gpr::Rdx as u8;
const RBX: u8 = Gpr::Rbx as u8;
const RCX: u8 = Gpr::Rcx as u8;

fn exchange_registers<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// XCHG with memory is atomic without a prefix (SDM 2D, XCHG).
fn exchange_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    // The decoder may name the register first or last; the other field is zero.
    let register = op.src | op.dst;
    let new = cpu.reg::<T>(register);
    let mut old = new;
    cpu.modify_locked(op, |_, found| {
        old = found;
        new
    })?;
    cpu.set_reg(register, old);
    Ok(())
}

fn exchange_add<T: Int, D: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let b = cpu.reg::<T>(op.src);
    let mut old = b;
    // The register gets the old value first: where both are the same, the sum stays (SDM 2D, XADD).
    let mut status = cpu.status;
    let mut sum = b;
    D::modify(cpu, op, |_, a: T| {
        old = a;
        (sum, status) = a.add(b);
        sum
    })?;
    cpu.set_reg(op.src, old);
    if D::IS_REGISTER && op.src == op.dst {
        cpu.set_reg(op.dst, sum);
    }
    cpu.status = status;
    Ok(())
}

fn compare_exchange<T: Int, D: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let new = cpu.reg::<T>(op.src);
    let expected = cpu.reg::<T>(RAX);
    if D::IS_REGISTER {
        let found = D::read::<T>(cpu, op)?;
        cpu.status = expected.sub(found).1;
        // The register that is not written is not zero-extended either.
        if found == expected {
            cpu.set_reg(op.dst, new)
        } else {
            cpu.set_reg(RAX, found)
        }
        return Ok(());
    }
    let mut found = expected;
    // A write cycle takes place either way (SDM 2A, CMPXCHG), so faults do not depend on the comparison.
    D::modify(cpu, op, |_, a: T| {
        found = a;
        if a == expected { new } else { a }
    })?;
    cpu.status = expected.sub(found).1;
    if found != expected {
        cpu.set_reg(RAX, found);
    }
    Ok(())
}

fn compare_exchange_8b(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let pair = |cpu: &Cpu, high, low| u64::from(cpu.reg::<u32>(high)) << 32 | u64::from(cpu.reg::<u32>(low));
    let (expected, new) = (pair(cpu, RDX, RAX), pair(cpu, RCX, RBX));
    let mut found = expected;
    let change = |_: &mut Cpu, a: u64| {
        found = a;
        if a == expected { new } else { a }
    };
    if op.has(crate::interp::op::prefix::LOCK) {
        cpu.modify_locked(op, change)?
    } else {
        cpu.modify(op, change)?
    };
    if found != expected {
        cpu.set_reg(RAX, found as u32);
        cpu.set_reg(RDX, (found >> 32) as u32);
    }
    set_zero_flag(cpu, found == expected);
    Ok(())
}

fn compare_exchange_16b(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let pair =
        |cpu: &Cpu, high, low| u128::from(cpu.reg::<u64>(high)) << 64 | u128::from(cpu.reg::<u64>(low));
    let (expected, new) = (pair(cpu, RDX, RAX), pair(cpu, RCX, RBX));
    let linear = cpu.linear(op.segment, cpu.effective_address(op), 16, true)?;
    if linear & 15 != 0 {
        return Err(Exception::GP0);
    }
    let found = match cpu.host_span(op.segment, linear, 16, true) {
        // SAFETY: the span covers 16 writable bytes of guest memory; pages are page-aligned on the host too, so the
        // alignment just checked holds there.
        Some(at) => unsafe { compare_exchange_16(at, expected, new) },
        None => {
            cpu.probe(op.segment, linear, 16, true)?;
            let mut bytes = [0; 16];
            cpu.load_bytes(op.segment, linear, &mut bytes)?;
            let found = u128::from_le_bytes(bytes);
            let written = if found == expected { new } else { found };
            cpu.store_bytes(op.segment, linear, &written.to_le_bytes())?;
            found
        }
    };
    if found != expected {
        cpu.set_reg(RAX, found as u64);
        cpu.set_reg(RDX, (found >> 64) as u64);
    }
    set_zero_flag(cpu, found == expected);
    Ok(())
}

fn set_zero_flag(cpu: &mut Cpu, set: bool) {
    cpu.status = cpu.status.with(Rflags::ZF, if set { Rflags::ZF } else { Rflags::empty() });
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = operand_size(instruction, 0);
    match (instruction.mnemonic(), shape(instruction)) {
        (Mnemonic::Xchg, Some(Shape::RR)) => for_size!(size, exchange_registers, [], []),
        (Mnemonic::Xchg, Some(_)) => for_size!(size, exchange_memory, [], []),
        (Mnemonic::Xadd, Some(Shape::RR)) => for_size!(size, exchange_add, [], [Register]),
        (Mnemonic::Xadd, Some(Shape::LR)) => for_size!(size, exchange_add, [], [Locked]),
        (Mnemonic::Xadd, Some(_)) => for_size!(size, exchange_add, [], [Memory]),
        (Mnemonic::Cmpxchg, Some(Shape::RR)) => for_size!(size, compare_exchange, [], [Register]),
        (Mnemonic::Cmpxchg, Some(Shape::LR)) => for_size!(size, compare_exchange, [], [Locked]),
        (Mnemonic::Cmpxchg, Some(_)) => for_size!(size, compare_exchange, [], [Memory]),
        (Mnemonic::Cmpxchg8b, _) => Some(compare_exchange_8b),
        (Mnemonic::Cmpxchg16b, _) => Some(compare_exchange_16b),
        _ => None,
    }
}
