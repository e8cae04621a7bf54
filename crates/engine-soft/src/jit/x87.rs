//! The x87 unit: what it records of its instructions, and its control word.
//!
//! The guest's x87 state is in the host's unit, once some instruction has wanted it, until the run loop takes it out. So x87 and MMX
//! instructions are executed as they are, as long as none of them can raise an exception ([`X87::Ready`]); whether that is so is a field
//! of the vCPU, looked at once along a run of instructions as for vector registers. Where it is not so, handlers execute them.
//!
//! The unit records where its last operation was, and that operation's operand in memory (SDM 1 8.1.8), as far as the processor does
//! ([`crate::vector::Quirks`]). The guest must find its own addresses there, so translated code writes them. Only handlers and whoever runs
//! translated code look at the record. So along instructions that lead to neither, [`Emitter::record`] says which operation is the last,
//! and it is written at the end; and on the ways out where an access fails, which are rarely taken. The address of an operand in
//! memory, which most processors record for unmasked exceptions only, is written at once.

use ringfence_x86::SegmentRegister;

use super::asm::{Imm, Reg, Two, at, cc};
use super::emit::Emitter;
use super::native::Kind;
use super::registers::{A, B, PIN};
use super::state::field;
use super::vector::Side;
use crate::vector::ops::recorded_opcode;
use crate::vector::pass::{X87, offset};

/// Whether nothing can look at the x87 unit's record along an instruction, other than by the ways of
/// [`Emitter::lead_to_fixed`].
pub(super) fn carries_record(kind: Kind) -> bool {
    use Kind as K;
    matches!(
        kind,
        K::Same
            | K::Vector
            | K::LoadControl
            | K::Address
            | K::Nothing
            | K::Push
            | K::Pop
            | K::Divide
            | K::DivideSigned
    )
}

impl Emitter<'_> {
    /// Brings the x87 state into the host's unit where it may not be there. Flags are stored.
    pub(super) fn load_x87(&mut self, step: usize, side: Side) {
        self.a.imm_mem(Imm::Cmp, field::x87(), X87::Ready as i32);
        let missing = self.a.jcc(cc::NE);
        (self.host_flags, self.units.x87) = (false, true);
        let id = self.site_back(step, |site| site.marks = side.marks());
        self.lead_to_fixed([missing], self.stubs.misses.load_x87, A, id);
    }

    /// Whether the address of the operand in memory of step `i` is recorded.
    pub(super) fn records_address(&self, i: usize) -> bool {
        let facts = &self.at(i).0.facts;
        self.stubs.quirks.tracks_data
            && facts.memory.is_some()
            && facts.passed.is_some_and(|passed| passed.records)
    }

    /// Step `i`, which has been executed, is what the unit's record is about from now on. Uses [`A`] and [`B`], outside of rows; changes no
    /// flag.
    pub(super) fn recorded(&mut self, i: usize) -> Option<()> {
        self.record = Some(i);
        if self.records_address(i) {
            let (step, op) = self.at(i);
            let (next, op) = (step.next, *op);
            self.effective_address(A, &op, next, false)?;
            self.a.rm(Two::Store, A, field::x87_record(offset::FDP));
            // Otherwise it is zero.
            if self.stubs.quirks.tracks_selectors {
                self.a.load_word(A, field::selector(op.segment));
                self.a.store_word(A, field::x87_record(offset::FDS));
            }
        }
        Some(())
    }

    /// Writes what is to be recorded. Uses `scratch`; changes no flag.
    pub(super) fn settle_record(&mut self, scratch: Reg) {
        let Some(i) = self.record.take() else { return };
        let (step, op) = self.at(i);
        self.a.rm(Two::Load, scratch, field::page());
        match step.start() as i32 {
            0 => {}
            start => self.a.rm(Two::Lea, scratch, at(scratch, start)),
        }
        self.a.rm(Two::Store, scratch, field::x87_record(offset::FIP));
        if self.stubs.quirks.tracks_selectors {
            self.a.load_word(scratch, field::selector(SegmentRegister::Cs as u8));
            self.a.store_word(scratch, field::x87_record(offset::FCS));
        }
        if self.stubs.quirks.tracks_opcode {
            self.a.constant(scratch, recorded_opcode(op).into());
            self.a.store_word(scratch, field::x87_record(offset::FOP));
        }
    }

    /// FLDCW of a word that masks all exceptions.
    pub(super) fn load_control(&mut self, i: usize) -> Option<()> {
        let passed = self.at(i).0.facts.passed?;
        self.want(passed.units, i);
        self.keep_flags(i);
        let mut sites = Vec::new();
        let check = match self.on_stack(i, 1) {
            Some(distance) => Some(self.check_stack(distance, 2)),
            None => {
                self.address(i)?;
                sites.push(self.check(2, 1, false));
                None
            }
        };
        // Another processor may change it in memory.
        self.a.load_word(B, at(A, 0));
        self.a.store_word(B, field::x87_control());
        self.a.imm(Imm::And, false, B, EXCEPTIONS);
        self.a.imm(Imm::Cmp, false, B, EXCEPTIONS);
        sites.push(self.a.jcc(cc::NE));
        let control = field::x87_control();
        // D9 /5 (SDM 2A, FLDCW).
        self.a.bytes(&[0x41, 0xd9, 0x80 | 5 << 3 | PIN.0 & 7]);
        self.a.bytes(&control.disp.to_le_bytes());
        self.slow_unless_covered(i, check);
        self.slow(i, sites);
        Some(())
    }
}

/// The exceptions' masks in the control word.
const EXCEPTIONS: i32 = 0x3f;
