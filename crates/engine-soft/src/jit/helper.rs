//! The one function that translated code calls: it runs an instruction's handler.

use iced_x86::Code;
use ringfence_engine::Activity;
use ringfence_x86::{Exception, Rflags};

use super::stubs::reason;
use super::{Jit, MAX_UNIT};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Op, RIP};

/// An instruction that translated code may hand to its handler, and what the function, or the fixed code that calls it, must know.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Site {
    pub(super) op: Op,
    /// Where to go on behind it: an offset in the arena.
    pub(super) back: u32,
    /// Where to go on with a check of the stack that succeeds now, likewise.
    pub(super) again: u32,
    /// Offset in the page of the instruction behind it, up to 0x100e.
    pub(super) next: u16,
    /// Instructions of its unit behind it.
    pub(super) behind: u16,
    /// The last offset in the stack's page at which its access fits.
    pub(super) limit: u16,
    /// Which vector registers are expected to be in the host's where it goes on: a level, or 0.
    pub(super) level: u8,
    /// See [`marks`].
    pub(super) marks: u8,
}

/// log2 of the size of a [`Site`].
pub(super) const SITE_SHIFT: u8 = 6;
const _: () = assert!(size_of::<Site>() == 1 << SITE_SHIFT);

/// Marks of a [`Site`].
pub(super) mod marks {
    /// The region ends with it: it may have gone anywhere and changed any mode.
    pub(in super::super) const ENDS: u8 = 1;
    /// It only changes what translated code can follow: where it leads, code can go on at once.
    pub(in super::super) const RESUMES: u8 = 2;
    /// It has been executed where its vector registers are wanted.
    pub(in super::super) const DONE: u8 = 4;
    /// Where it goes on, x87 and MMX instructions are executed as they are.
    pub(in super::super) const X87: u8 = 8;
    /// They are also where some x87 exception is not masked ([`super::super::x87`]).
    pub(in super::super) const CAREFUL: u8 = 16;
}

impl Site {
    fn has(&self, mark: u8) -> bool {
        self.marks & mark != 0
    }
}

/// Runs the handler of a site with the guest's registers in the vCPU and says whether translated code goes on.
/// A panic in a handler ends the process: it cannot unwind through translated code.
///
/// # Safety
/// Called from translated code only: `cpu` is the vCPU that was entered and not otherwise borrowed, `site` the index of one
/// of those at `cpu.translated.sites`.
pub(super) unsafe extern "sysv64" fn interpret(cpu: *mut Cpu, site: usize) -> u64 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: the caller's promise; handlers cannot reach the translator, so the list stays as it is.
    let site = unsafe { &*(cpu.translated.sites as *const Site).add(site) };
    let next = cpu.translated.page.wrapping_add(u64::from(site.next));
    cpu.regs[RIP] = next;
    cpu.translated.interpreted += 1;
    let after = cpu.translated.budget + i64::from(site.behind);
    cpu.retired = cpu.translated.end.wrapping_sub(after as u64).wrapping_sub(1);
    let outcome = (site.op.handler)(cpu, &site.op);
    cpu.translated.passing = cpu.vector.passing_level().into();
    cpu.translated.x87 = cpu.vector.x87_passes() as u64;
    if let Err(exception) = outcome {
        cpu.regs[RIP] = next.wrapping_sub(u64::from(site.op.length));
        return raise(cpu, exception, after + 1);
    }
    if matches!(site.op.code, Code::Iretq | Code::Iretd) {
        returned(cpu, after);
    }
    if site.op.code == Code::Int_imm8 {
        cpu.learn_gate(site.op.immediate as u8);
    }
    if cpu.leave_block || site.has(marks::ENDS) && must_leave(cpu) {
        cpu.translated.budget = after;
        return if site.has(marks::RESUMES) { resume(cpu) } else { reason::LEAVE };
    }
    cpu.find_stack();
    reason::CONTINUE
}

/// An instruction has raised an exception: RIP points at it, and the budget covers `left` instructions, itself included.
pub(super) fn raise(cpu: &mut Cpu, exception: Exception, left: i64) -> u64 {
    cpu.translated.budget = left;
    if cpu.translated.delivers {
        return deliver(cpu, exception);
    }
    cpu.translated.exception = Some(exception);
    reason::FAULT
}

/// Delivers an exception and goes on where that leads, as the run loop would.
fn deliver(cpu: &mut Cpu, exception: Exception) -> u64 {
    cpu.translated.delivered += 1;
    if let Err(fault) = cpu.raise(exception) {
        cpu.shut_down(fault);
    }
    resume(cpu)
}

