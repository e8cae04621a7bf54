//! Floating-point exceptions that the guest does not mask.
//!
//! Translated code runs with the guest's MXCSR, its exceptions' masks included. So where the guest's processor would raise a SIMD
//! exception, the host's does, at the same instruction: its destination and the flags are as they were, and MXCSR is what the guest is to find. That
//! costs nothing until it happens. The host's kernel makes a signal of it, whose handler has the thread go on in fixed code
//! ([`crate::landing`]), which puts by all that is in host registers and calls [`raised`]. From the instruction's address in
//! the host that finds a [`Point`], which tells where the guest's state is in the midst of a unit; and it delivers the exception as any other.
//!
//! There is a point for each instruction that may raise such an exception, whether or not the guest ever unmasks one: 16 bytes, beside the
//! four to ten of the instruction. Were they only made once some guest has, all would have to be translated anew then.
//!
//! The host's x87 unit has the guest's masks as well. An exception of its is raised at the FWAIT behind the guest's instruction ([`super::x87`]),
//! which has a point of its own: it tells which instruction that was.

use std::mem::offset_of;

use iced_x86::Code;

use super::Jit;
use super::asm::{Assembler, RDI, Two, at};
use super::cache::Cache;
use super::emit::Emitter;
use super::helper::{Site, raise};
use super::kept::PLACES;
use super::registers::{A, PIN};
use super::span::RSP;
use super::state::field;
use super::stubs::{reason, spill, store_registers};
use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;
use crate::status::Status;
use crate::vector::pass::Level;

/// Where the guest's state is at an instruction that may raise an exception.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    /// Offset of the host's instruction in the arena.
    pub(super) at: u32,
    raiser: Raiser,
    /// How far the stack pointer has yet to be moved.
    pending: i16,
    /// See [`super::kept::Kept::newer`].
    kept: u16,
    /// The guest's arithmetic flags are in the host's, not in the vCPU.
    flags: bool,
    /// [`super::registers::STACK`] has been taken: the stack pointer is in its slot.
    stack_taken: bool,
}

const _: () = assert!(size_of::<Point>() == 16);

/// The guest's instruction that has raised an exception.
#[derive(Clone, Copy, Debug)]
pub(super) enum Raiser {
    /// That which the host executes, a SIMD instruction: its offset in its page, and how many of its unit are behind it.
    Simd { start: u16, behind: u16 },
    /// The x87 instruction before: the number of its site, lower half first.
    X87 { site: [u16; 2] },
}

impl Raiser {
    /// An x87 instruction by its site.
    pub(super) fn x87(site: u32) -> Self {
        Self::X87 { site: [site as u16, (site >> 16) as u16] }
    }
}

impl Emitter<'_> {
    /// Notes where the guest's state is for step `i`, whose instruction is emitted next, if it may raise a SIMD exception. `None` if
    /// that cannot be told.
    pub(super) fn note_point(&mut self, i: usize) -> Option<()> {
        let (step, _) = self.at(i);
        if !step.facts.passed.is_some_and(|passed| passed.raises) {
            return Some(());
        }
        self.add_point(Raiser::Simd { start: step.start() as u16, behind: step.behind })
    }

    /// Notes where the guest's state is for the instruction that is emitted next. `None` if that cannot be told.
    pub(super) fn add_point(&mut self, raiser: Raiser) -> Option<()> {
        let (kept, stack_taken) = self.kept.newer();
        self.points.push(Point {
            at: self.a.here() as u32,
            raiser,
            pending: i16::try_from(self.pending).ok()?,
            kept,
            flags: self.host_flags && !self.stored_flags,
            stack_taken,
        });
        Some(())
    }
}

impl Cache {
    /// The point of the instruction at a host's address.
    fn point(&self, address: u64) -> Option<Point> {
        let at = u32::try_from(address.checked_sub(self.host(0))?).ok()?;
        let found = self.points.binary_search_by_key(&at, |point| point.at).ok();
        if let Some(index) = found {
            return self.points.get(index).copied();
        }
        let index = self.points_apart.binary_search_by(|point| at.cmp(&point.at)).ok()?;
        self.points_apart.get(index).copied()
    }
}

