//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM 2B; APM 3). Where the two vendors differ, the model's vendor decides.

use iced_x86::{Code, Instruction};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::Segment;
use ringfence_x86::{Cr0, Efer, Exception, Gpr, Rflags, SegmentRegister, msr};

use super::segment::{flat_code, flat_stack};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, RIP};

const RCX: usize = Gpr::Rcx as usize;
const RDX: usize = Gpr::Rdx as usize;
const RSP: usize = Gpr::Rsp as usize;
const R11: usize = Gpr::R11 as usize;

/// CS and SS after SYSCALL and after SYSRET in 64-bit mode, as a value of STAR has them.
pub(crate) fn segments_of(star: u64) -> [[Segment; 2]; 2] {
    let (call, back) = ((star >> 32) as u16, (star >> 48) as u16);
    [
        [flat_code(call, 0, true), flat_stack((call & !3).wrapping_add(8), 0)],
        [flat_code(back.wrapping_add(16), 3, true), flat_stack(back.wrapping_add(8), 3)],
    ]
}

impl Cpu {
    /// A stored MSR, zero if it was never written.
    pub(crate) fn stored_msr(&self, number: u32) -> u64 {
        self.msrs.get(number).unwrap_or(0)
    }

    fn enter_flat(&mut self, cs: Segment, ss: Segment) {
        self.segments[SegmentRegister::Cs as usize] = cs;
        self.segments[SegmentRegister::Ss as usize] = ss;
        self.cpl = cs.selector.rpl();
        self.update_mode();
    }
}

fn syscall(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let intel = cpu.features.is_intel();
    let wrong_mode = !cpu.protected() || (intel && !cpu.is_64bit());
    if !cpu.efer.contains(Efer::SCE) || wrong_mode {
        return Err(Exception::UD);
    }
    let star = cpu.stored_msr(msr::STAR);
    let rflags = cpu.rflags() & !Rflags::RF.bits();
    if cpu.long_mode() {
        let entry = if cpu.is_64bit() { msr::LSTAR } else { msr::CSTAR };
        let mask = cpu.stored_msr(msr::FMASK);
        cpu.regs[RCX] = cpu.regs[RIP];
        cpu.regs[R11] = rflags;
        cpu.regs[RIP] = cpu.stored_msr(entry);
        cpu.set_rflags(rflags & !mask);
        step_by_new_flags(cpu);
        let [[cs, ss], _] = segments_of(star);
        cpu.enter_flat(cs, ss);
    } else {
        let selector = (star >> 32) as u16 & !3;
        cpu.regs[RCX] = cpu.regs[RIP] & 0xffff_ffff;
        cpu.regs[RIP] = star & 0xffff_ffff;
        cpu.flags.remove(Rflags::IF | Rflags::RF);
        cpu.enter_flat(flat_code(selector, 0, false), flat_stack(selector.wrapping_add(8), 0));
    }
    Ok(())
}

/// SYSCALL and SYSRET trap by the TF that they leave (APM 2 13.1.4, APM 3 SYSRET).
fn step_by_new_flags(cpu: &mut Cpu) {
    cpu.system.stepping = cpu.flags.contains(Rflags::TF);
}

fn check_sysret(cpu: &Cpu) -> Result<(), Exception> {
    let wrong_mode = cpu.features.is_intel() && !cpu.is_64bit();
    if !cpu.efer.contains(Efer::SCE) || wrong_mode {
        return Err(Exception::UD);
    }
    if cpu.protected() { cpu.require_cpl0() } else { Err(Exception::UD) }
}

/// Flags that SYSRET takes from R11.
pub(crate) const SYSRET_FLAGS: u64 = 0x3c_7fd7;

fn sysretq(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    check_sysret(cpu)?;
    let target = cpu.regs[RCX];
    // Intel faults here, still at CPL 0; AMD when the program fetches there.
    if cpu.features.is_intel() && !is_canonical(target) {
        return Err(Exception::GP0);
    }
    cpu.regs[RIP] = target;
    cpu.set_rflags(cpu.regs[R11] & SYSRET_FLAGS);
    step_by_new_flags(cpu);
    let [_, [cs, ss]] = segments_of(cpu.stored_msr(msr::STAR));
    cpu.enter_flat(cs, ss);
    Ok(())
}

fn sysretd(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    check_sysret(cpu)?;
    let selector = (cpu.stored_msr(msr::STAR) >> 48) as u16;
    cpu.regs[RIP] = cpu.regs[RCX] & 0xffff_ffff;
    if cpu.is_64bit() {
        cpu.set_rflags(cpu.regs[R11] & SYSRET_FLAGS);
        step_by_new_flags(cpu);
    } else {
        cpu.flags.insert(Rflags::IF);
    }
    cpu.enter_flat(flat_code(selector, 3, false), flat_stack(selector.wrapping_add(8), 3));
    Ok(())
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    if cpu.long_mode() && !cpu.features.is_intel() {
        return Err(Exception::UD);
    }
    let selector = cpu.stored_msr(msr::SYSENTER_CS) as u16 & !3;
    if !cpu.cr0.contains(Cr0::PE) || selector == 0 {
        return Err(Exception::GP0);
    }
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs[RIP] = cpu.stored_msr(msr::SYSENTER_EIP) & mask;
    cpu.regs[RSP] = cpu.stored_msr(msr::SYSENTER_ESP) & mask;
    cpu.flags.remove(Rflags::VM | Rflags::IF | Rflags::RF);
    cpu.enter_flat(flat_code(selector, 0, long), flat_stack(selector.wrapping_add(8), 0));
    Ok(())
}

fn check_sysexit(cpu: &Cpu) -> Result<u16, Exception> {
    if cpu.long_mode() && !cpu.features.is_intel() {
        return Err(Exception::UD);
    }
    let selector = cpu.stored_msr(msr::SYSENTER_CS) as u16 & !3;
    if !cpu.cr0.contains(Cr0::PE) || selector == 0 {
        return Err(Exception::GP0);
    }
    cpu.require_cpl0()?;
    Ok(selector)
}

fn sysexitd(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let selector = check_sysexit(cpu)?;
    cpu.regs[RIP] = cpu.regs[RDX] & 0xffff_ffff;
    cpu.regs[RSP] = cpu.regs[RCX] & 0xffff_ffff;
    let ss = flat_stack(selector.wrapping_add(24), 3);
    cpu.enter_flat(flat_code(selector.wrapping_add(16), 3, false), ss);
    Ok(())
}

fn sysexitq(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    let selector = check_sysexit(cpu)?;
    if !is_canonical(cpu.regs[RCX]) || !is_canonical(cpu.regs[RDX]) {
        return Err(Exception::GP0);
    }
    cpu.regs[RIP] = cpu.regs[RDX];
    cpu.regs[RSP] = cpu.regs[RCX];
    let ss = flat_stack(selector.wrapping_add(40), 3);
    cpu.enter_flat(flat_code(selector.wrapping_add(32), 3, true), ss);
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Syscall => syscall,
        Code::Sysretd => sysretd,
        Code::Sysretq => sysretq,
        Code::Sysenter => sysenter,
        Code::Sysexitd => sysexitd,
        Code::Sysexitq => sysexitq,
        _ => return None,
    })
}