/// Goes on at RIP, in translated code if nothing keeps it from there.
fn resume(cpu: &mut Cpu) -> u64 {
    if !may_resume(cpu) {
        return reason::LEAVE;
    }
    cpu.leave_block = false;
    cpu.prepare_privileges();
    cpu.find_stack();
    reason::RESUME
}

/// After an IRETQ or IRETD, where the budget covers `left` instructions more: fixed code may do the next one like it.
fn returned(cpu: &mut Cpu, left: i64) {
    cpu.learn_return();
    if cpu.flags.contains(Rflags::RF) && left >= MAX_UNIT as i64 {
        // It holds off a breakpoint of the next instruction only. Where that is executed at once, and none is armed, it is gone
        // before anybody can see it.
        cpu.flags.remove(Rflags::RF);
        cpu.flags.set(Rflags::RF, !may_resume(cpu));
    }
}

/// As [`interpret`], for a profile: counts the instruction's form first.
///
/// # Safety
/// As [`interpret`].
pub(super) unsafe extern "sysv64" fn interpret_counted(cpu: *mut Cpu, site: usize) -> u64 {
    {
        // SAFETY: the caller's promise; the borrow ends here.
        let cpu = unsafe { &mut *cpu };
        // SAFETY: as in `interpret`.
        let code = unsafe { &*(cpu.translated.sites as *const Site).add(site) }.op.code;
        if let Some(count) = cpu.translated.handed.get_mut(code as usize) {
            *count += 1;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { interpret(cpu, site) }
}

/// Translates the steps of a row apart, where the check for all of them has failed: the host's address of their code.
///
/// # Safety
/// Called from translated code only: `cpu` is the vCPU that was entered and not otherwise borrowed, and so is the translator whose address
/// it holds.
pub(super) unsafe extern "sysv64" fn apart(cpu: *mut Cpu, row: usize) -> u64 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: as above; its address was taken when translated code was entered.
    let jit = unsafe { &mut *(cpu.translated.translator as *mut Jit) };
    jit.apart(cpu, row)
}

/// Brings the guest's x87 state into the host's unit and says in the vCPU whether its instructions may be executed as they are.
///
/// # Safety
/// Called from translated code only: `cpu` is the vCPU that was entered and not otherwise borrowed.
pub(super) unsafe extern "sysv64" fn bring_x87(cpu: *mut Cpu) {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    cpu.vector.bring_x87();
    cpu.translated.x87 = cpu.vector.x87_passes() as u64;
}

/// What [`interpret_counted`] has counted: forms of instructions, and how often.
pub(crate) fn handed(cpu: &Cpu) -> Vec<(String, u64)> {
    let counts = Code::values().zip(&cpu.translated.handed).filter(|(_, count)| **count != 0);
    counts.map(|(code, &count)| (format!("{code:?}"), count)).collect()
}

/// Whether nothing keeps translated code from going on at RIP after an instruction that has changed mode, privilege or
/// address space.
fn may_resume(cpu: &Cpu) -> bool {
    cpu.mode().is_some()
        && cpu.activity == Activity::Active
        && !cpu.steps_singly()
        && !cpu.translated.stale.as_ref().is_some_and(|stale| stale.any())
        && cpu.apic.as_ref().is_none_or(|apic| apic.inbox().pending() == 0)
}

/// Whether an instruction is one after which that may be so.
pub(super) fn resumes(code: Code) -> bool {
    matches!(
        code,
        Code::Syscall
            | Code::Sysretq
            | Code::Iretq
            | Code::Sti
            | Code::Clac
            | Code::Stac
            | Code::Popfq
            | Code::Mov_cr_r64
            | Code::Cpuid
            | Code::Invlpg_m
            | Code::Invpcid_r64_m128
            // From and to 32-bit code, and in it.
            | Code::Int_imm8
            | Code::Sysretd
            | Code::Sysenter
            | Code::Sysexitd
            | Code::Iretd
            | Code::Popfd
            | Code::Mov_cr_r32
            | Code::Invpcid_r32_m128
            | Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Popd_ES
            | Code::Popd_DS
            | Code::Popd_FS
            | Code::Popd_GS
            | Code::Call_ptr1632
            | Code::Jmp_ptr1632
            | Code::Call_m1632
            | Code::Jmp_m1632
            | Code::Call_m1664
            | Code::Jmp_m1664
            | Code::Retfd
            | Code::Retfq
    )
}

/// Whether an instruction that may change anything did change what jump targets or the run loop depend on.
fn must_leave(cpu: &Cpu) -> bool {
    cpu.mode().is_none()
        || !cpu.jump_contexts_hold()
        || cpu.flags.intersects(Rflags::TF | Rflags::RF)
        || cpu.interrupt_shadow
}
