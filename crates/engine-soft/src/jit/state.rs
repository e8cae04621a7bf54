//! What translated code keeps in the vCPU, and where it finds the rest.

pub(super) mod field;

use std::collections::HashSet;
use std::mem::offset_of;
use std::sync::Arc;

use ringfence_memory::GuestAddress;
use ringfence_x86::segment::{DescriptorTable, Segment};
use ringfence_x86::{Exception, SegmentRegister, msr};

use super::asm::{Mem, at};
use super::compat::Compat;
use super::gate::Gate;
use super::interrupt_return::Returns;
use super::kept::PLACES;
use super::registers::PIN;
use super::span::BASES;
use crate::code::StaleCode;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::{CodeSize, Cpu};
use crate::interp::msrs::Msrs;
use crate::interp::op::RIP;
use crate::interp::system::syscall::segments_of;
use crate::landing::Raised;
use crate::mmu::tlb::Class;

/// What a change of privilege puts in place.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Privilege {
    /// Of [`State::context`].
    pub(super) context: u64,
    /// Of [`State::fetch_table`].
    pub(super) fetch_table: u64,
    /// CS and SS as STAR has them.
    pub(super) segments: [Segment; 2],
}

/// Fields of the vCPU that only translated code and its run loop use. Addresses are numbers here, so that a vCPU can
/// change threads; those into other allocations are set anew on every entry. What is used most comes last, next to
/// [`Cpu::regs`].
#[derive(Debug)]
#[repr(C)]
pub struct State {
    /// The exception with which a region was left.
    pub(super) exception: Option<Exception>,
    /// Exceptions are delivered where they are raised, and not by who runs translated code.
    pub(crate) delivers: bool,
    /// How many were.
    pub(crate) delivered: u64,
    /// Instructions handed to the interpreter from translated code.
    pub(super) interpreted: u64,
    /// How often translated code handed which form of instruction to its handler, by [`iced_x86::Code`]; empty unless a profile
    /// was asked for.
    pub(super) handed: Vec<u64>,
    /// Where the stack is while its page is not known.
    nowhere: Box<Page>,
    /// Pages with translated code that branches far away.
    pub(super) far_pages: HashSet<GuestAddress>,
    /// Instructions retired when the budget is used up.
    pub(super) end: u64,
    /// Where to enter.
    pub(super) entry: u64,
    /// Address of the function that runs an instruction's handler.
    pub(super) interpret: u64,
    /// Address of the operations that handlers are given.
    pub(super) sites: u64,
    /// Address of the rows that may run apart.
    pub(super) rows: u64,
    /// Address of the links to other pages.
    pub(super) crossings: u64,
    /// Address of the function that translates one.
    pub(super) apart: u64,
    /// Address of the function that brings the x87 state into the host's unit.
    pub(super) bring_x87: u64,
    /// Address of the function that delivers SIMD exceptions, and where the last one was raised: with what in scratch registers, and
    /// in the slot of the stack pointer.
    pub(super) raised: u64,
    pub(super) raised_at: Raised,
    pub(super) scratch: [u64; PLACES.len()],
    pub(super) stack_slot: u64,
    /// What FLDCW loads.
    pub(super) x87_control: u64,
    /// A [`crate::vector::pass::X87`].
    pub(super) x87: u64,
    /// Address of the translator.
    pub(super) translator: u64,
    /// Address of the arena, as it is executed, and where it can be written.
    pub(super) arena: u64,
    pub(super) writable: u64,
    /// The host's address at which to go on.
    pub(super) onward: u64,
    /// Address of the table of indirect branches' targets.
    pub(super) targets: u64,
    /// Counts the times that code became stale.
    pub(super) epoch: u32,
    /// Host address of a stack slot that has been checked.
    pub(super) slot: u64,
    /// Host addresses of what a row accesses.
    pub(super) base_hosts: [u64; BASES],
    /// The value of a register with which the laps of a loop end.
    pub(super) laps_end: u64,
    /// The host's stack pointer while no call of the guest is remembered.
    pub(super) base: u64,
    /// Address of the guest's vector registers when they are not in the host's.
    pub(super) vectors: u64,
    /// Address of the word that says whether something waits for the CPU.
    pub(super) inbox: u64,
    /// Address of the clock's [`ringfence_engine::HostLine`].
    pub(super) time_line: u64,
    /// Tables of the soft TLB for loads and stores below CPL 3: without and with access to user pages.
    pub(super) kernel_tables: [u64; 2],
    /// The table for loads and stores at CPL 3.
    pub(super) user_table: u64,
    /// What SYSCALL and SYSRET put in place for CPL 0 and CPL 3.
    pub(super) privileges: [Privilege; 2],
    /// The value of STAR whose segments are there.
    pub(super) star: u64,
    /// Whether they span all 4 GiB: both can be read, the stack can be written.
    pub(super) flat_by_star: u16,
    /// What SYSENTER and SYSRET put in place from and for 32-bit code.
    pub(super) compat: Compat,
    /// What INT n has last gone through.
    pub(super) gate: Gate,
    /// Where IRET has led to.
    pub(super) returns: Returns,
    /// Table of the soft TLB for what the processor loads on its own behalf.
    pub(super) system_table: u64,
    /// Address of the byte that says whether code has become stale.
    pub(super) stale_flag: u64,
    /// The host's address for no page.
    pub(super) no_stack: u64,
    /// What [`crate::mmu::tlb::Tlb::write_changes`] was when the stack's page was found.
    pub(super) stack_changes: u64,
    /// Code of the translator's that has become stale.
    pub(super) stale: Option<Arc<StaleCode>>,
    /// The link or site through which a region was left.
    pub(super) link: u32,
    /// The highest level at which vector instructions may run as they are.
    pub(super) passing: u32,
    /// Address of the table of jump targets.
    pub(super) jumps: u64,
    /// What distinguishes the mode's physical addresses there; see [`CodeAddress`].
    pub(super) code_tag: u64,
    /// What the host's stack and the run loop rely on: mode, privilege, TLB generation.
    pub(super) context: u64,
    /// Table of the soft TLB for instruction fetches by the current privilege.
    pub(super) fetch_table: u64,
    /// Which vector registers are in the host's: a [`crate::vector::pass::Level`], or 0.
    pub(super) level: u64,
    /// The page that the guest's stack was last found in, writable: its linear address, and the host's.
    pub(super) stack_page: u64,
    pub(super) stack_host: u64,
    /// Table of the soft TLB for loads and stores by the current class. It is in a register of its own as well.
    pub(super) data_table: u64,
    /// Linear address of the guest page whose code runs.
    pub(super) page: u64,
    /// Instructions that may still be executed; translated code has them in [`super::registers::BUDGET`].
    pub(super) budget: i64,
}

