//! BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, CRC32.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ringfence_x86::Exception;

use super::operand::{
    Immediate, Memory, Shape, Source, SourceRegister, for_size, for_wide_size, operand_size, shape,
};
use crate::hostop::{Int, WideInt};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::status::Status;

trait BitOp {
    /// Whether the operand is written.
    const WRITES: bool;
    fn apply<T: WideInt>(a: T, bit: T, status: Status) -> (T, Status);
}

trait Scan {
    fn apply<T: WideInt>(old: T, value: T, status: Status) -> (T, Status);
}

macro_rules! bit_operations {
    ($($name:ident => $f:ident, $writes:literal);*) => {$(
        struct $name;
        impl BitOp for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: WideInt>(a: T, bit: T, status: Status) -> (T, Status) {
                a.$f(bit, status)
            }
        }
    )*};
}

macro_rules! scans {
    ($($name:ident => $f:ident),*) => {$(
        struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn apply<T: WideInt>(old: T, value: T, status: Status) -> (T, Status) {
                old.$f(value, status)
            }
        }
    )*};
}

bit_operations!(Bt => bt, false; Bts => bts, true; Btr => btr, true; Btc => btc, true);
scans!(Bsf => bsf, Bsr => bsr, Tzcnt => tzcnt, Lzcnt => lzcnt, Popcnt => popcnt);

fn on_register<O: BitOp, T: WideInt, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let bit = S::get::<T>(cpu, op)?;
    let (result, status) = O::apply(cpu.reg::<T>(op.dst), bit, cpu.status);
    cpu.status = status;
    if O::WRITES {
        cpu.set_reg(op.dst, result);
    }
    Ok(())
}

/// The bit offset in a register is signed and reaches beyond the operand (SDM 2A, BT); an immediate does not.
fn on_memory<O: BitOp, T: WideInt, S: Source, const LOCKED: bool, const FAR: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Exception> {
    let bit = S::get::<T>(cpu, op)?;
    let mut offset = cpu.effective_address(op);
    if FAR {
        let units = bit.sign_extend() >> T::BITS.trailing_zeros();
        offset = offset.wrapping_add((units * T::SIZE as i64) as u64) & op.address_mask;
    }
    let linear = cpu.linear(op.segment, offset, T::SIZE as u64, O::WRITES)?;
    if !O::WRITES {
        let value = cpu.load::<T>(op.segment, linear)?;
        cpu.status = O::apply(value, bit, cpu.status).1;
        return Ok(());
    }
    let before = cpu.status;
    let change = |cpu: &mut Cpu, value: T| {
        let (result, status) = O::apply(value, bit, before);
        cpu.status = status;
        result
    };
    if LOCKED {
        cpu.modify_locked_linear(op.segment, linear, change)
    } else {
        cpu.modify_linear(op.segment, linear, change)
    }
}

fn scan<O: Scan, T: WideInt, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<T>(cpu, op)?;
    let (result, status) = O::apply(cpu.reg::<T>(op.dst), value, cpu.status);
    cpu.status = status;
    // A 32-bit BSF or BSR of zero leaves all 64 bits of the destination alone.
    if T::SIZE != 4 || value.widen() != 0 || !keeps_destination(op) {
        cpu.set_reg(op.dst, result);
    }
    Ok(())
}

fn keeps_destination(op: &Op) -> bool {
    use iced_x86::Code as C;
    matches!(op.code, C::Bsf_r32_rm32 | C::Bsr_r32_rm32)
}

/// CRC-32C of one operand (SDM 2A, CRC32): polynomial 11EDC6F41, bit-reflected.
fn crc32<T: Int, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = S::get::<T>(cpu, op)?.widen();
    let mut crc = cpu.reg::<u32>(op.dst);
    for byte in &value.to_le_bytes()[..T::SIZE] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    cpu.set_reg(op.dst, crc);
    Ok(())
}

fn pick<O: BitOp>(instruction: &Instruction, size: usize) -> Option<Handler> {
    macro_rules! memory {
        ($source:ty, $locked:literal, $far:literal) => {
            match size {
                2 => Some(on_memory::<O, u16, $source, $locked, $far> as Handler),
                4 => Some(on_memory::<O, u32, $source, $locked, $far> as Handler),
                8 => Some(on_memory::<O, u64, $source, $locked, $far> as Handler),
                _ => None,
            }
        };
    }
    match shape(instruction)? {
        Shape::RR => for_wide_size!(size, on_register, [O], [SourceRegister]),
        Shape::RI => for_wide_size!(size, on_register, [O], [Immediate]),
        Shape::MR => memory!(SourceRegister, false, true),
        Shape::LR => memory!(SourceRegister, true, true),
        Shape::MI => memory!(Immediate, false, false),
        Shape::LI => memory!(Immediate, true, false),
        _ => None,
    }
}

fn pick_scan<O: Scan>(instruction: &Instruction, size: usize) -> Option<Handler> {
    match instruction.op1_kind() {
        OpKind::Register => for_wide_size!(size, scan, [O], [SourceRegister]),
        _ => for_wide_size!(size, scan, [O], [Memory]),
    }
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = operand_size(instruction, 0);
    match instruction.mnemonic() {
        Mnemonic::Bt => pick::<Bt>(instruction, size),
        Mnemonic::Bts => pick::<Bts>(instruction, size),
        Mnemonic::Btr => pick::<Btr>(instruction, size),
        Mnemonic::Btc => pick::<Btc>(instruction, size),
        Mnemonic::Bsf => pick_scan::<Bsf>(instruction, size),
        Mnemonic::Bsr => pick_scan::<Bsr>(instruction, size),
        Mnemonic::Tzcnt => pick_scan::<Tzcnt>(instruction, size),
        Mnemonic::Lzcnt => pick_scan::<Lzcnt>(instruction, size),
        Mnemonic::Popcnt => pick_scan::<Popcnt>(instruction, size),
        Mnemonic::Crc32 => match instruction.op1_kind() {
            OpKind::Register => for_size!(operand_size(instruction, 1), crc32, [], [SourceRegister]),
            _ => for_size!(operand_size(instruction, 1), crc32, [], [Memory]),
        },
        _ => None,
    }
}
