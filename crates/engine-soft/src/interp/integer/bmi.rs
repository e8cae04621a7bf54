//! BMI1 and BMI2: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, MULX, PDEP, PEXT, RORX, SARX, SHLX, SHRX.

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};
use ringfence_x86::{Exception, Gpr};

use super::operand::operand_size;
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, prefix};
use crate::status::Status;

/// `insn result, a, b` or `insn result, a` on the host, from and to the flags given. The guest's CPUID offers these
/// instructions only where the host has them.
macro_rules! host {
    ($($name:ident: $insn:literal, $m:literal, $type:ty;)*) => {$(
        fn $name(a: u64, b: u64, status: Status) -> (u64, Status) {
            let result: $type;
            let mut status = status.0;
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " {r", $m, "}, {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                     r = out(reg) result, a = in(reg) a, b = in(reg) b, inout("ax") status,
                     options(nomem, nostack, pure));
            }
            (u64::from(result), Status(status))
        }
    )*};
    (unary $($name:ident: $insn:literal, $m:literal, $type:ty;)*) => {$(
        fn $name(a: u64, _: u64, status: Status) -> (u64, Status) {
            let result: $type;
            let mut status = status.0;
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($insn, " {r", $m, "}, {a", $m, "}"), "lahf", "seto al",
                     r = out(reg) result, a = in(reg) a, inout("ax") status, options(nomem, nostack, pure));
            }
            (u64::from(result), Status(status))
        }
    )*};
}

host! {
    andn32: "andn", ":e", u32; andn64: "andn", ":r", u64;
    bextr32: "bextr", ":e", u32; bextr64: "bextr", ":r", u64;
    bzhi32: "bzhi", ":e", u32; bzhi64: "bzhi", ":r", u64;
    pdep32: "pdep", ":e", u32; pdep64: "pdep", ":r", u64;
    pext32: "pext", ":e", u32; pext64: "pext", ":r", u64;
    sarx32: "sarx", ":e", u32; sarx64: "sarx", ":r", u64;
    shlx32: "shlx", ":e", u32; shlx64: "shlx", ":r", u64;
    shrx32: "shrx", ":e", u32; shrx64: "shrx", ":r", u64;
}
host! { unary
    blsi32: "blsi", ":e", u32; blsi64: "blsi", ":r", u64;
    blsr32: "blsr", ":e", u32; blsr64: "blsr", ":r", u64;
    blsmsk32: "blsmsk", ":e", u32; blsmsk64: "blsmsk", ":r", u64;
}

/// One of the host functions above.
type Function = fn(u64, u64, Status) -> (u64, Status);

/// Which operand of the instruction is the register-or-memory one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// `insn dst, reg, r/m`.
    RmLast,
    /// `insn dst, r/m, reg`.
    RmSecond,
}

struct Row {
    mnemonic: Mnemonic,
    order: Order,
    handlers: [Handler; 2],
}

macro_rules! rows {
    ($($mnemonic:ident, $order:ident, $f32:ident, $f64:ident;)*) => {
        [$(Row {
            mnemonic: Mnemonic::$mnemonic,
            order: Order::$order,
            handlers: [
                |cpu, op| apply::<u32>(cpu, op, $f32, Order::$order),
                |cpu, op| apply::<u64>(cpu, op, $f64, Order::$order),
            ],
        }),*]
    };
}

const ROWS: [Row; 11] = rows! {
    Andn, RmLast, andn32, andn64;
    Pdep, RmLast, pdep32, pdep64;
    Pext, RmLast, pext32, pext64;
    Bextr, RmSecond, bextr32, bextr64;
    Bzhi, RmSecond, bzhi32, bzhi64;
    Sarx, RmSecond, sarx32, sarx64;
    Shlx, RmSecond, shlx32, shlx64;
    Shrx, RmSecond, shrx32, shrx64;
    Blsi, RmSecond, blsi32, blsi64;
    Blsr, RmSecond, blsr32, blsr64;
    Blsmsk, RmSecond, blsmsk32, blsmsk64;
};

#[inline(always)]
fn apply<T: Int>(cpu: &mut Cpu, op: &Op, function: Function, order: Order) -> Result<(), Exception> {
    // With a memory operand the other source is the first register after the destination.
    let memory = op.has(prefix::MEMORY);
    let (a, b) = match (memory, order) {
        (false, _) => (cpu.reg::<T>(op.src), cpu.reg::<T>(op.third)),
        (true, Order::RmLast) => (cpu.reg::<T>(op.src), cpu.read::<T>(op)?),
        (true, Order::RmSecond) => (cpu.read::<T>(op)?, cpu.reg::<T>(op.src)),
    };
    let (result, status) = function(a.widen(), b.widen(), cpu.status);
    cpu.set_reg(op.dst, T::truncate(result));
    cpu.status = status;
    Ok(())
}

/// MULX: both halves of RDX times the operand, flags untouched; where both destinations are the same, the high half stays.
fn mulx<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let b = if op.has(prefix::MEMORY) { cpu.read::<T>(op)? } else { cpu.reg(op.third) };
    let a = cpu.reg::<T>(Gpr::Rdx as u8);
    let (low, high, _) = a.mul_wide(b, Status::default());
    cpu.set_reg(op.src, low);
    cpu.set_reg(op.dst, high);
    Ok(())
}

fn rorx<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = if op.has(prefix::MEMORY) { cpu.read::<T>(op)? } else { cpu.reg(op.src) };
    let (result, _) = value.ror(op.immediate as u8, Status::default());
    cpu.set_reg(op.dst, result);
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let wide = operand_size(instruction, 0) == 8;
    let mnemonic = instruction.mnemonic();
    if let Some(row) = ROWS.iter().find(|row| row.mnemonic == mnemonic) {
        debug_assert!(row.order == Order::RmLast || instruction.op2_kind() != OpKind::Memory);
        return Some(row.handlers[usize::from(wide)]);
    }
    match mnemonic {
        Mnemonic::Mulx if wide => Some(mulx::<u64>),
        Mnemonic::Mulx => Some(mulx::<u32>),
        Mnemonic::Rorx if wide => Some(rorx::<u64>),
        Mnemonic::Rorx => Some(rorx::<u32>),
        _ => None,
    }
}
