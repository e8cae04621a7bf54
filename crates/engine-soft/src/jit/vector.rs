//! Vector instructions: executed as they are, on the guest's registers in the host's.
//!
//! The guest's vector registers are brought into the host's where the first instruction wants them, and taken out before
//! anything of Rust runs (see the fixed code). Which are there is a field of the vCPU; within a run of instructions the
//! emitter knows it and need not look.

use super::asm::{Imm, cc};
use super::emit::Emitter;
use super::helper::marks;
use super::registers::A;
use super::state::field;
use crate::vector::pass::Level;

/// Where the code is that wants vector registers, as seen from a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Before,
    Behind,
}

impl Emitter<'_> {
    pub(super) fn vector(&mut self, i: usize) -> Option<()> {
        let passed = self.at(i).0.facts.passed?;
        if !self.has_level(passed.level) {
            if self.group.is_some() {
                return None;
            }
            self.want_level(passed.level, i);
        }
        self.place(i, passed.alignment)
    }

    fn has_level(&self, level: Level) -> bool {
        self.level.is_some_and(|known| known >= level)
    }

    /// Makes sure in front of step `i` that vector registers are in the host's. Uses `A`; changes flags.
    pub(super) fn want_level(&mut self, level: Level, i: usize) {
        if !self.has_level(level) {
            self.keep_flags(i);
            self.load_level(level, i, Side::Before);
        }
    }

    /// Loads vector registers where they may be in the vCPU. Flags are stored.
    pub(super) fn load_level(&mut self, level: Level, step: usize, side: Side) {
        self.a.imm_mem32(Imm::Cmp, field::level(), level as i32);
        let missing = self.a.jcc(cc::B);
        (self.host_flags, self.level) = (false, Some(level));
        // Where they may not be loaded, the region is left in front of the step, with its handler's help, or behind it.
        let id = self.site_back(step, |site| {
            site.marks = if side == Side::Before { marks::ENDS } else { marks::DONE }
        });
        self.lead_to_fixed([missing], self.stubs.misses.load, A, id);
    }
}
