//! What translated code keeps in the vCPU, and where it finds the rest.

use std::mem::offset_of;

use ringfence_x86::Exception;

use super::asm::{Mem, at};
use super::registers::PIN;
use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;

/// Fields of the vCPU that only translated code and its run loop use. Addresses are numbers here, so that a vCPU can
/// change threads; those into other allocations are set anew on every entry. What is used most comes last, next to
/// [`Cpu::regs`].
#[derive(Debug)]
#[repr(C)]
pub struct State {
    /// The exception with which a region was left.
    pub(super) exception: Option<Exception>,
    /// Instructions handed to the interpreter from translated code.
    pub(super) interpreted: u64,
    /// Instructions retired when the budget is used up.
    pub(super) end: u64,
    /// Where to enter.
    pub(super) entry: u64,
    /// Address of the function that runs an instruction's handler.
    pub(super) interpret: u64,
    /// Address of the operations that handlers are given.
    pub(super) sites: u64,
    /// Host address of a stack slot that has been checked.
    pub(super) slot: u64,
    /// The host's stack pointer while no call of the guest is remembered.
    pub(super) base: u64,
    /// Address of the guest's vector registers when they are not in the host's.
    pub(super) vectors: u64,
    /// The link or site through which a region was left.
    pub(super) link: u32,
    /// The highest level at which vector instructions may run as they are.
    pub(super) passing: u32,
    /// Address of the table of jump targets.
    pub(super) jumps: u64,
    /// What the host's stack and the run loop rely on: mode, privilege, TLB generation.
    pub(super) context: u64,
    /// Table of the soft TLB for instruction fetches by the current privilege.
    pub(super) fetch_table: u64,
    /// Which vector registers are in the host's: a [`crate::vector::pass::Level`], or 0.
    pub(super) level: u64,
    /// Table of the soft TLB for reads by the current class.
    pub(crate) read_table: u64,
    /// Table for writes.
    pub(crate) write_table: u64,
    /// Linear address of the guest page whose code runs.
    pub(super) page: u64,
    /// Instructions that may still be executed. Taken off by a unit when it is entered.
    pub(super) budget: i64,
}

impl State {
    /// Nothing set.
    pub fn new() -> Self {
        Self {
            exception: None,
            interpreted: 0,
            end: 0,
            entry: 0,
            interpret: 0,
            sites: 0,
            slot: 0,
            base: 0,
            vectors: 0,
            link: 0,
            passing: 0,
            jumps: 0,
            context: 0,
            fetch_table: 0,
            level: 0,
            read_table: 0,
            write_table: 0,
            page: 0,
            budget: 0,
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// Which tables the soft TLB answers from; called where the class, the privilege or the address space changes.
    #[inline(always)]
    pub(crate) fn select_tables(&mut self) {
        (self.translated.read_table, self.translated.write_table) = self.tlb.tables(self.class);
        self.translated.fetch_table = self.tlb.fetch_table(self.cpl == 3);
    }

    /// What a jump target depends on besides its address.
    #[inline(always)]
    pub(super) fn jump_context(&self) -> u64 {
        u64::from(self.tlb.generation(self.cpl == 3)) << 32
            | 1 << 4
            | u64::from(self.cpl == 3) << 2
            | self.code_size as u64
    }
}

/// A field's distance from `Cpu::regs`, which the pinned register points at.
const fn distance(offset: usize) -> i32 {
    offset as i32 - offset_of!(Cpu, regs) as i32
}

// The fields used most are within reach of a one-byte displacement.
const _: () = assert!(distance(offset_of!(Cpu, translated) + offset_of!(State, context)) >= -128);

macro_rules! fields {
    ($($name:ident),* $(,)?) => {$(
        pub(in super::super) fn $name() -> Mem {
            at(PIN, distance(offset_of!(Cpu, translated) + offset_of!(State, $name)))
        }
    )*};
}

/// Fields as operands.
pub(super) mod field {
    use super::*;

    fields!(
        read_table,
        write_table,
        budget,
        page,
        jumps,
        fetch_table,
        entry,
        slot,
        interpret,
        link,
        base,
        vectors,
        level,
        passing
    );

    /// A guest register's slot.
    pub(in super::super) fn register(number: u8) -> Mem {
        at(PIN, 8 * i32::from(number))
    }

    /// RIP.
    pub(in super::super) fn rip() -> Mem {
        at(PIN, 8 * RIP as i32)
    }

    /// The arithmetic flags, 16 bits.
    pub(in super::super) fn status() -> Mem {
        at(PIN, distance(offset_of!(Cpu, status)))
    }

    /// The base that a segment adds.
    pub(in super::super) fn segment_base(segment: u8) -> Mem {
        at(PIN, distance(offset_of!(Cpu, bases)) + 8 * i32::from(segment))
    }
}
