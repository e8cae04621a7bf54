//! LDMXCSR.
//!
//! Where the guest's vector registers are in the host's, so is its MXCSR. The register file has it as well, with what handlers want of
//! it: that depends on the controls alone, which nothing else changes.

use super::asm::{Imm, Two, at, cc};
use super::emit::Emitter;
use super::registers::{A, B, C};
use super::state::field;
use super::stubs::{load_table, mxcsr};
use crate::vector::pass::{mxcsr_bits, offset};

impl Emitter<'_> {
    /// LDMXCSR and VLDMXCSR of a value whose upper half is zero: all bits of the lower one are defined (SDM 1 10.2.3), and of the upper
    /// one some processors have one.
    pub(super) fn load_mxcsr(&mut self, i: usize) -> Option<()> {
        let passed = self.at(i).0.facts.passed?;
        self.want(passed.units, i);
        self.keep_flags(i);
        let (check, mut sites) = self.find_read(i, 4)?;
        // Another processor may change it in memory.
        self.a.rm32(Two::Load, B, at(A, 0));
        self.a.test_imm(B, !0xffff);
        sites.push(self.a.jcc(cc::NE));
        self.a.rm(Two::Load, A, field::vectors());
        self.a.rm32(Two::Store, B, at(A, offset::MXCSR));
        mxcsr(&mut self.a, false, offset::MXCSR);
        self.a.rr32(Two::Load, C, B);
        self.a.imm(Imm::And, false, C, !(mxcsr_bits::FLAGS as i32));
        self.a.rm32(Two::Store, C, at(A, offset::MXCSR_RUN));
        self.a.imm(Imm::And, false, B, mxcsr_bits::MASKS as i32);
        self.a.imm(Imm::Xor, false, B, mxcsr_bits::MASKS as i32);
        self.a.shr32(B, 7);
        self.a.rm32(Two::Store, B, at(A, offset::MXCSR_UNMASKED));
        load_table(&mut self.a);
        self.slow_unless_covered(i, check);
        self.slow(i, sites);
        Some(())
    }
}