impl State {
    /// Nothing set.
    pub fn new() -> Self {
        Self {
            exception: None,
            delivers: false,
            delivered: 0,
            interpreted: 0,
            handed: Vec::new(),
            nowhere: Box::new(Page([0; 0x1000])),
            far_pages: HashSet::new(),
            end: 0,
            entry: 0,
            interpret: 0,
            sites: 0,
            rows: 0,
            crossings: 0,
            apart: 0,
            bring_x87: 0,
            raised: 0,
            raised_at: Raised::default(),
            scratch: [0; PLACES.len()],
            stack_slot: 0,
            x87_control: 0,
            x87: 0,
            translator: 0,
            arena: 0,
            writable: 0,
            onward: 0,
            targets: 0,
            epoch: 0,
            slot: 0,
            base_hosts: [0; BASES],
            laps_end: 0,
            base: 0,
            vectors: 0,
            inbox: 0,
            time_line: 0,
            kernel_tables: [0; 2],
            user_table: 0,
            privileges: segments_of(0).map(|segments| Privilege { segments, context: 0, fetch_table: 0 }),
            star: 0,
            flat_by_star: 0x301,
            compat: Compat::new(),
            gate: Gate::new(),
            returns: Returns::NONE,
            system_table: 0,
            stale_flag: 0,
            stack_changes: 0,
            stale: None,
            link: 0,
            passing: 0,
            jumps: 0,
            code_tag: 0,
            context: 0,
            fetch_table: 0,
            level: 0,
            stack_page: NO_STACK,
            stack_host: 0,
            no_stack: 0,
            data_table: 0,
            page: 0,
            budget: 0,
        }
    }

    /// Code of the translator's that has become stale, if there is one.
    pub(crate) fn stale_code(&self) -> Option<&Arc<StaleCode>> {
        self.stale.as_ref()
    }

