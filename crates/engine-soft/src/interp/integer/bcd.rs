//! DAA, DAS, AAA, AAS, AAM, AAD and BOUND's integer neighbours that only exist outside 64-bit mode.
//!
//! The host cannot execute them in 64-bit mode; they follow the manual's pseudo-code (SDM 2A), with flags that it leaves
//! undefined as processors set them: from the result, as for other arithmetic.

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::{Exception, Gpr, Rflags};

use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

const AL: u8 = Gpr::Rax as u8;
const AX: u8 = Gpr::Rax as u8;

/// SF, ZF and PF from a byte.
fn set_from_result(cpu: &mut Cpu, result: u8, carry: bool, auxiliary: bool) {
    let (_, status) = result.or(0);
    let mut flags = Rflags::from_bits_truncate(status.to_rflags()) & (Rflags::SF | Rflags::ZF | Rflags::PF);
    flags.set(Rflags::CF, carry);
    flags.set(Rflags::AF, auxiliary);
    cpu.status = cpu.status.with(Rflags::STATUS, flags);
}

fn decimal_adjust(cpu: &mut Cpu, subtract: bool) {
    let old = cpu.reg::<u8>(AL);
    let (carry, auxiliary) = (cpu.status.cf(), cpu.status.af());
    let step = |value: u8, by: u8| if subtract { value.wrapping_sub(by) } else { value.wrapping_add(by) };
    let mut value = old;
    let low = old & 15 > 9 || auxiliary;
    let mut carry_out = carry;
    if low {
        carry_out |= if subtract { old < 6 } else { old > 0xf9 };
        value = step(value, 6);
    }
    if old > 0x99 || carry {
        value = step(value, 0x60);
        carry_out = true;
    } else if !subtract {
        carry_out = false;
    }
    cpu.set_reg(AL, value);
    set_from_result(cpu, value, carry_out, low);
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
    let value = match (adjust, subtract) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
    } & 0xff0f;
    cpu.set_reg(AX, value);
    set_from_result(cpu, value as u8, adjust, adjust);
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
    set_from_result(cpu, units, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let [al, ah] = cpu.reg::<u16>(AX).to_le_bytes();
    let (value, _) = al.add(ah.wrapping_mul(op.immediate as u8));
    cpu.set_reg(AX, u16::from(value));
    set_from_result(cpu, value, false, false);
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