/// The fixed code that the thread goes on in. Its end is at `leaves`, where the code is that calls handlers, with the function's result in RAX.
pub(super) fn landing(a: &mut Assembler, levels: &[Level], leaves: usize) -> usize {
    let start = a.here();
    for (place, reg) in PLACES.into_iter().enumerate() {
        a.rm(Two::Store, reg, field::scratch(place));
    }
    a.rm(Two::Load, A, field::register(RSP));
    store_registers(a);
    a.rm(Two::Store, A, field::stack_slot());
    spill(a, levels);
    a.rm(Two::Lea, RDI, at(PIN, -(offset_of!(Cpu, regs) as i32)));
    a.call_mem(field::raised());
    a.jmp_to(leaves as i64);
    start
}

/// Does what is to be done about an exception that translated code has raised, and says how to go on.
/// A panic ends the process: it cannot unwind through translated code.
///
/// # Safety
/// Called from translated code only: `cpu` is the vCPU that was entered and not otherwise borrowed, and so is the translator whose address
/// it holds.
pub(super) unsafe extern "sysv64" fn raised(cpu: *mut Cpu) -> u64 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: as above; its address was taken when translated code was entered.
    let jit = unsafe { &*(cpu.translated.translator as *const Jit) };
    let raised = cpu.translated.raised_at;
    let Some(point) = jit.cache.point(raised.at) else {
        panic!("a floating-point exception at {:#x}, where no instruction can raise one", raised.at)
    };
    if point.stack_taken {
        cpu.regs[usize::from(RSP)] = cpu.translated.stack_slot;
    }
    for (place, &value) in cpu.translated.scratch.iter().enumerate() {
        match usize::from(point.kept >> (4 * place) & 15) {
            0 => {}
            number => cpu.regs[number] = value,
        }
    }
    let whole = if cpu.is_64bit() { u64::MAX } else { 0xffff_ffff };
    let stack = &mut cpu.regs[usize::from(RSP)];
    *stack = stack.wrapping_add_signed(point.pending.into()) & whole;
    if point.flags {
        cpu.status = Status::from_rflags(raised.flags);
    }
    match point.raiser {
        Raiser::Simd { start, behind } => raise_simd(cpu, start, behind),
        Raiser::X87 { site: [low, high] } => match jit.cache.site(u32::from(low) | u32::from(high) << 16) {
            Some(site) => leave_pending(cpu, site),
            None => panic!("an x87 exception at {:#x}, of no instruction", raised.at),
        },
    }
}

/// Delivers a SIMD exception.
fn raise_simd(cpu: &mut Cpu, start: u16, behind: u16) -> u64 {
    cpu.regs[RIP] = cpu.translated.page.wrapping_add(start.into());
    let after = cpu.translated.budget + i64::from(behind);
    cpu.retired = cpu.translated.end.wrapping_sub(after as u64).wrapping_sub(1);
    let exception = cpu.simd_exception();
    raise(cpu, exception, after + 1)
}

/// Records what has raised an x87 exception, and leaves that pending. No x87 instruction is to be executed as it is as long as it is.
fn leave_pending(cpu: &mut Cpu, site: &Site) -> u64 {
    cpu.regs[RIP] = cpu.translated.page.wrapping_add(site.next.into());
    // FLDCW has raised nothing: it has unmasked what was raised before.
    if site.op.code != Code::Fldcw_m2byte {
        let location = cpu.x87_location(&site.op);
        cpu.vector.unit.x87_raised(location);
    }
    let after = cpu.translated.budget + i64::from(site.behind);
    cpu.translated.budget = after;
    cpu.retired = cpu.translated.end.wrapping_sub(after as u64);
    if after > 0 { reason::INTERPRET } else { reason::LEAVE }
}