    /// The stack's page is not known any more.
    #[inline(always)]
    fn forget_stack(&mut self) {
        self.no_stack = self.nowhere.0.as_mut_ptr() as u64;
        (self.stack_page, self.stack_host) = (NO_STACK, self.no_stack);
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

/// No page: it is not canonical, and no address that comes about by itself, as that of a failed conversion to an integer may. A guest can
/// all the same give its stack pointer this very value; then what it accesses is [`State::nowhere`], and it has no fault.
pub(super) const NO_STACK: u64 = 0x9e37_79b9_7f4a_7000;

/// A page of nobody's.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([u8; 0x1000]);

impl Cpu {
    /// Finds the page of the stack for translated code, if there is a soft-TLB entry for it. What was found before holds
    /// only as long as the TLB has not changed.
    #[inline(always)]
    pub(super) fn find_stack(&mut self) {
        let pointer = self.regs[4];
        let state = &mut self.translated;
        if state.stack_changes == self.tlb.write_changes() && pointer.wrapping_sub(state.stack_page) < 0x1000
        {
            return;
        }
        let page = pointer & !0xfff;
        state.stack_changes = self.tlb.write_changes();
        match self.tlb.write(self.class, page, 1) {
            Some(host) => (state.stack_page, state.stack_host) = (page, host as u64),
            None => state.forget_stack(),
        }
    }

    /// Which tables the soft TLB answers from; called where the class, the privilege or the address space changes.
    #[inline(always)]
    pub(crate) fn select_tables(&mut self) {
        self.translated.data_table = self.tlb.table(self.class);
        self.translated.fetch_table = self.tlb.fetch_table(self.cpl == 3);
        self.translated.forget_stack();
    }

    /// What translated code puts in place where it changes class or privilege itself; called wherever it is entered, or goes on
    /// after an instruction that may have changed any of it.
    #[inline(always)]
    pub(super) fn prepare_privileges(&mut self) {
        let contexts = [self.jump_context_of(false), self.jump_context_of(true)];
        let implicit = self.implicit_class();
        let state = &mut self.translated;
        state.kernel_tables = [self.tlb.table(Class::Kernel), self.tlb.table(Class::KernelAc)];
        state.user_table = self.tlb.table(Class::User);
        state.system_table = self.tlb.table(implicit);
        for (user, privilege) in [false, true].into_iter().zip(&mut state.privileges) {
            privilege.context = contexts[usize::from(user)];
            privilege.fetch_table = self.tlb.fetch_table(user);
        }
        state.context = contexts[usize::from(self.cpl == 3)];
        state.code_tag = CodeAddress::tag(self.code_size == CodeSize::Bits32);
        self.prepare_compat();
        let star = self.stored_msr(msr::STAR);
        if self.translated.star != star {
            self.translated.star = star;
            self.translated.compat.follow_star(star);
            for (privilege, segments) in self.translated.privileges.iter_mut().zip(segments_of(star)) {
                privilege.segments = segments;
            }
        }
    }

    /// What the target of a branch depends on besides its address, as long as no code becomes stale, at CPL 3 (`user`) or below.
    /// Never zero, and neither is its upper half, which leaves out what matters only while code may become stale
    /// ([`super::links::Crossing`]).
    #[inline(always)]
    fn jump_context_of(&self, user: bool) -> u64 {
        u64::from(self.tlb.generation(user)) << 33
            | u64::from(user) << 32
            | u64::from(self.translated.epoch & 0xff_ffff) << 8
            | 1 << 4
            | self.mode().map_or(0, |mode| mode as u64)
    }

    /// Whether what was prepared for code below CPL 3 and there still holds.
    #[inline(always)]
    pub(super) fn jump_contexts_hold(&self) -> bool {
        let state = &self.translated;
        let prepared = state.privileges.map(|privilege| privilege.context);
        prepared == [self.jump_context_of(false), self.jump_context_of(true)]
            && state.context == prepared[usize::from(self.cpl == 3)]
    }
}

/// A field's distance from `Cpu::regs`, which the pinned register points at.
const fn distance(offset: usize) -> i32 {
    offset as i32 - offset_of!(Cpu, regs) as i32
}

// The fields used most are within reach of a one-byte displacement.
const _: () = assert!(distance(offset_of!(Cpu, translated) + offset_of!(State, context)) >= -128);
