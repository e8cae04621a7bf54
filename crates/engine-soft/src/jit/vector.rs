//! Vector instructions: executed as they are, on the guest's registers in the host's.
//!
//! The guest's vector registers are brought into the host's where the first instruction wants them, and taken out before
//! anything of Rust runs (see the fixed code). Which are there is a field of the vCPU; within a run of instructions the
//! emitter knows it and need not look.

use iced_x86::{Code, OpKind, Register};

use super::asm::{Imm, RDI, Two, cc};
use super::emit::Emitter;
use super::helper::marks;
use super::operand::{CS, FS, GS};
use super::registers::{A, B};
use super::state::field;
use crate::interp::op::{Op, ZERO};
use crate::vector::pass::{Level, Units};

/// Where the code is that wants vector registers or the x87 unit, as seen from a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Before,
    Behind,
}

impl Side {
    /// Marks of the site for where they may not be had: the region is left in front of the step, with its handler's help, or behind it.
    pub(super) fn marks(self) -> u8 {
        if self == Self::Before { marks::ENDS } else { marks::DONE }
    }
}

/// RDI.
const DESTINATION: u8 = 7;

impl Emitter<'_> {
    pub(super) fn vector(&mut self, i: usize) -> Option<()> {
        let passed = self.at(i).0.facts.passed?;
        if self.group.is_some() && !self.units.cover(passed.units) {
            return None;
        }
        if passed.raises && self.record.is_some() {
            if self.keeps() {
                return None;
            }
            self.settle_record(if self.keeps_address() { B } else { A });
        }
        self.want(passed.units, i);
        if self.is_narrow() && self.at(i).1.code == Code::VEX_Vzeroupper {
            self.clear_upper_halves();
            return Some(());
        }
        self.place(i, passed.alignment)?;
        if passed.records {
            self.recorded(i)?;
            self.check_raised(i)?;
        }
        Some(())
    }

    /// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: as they are, with RDI at the host's address. All of the operand must be writable, as by the handler.
    pub(super) fn masked_bytes(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let segment = match op.segment {
            FS | GS if self.is_narrow() => return None,
            FS | GS => Some(op.segment),
            CS => return None,
            _ => None,
        };
        let passed = step.facts.passed?;
        let (next, op) = (step.next, Op { base: DESTINATION, index: ZERO as u8, displacement: 0, ..*op });
        self.want(passed.units, i);
        self.keep_flags(i);
        self.effective_address(A, &op, next, false)?;
        if let Some(segment) = segment {
            self.a.rm(Two::Add, A, field::segment_base(segment));
        }
        let size = if passed.units.x87 { 8 } else { 16 };
        let miss = self.check(size, 1, true);
        let mut instruction = self.source.instruction(i);
        instruction.set_op0_kind(OpKind::MemorySegRDI);
        instruction.set_segment_prefix(Register::None);
        self.a.exchange(A, RDI);
        self.encode(&instruction)?;
        self.a.exchange(A, RDI);
        self.slow(i, [miss]);
        Some(())
    }

    /// VZEROUPPER of 32-bit code, which has eight registers: a move of 128 bits clears what is above (SDM 2A 2.3.10).
    fn clear_upper_halves(&mut self) {
        for register in 0..8 {
            self.a.bytes(&[0xc5, 0xf8, 0x28, 0xc0 | register << 3 | register]); // vmovaps
        }
    }

    /// Makes sure in front of step `i` that all of this is in the host's registers. Uses `A`; changes flags.
    pub(super) fn want(&mut self, units: Units, i: usize) {
        if !self.units.cover(units) {
            self.keep_flags(i);
            self.load(units, i, Side::Before);
        }
    }

    /// Loads what may be missing. Flags are stored.
    pub(super) fn load(&mut self, units: Units, step: usize, side: Side) {
        if let Some(level) = units.level.filter(|&level| self.units.level < Some(level)) {
            self.load_level(level, step, side);
        }
        if units.x87 && !self.units.x87 {
            self.load_x87(step, side);
        }
    }

    fn load_level(&mut self, level: Level, step: usize, side: Side) {
        self.a.imm_mem32(Imm::Cmp, field::level(), level as i32);
        let missing = self.a.jcc(cc::B);
        (self.host_flags, self.units.level) = (false, Some(level));
        let id = self.site_back(step, |site| site.marks = side.marks());
        self.lead_to_fixed([missing], self.stubs.misses.load, A, id);
    }
}
