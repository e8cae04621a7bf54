//! DAA, DAS, AAA, AAS, AAM, AAD and BOUND's integer neighbours that only exist outside 64-bit mode.
//!
//! The host cannot execute them in 64-bit mode; they follow the manual's pseudo-code (SDM 2A). Flags that it leaves
//! undefined are what processors were seen to make of them: AMD's give those of the addition or subtraction that does the
//! adjusting, Intel's those of AL at the end, and no overflow.

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::{Exception, Gpr, Rflags};

use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::status::Status;

const AL: u8 = Gpr::Rax as u8;
const AX: u8 = Gpr::Rax as u8;

/// The flags of an adjusting addition or subtraction, but for CF and AF.
fn set_flags(cpu: &mut Cpu, status: Status, carry: bool, auxiliary: bool) {
    let mut flags = Rflags::from_bits_truncate(status.to_rflags());
    flags.set(Rflags::CF, carry);
    flags.set(Rflags::AF, auxiliary);
    cpu.status = cpu.status.with(Rflags::STATUS, flags);
}

fn decimal_adjust(cpu: &mut Cpu, subtract: bool) {
    let old = cpu.reg::<u8>(AL);
    let carry = cpu.status.cf();
    let low = old & 15 > 9 || cpu.status.af();
    let high = old > 0x99 || carry;
    let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let (value, status) = if subtract { old.sub(by) } else { old.add(by) };
    let borrow = subtract && low && old < 6;
    cpu.set_reg(AL, value);
    let status = if cpu.features.is_intel() { value.or(0).1 } else { status };
    set_flags(cpu, status, high || borrow, low);
}

fn daa(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    decimal_adjust(cpu, false);
    Ok(())
}

fn das(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    decimal_adjust(cpu, true);
    Ok(())
}

fn ascii_adjust(cpu: &mut Cpu, subtract: bool) {
    let ax = cpu.reg::<u16>(AX);
    let adjust = ax & 15 > 9 || cpu.status.af();
    let by = if adjust { 0x106 } else { 0 };
    let (value, status) = if subtract { ax.sub(by) } else { ax.add(by) };
    let value = value & 0xff0f;
    cpu.set_reg(AX, value);
    let status = if cpu.features.is_intel() { (value as u8).or(0).1 } else { status };
    set_flags(cpu, status, adjust, adjust);
}

fn aaa(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    ascii_adjust(cpu, false);
    Ok(())
}

fn aas(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    ascii_adjust(cpu, true);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let al = cpu.reg::<u8>(AL);
    let base = op.immediate as u8;
    let tens = al.checked_div(base).ok_or(Exception::DE)?;
    let units = al % base;
    cpu.set_reg(AX, u16::from_le_bytes([units, tens]));
    set_flags(cpu, units.or(0).1, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let [al, ah] = cpu.reg::<u16>(AX).to_le_bytes();
    let (value, status) = al.add(ah.wrapping_mul(op.immediate as u8));
    cpu.set_reg(AX, u16::from(value));
    cpu.status = status;
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Daa => Some(daa),
        Mnemonic::Das => Some(das),
        Mnemonic::Aaa => Some(aaa),
        Mnemonic::Aas => Some(aas),
        Mnemonic::Aam => Some(aam),
        Mnemonic::Aad => Some(aad),
        _ => None,
    }
}
