//! Instructions on the system flags, software interrupts and HLT.

use iced_x86::{Code, Instruction, Mnemonic};
use ringfence_engine::Activity;
use ringfence_memory::Scalar;
use ringfence_x86::{Exception, Rflags, Vector};

use super::iret::ANY;
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::event::Source;
use crate::interp::op::{Handler, Op};

impl Cpu {
    /// #GP(0) in virtual-8086 mode below IOPL 3 (SDM 3A 20.2.7).
    fn require_virtual_iopl(&self) -> Result<(), Exception> {
        if self.flags.contains(Rflags::VM) && self.flags.iopl() < 3 { Err(Exception::GP0) } else { Ok(()) }
    }

    /// #GP(0) where the I/O privilege level does not reach.
    fn require_iopl(&self) -> Result<(), Exception> {
        if self.cpl > self.flags.iopl() { Err(Exception::GP0) } else { Ok(()) }
    }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_iopl()?;
    cpu.flags.remove(Rflags::IF);
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_iopl()?;
    if !cpu.flags.contains(Rflags::IF) {
        cpu.flags.insert(Rflags::IF);
        cpu.interrupt_shadow = true;
    }
    cpu.leave_block = true;
    Ok(())
}

fn pushf<T: Scalar>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_virtual_iopl()?;
    let image = cpu.rflags() & !(Rflags::VM | Rflags::RF).bits();
    cpu.push(T::truncate(image))
}

fn popf<T: Scalar>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_virtual_iopl()?;
    let mut mask = ANY;
    if T::SIZE > 2 {
        mask |= Rflags::AC | Rflags::ID;
    }
    if cpu.cpl <= cpu.flags.iopl() {
        mask |= Rflags::IF;
    }
    if cpu.cpl == 0 {
        mask |= Rflags::IOPL;
    }
    let value = cpu.pop::<T>()?.widen();
    if T::SIZE > 2 {
        cpu.flags.remove(Rflags::RF);
    }
    cpu.load_flags(value, mask);
    Ok(())
}

fn set_ac(cpu: &mut Cpu, value: bool) -> Result<(), Exception> {
    if cpu.cpl > 0 || !cpu.protected() {
        return Err(Exception::UD);
    }
    cpu.flags.set(Rflags::AC, value);
    cpu.update_class();
    Ok(())
}

fn clac(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    set_ac(cpu, false)
}

fn stac(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    set_ac(cpu, true)
}

fn hlt(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    cpu.activity = Activity::Halted;
    cpu.leave_block = true;
    Ok(())
}

fn int_n(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_virtual_iopl()?;
    cpu.software_interrupt(op.immediate as u8, Source::Software)
}

fn int3(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.software_interrupt(Vector::Breakpoint as u8, Source::Software)
}

fn into(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    if cpu.status.of() { cpu.software_interrupt(Vector::Overflow as u8, Source::Software) } else { Ok(()) }
}

fn int1(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.software_interrupt(Vector::Debug as u8, Source::Int1)
}

fn bound<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let low: T = cpu.read(op)?;
    let at = cpu.effective_address(op).wrapping_add(T::SIZE as u64) & op.address_mask;
    let linear = cpu.linear(op.segment, at, T::SIZE as u64, false)?;
    let high: T = cpu.load(op.segment, linear)?;
    let index = cpu.reg::<T>(op.dst).sign_extend();
    let inside = (low.sign_extend()..=high.sign_extend()).contains(&index);
    if inside { Ok(()) } else { Err(Exception::new(Vector::BoundRange)) }
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match instruction.code() {
        C::Pushfw => pushf::<u16>,
        C::Pushfd => pushf::<u32>,
        C::Pushfq => pushf::<u64>,
        C::Popfw => popf::<u16>,
        C::Popfd => popf::<u32>,
        C::Popfq => popf::<u64>,
        C::Bound_r16_m1616 => bound::<u16>,
        C::Bound_r32_m3232 => bound::<u32>,
        _ => match instruction.mnemonic() {
            Mnemonic::Cli => cli,
            Mnemonic::Sti => sti,
            Mnemonic::Clac => clac,
            Mnemonic::Stac => stac,
            Mnemonic::Hlt => hlt,
            Mnemonic::Int => int_n,
            Mnemonic::Int3 => int3,
            Mnemonic::Into => into,
            Mnemonic::Int1 => int1,
            _ => return None,
        },
    })
}
