//! The modes whose code is translated.
//!
//! 64-bit code always is. 32-bit code is where it sees memory as one flat space, as everything compiled for 32 bits does: CS, DS, ES and
//! SS span all 4 GiB from 0, and the stack pointer has 32 bits. In compatibility mode and in protected mode it is the same then. FS and GS
//! may be anything. All this is looked at wherever translated code is entered or goes on after an instruction that may have
//! changed it; it is part of what the targets of branches depend on (`Cpu::jump_context_of`).

use ringfence_memory::GuestAddress;
use ringfence_x86::SegmentRegister;

use super::asm::{Mem, Reg, Two};
use super::emit::Emitter;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::{CodeSize, Cpu};
use crate::interp::op::Op;

/// A mode whose code is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// Flat 32-bit code.
    Flat32 = 1,
    /// 64-bit code.
    Bits64 = 2,
}

impl Mode {
    /// Code in this mode at a physical address.
    pub(super) fn at(self, address: GuestAddress) -> CodeAddress {
        CodeAddress::new(address, self == Self::Flat32)
    }
}

impl Cpu {
    /// The mode, if its code is translated.
    #[inline(always)]
    pub(crate) fn mode(&self) -> Option<Mode> {
        match self.code_size {
            CodeSize::Bits64 => Some(Mode::Bits64),
            CodeSize::Bits32 if self.is_flat() => Some(Mode::Flat32),
            _ => None,
        }
    }

    /// Whether 32-bit code sees memory as one flat space. Above the 32 bits of the stack pointer there is nothing, so that it need not be
    /// cut at every use; 32-bit code never puts anything there.
    fn is_flat(&self) -> bool {
        const READABLE: u8 = 1;
        const BOTH: u8 = 3;
        let is = |segment: SegmentRegister, rights| self.flat[segment as usize] & rights == rights;
        is(SegmentRegister::Cs, READABLE)
            && is(SegmentRegister::Ss, BOTH)
            && is(SegmentRegister::Ds, BOTH)
            && is(SegmentRegister::Es, BOTH)
            && self.stack_mask == 0xffff_ffff
            && self.protected()
            && self.regs[4] >> 32 == 0
    }
}

impl Emitter<'_> {
    /// Whether the region is 32-bit code.
    #[inline(always)]
    pub(super) fn is_narrow(&self) -> bool {
        self.source.address.is_narrow()
    }

    /// Bytes of a pointer, and of what PUSH and POP move.
    #[inline(always)]
    pub(super) fn word(&self) -> i32 {
        if self.is_narrow() { 4 } else { 8 }
    }

    /// The mask that whole addresses pass through.
    #[inline(always)]
    pub(super) fn whole_mask(&self) -> u64 {
        if self.is_narrow() { 0xffff_ffff } else { u64::MAX }
    }

    /// Whether the operand in memory is at its effective address, which is a whole one: no segment has a say.
    pub(super) fn is_plain(&self, op: &Op) -> bool {
        const CS: u8 = SegmentRegister::Cs as u8;
        const FS: u8 = SegmentRegister::Fs as u8;
        const GS: u8 = SegmentRegister::Gs as u8;
        op.address_mask == self.whole_mask() && !matches!(op.segment, CS | FS | GS)
    }

    /// LEA as wide as addresses are: 32-bit ones wrap.
    #[inline(always)]
    pub(super) fn lea(&mut self, to: Reg, mem: Mem) {
        if self.is_narrow() { self.a.rm32(Two::Lea, to, mem) } else { self.a.rm(Two::Lea, to, mem) }
    }

    /// Loads what is as wide as a pointer.
    #[inline(always)]
    pub(super) fn load_pointer(&mut self, to: Reg, mem: Mem) {
        if self.is_narrow() { self.a.rm32(Two::Load, to, mem) } else { self.a.rm(Two::Load, to, mem) }
    }

    /// Stores what is as wide as a pointer.
    #[inline(always)]
    pub(super) fn store_pointer(&mut self, from: Reg, mem: Mem) {
        if self.is_narrow() { self.a.rm32(Two::Store, from, mem) } else { self.a.rm(Two::Store, from, mem) }
    }

    /// Copies as much of a register as a pointer is wide.
    #[inline(always)]
    pub(super) fn copy_pointer(&mut self, to: Reg, from: Reg) {
        if self.is_narrow() { self.a.rr32(Two::Load, to, from) } else { self.a.copy(to, from) }
    }
}
