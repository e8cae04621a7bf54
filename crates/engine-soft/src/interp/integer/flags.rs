//! CLC, STC, CMC, CLD, STD, LAHF, SAHF, SALC.

use iced_x86::{Instruction, Mnemonic};
use ringfence_x86::{Exception, Gpr, Rflags};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

/// AH.
const AH: u8 = 16;

fn clc(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.status = cpu.status.with(Rflags::CF, Rflags::empty());
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.status = cpu.status.with(Rflags::CF, Rflags::CF);
    Ok(())
}

fn cmc(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    if cpu.status.cf() { clc(cpu, op) } else { stc(cpu, op) }
}

fn cld(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.flags.remove(Rflags::DF);
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.flags.insert(Rflags::DF);
    Ok(())
}

fn lahf(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let flags = cpu.rflags() as u8;
    cpu.set_reg(AH, flags);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let value = Rflags::from_bits_truncate(u64::from(cpu.reg::<u8>(AH)));
    let mask = Rflags::STATUS.difference(Rflags::OF);
    cpu.status = cpu.status.with(mask, value);
    Ok(())
}

/// SALC, not in the manual: AL is all ones if carry is set, zero otherwise.
fn salc(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let value = if cpu.status.cf() { 0xff_u8 } else { 0 };
    cpu.set_reg(Gpr::Rax as u8, value);
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Clc => Some(clc),
        Mnemonic::Stc => Some(stc),
        Mnemonic::Cmc => Some(cmc),
        Mnemonic::Cld => Some(cld),
        Mnemonic::Std => Some(std),
        Mnemonic::Lahf => Some(lahf),
        Mnemonic::Sahf => Some(sahf),
        Mnemonic::Salc => Some(salc),
        _ => None,
    }
}
