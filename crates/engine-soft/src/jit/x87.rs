//! The x87 unit: what it records of its instructions, and its control word.
//!
//! The guest's x87 state is in the host's unit, once some instruction has wanted it, until the run loop takes it out. So x87 and MMX
//! instructions are executed as they are, as long as no exception is pending; whether that is so is a field
//! of the vCPU, looked at once along a run of instructions as for vector registers. Where it is not so, the interpreter executes them.
//!
//! An exception that the guest does not mask is pending behind the instruction that has raised it, and is delivered by the next that waits
//! for such (SDM 1 8.6). What the unit records of it is told by the operand's address, and so by registers that may change until then. So where some
//! exception is not masked ([`X87::Unmasked`]), code must be *careful*: behind each operation it has an FWAIT. At that the host's
//! processor raises the exception, and what there is to do is done by [`super::unmasked`]: the guest's exception is pending then, the interpreter goes on,
//! and there it is delivered where it is to be. Code is careful from when it is found to run so, all code of its page and for as long as there is
//! code for it, whoever runs it: an FWAIT takes two cycles, and hardly any code is run both ways.
//!
//! The unit records where its last operation was, and that operation's operand in memory (SDM 1 8.1.8), as far as the processor does
//! ([`crate::vector::Quirks`]). The guest must find its own addresses there, so translated code writes them. Only handlers and whoever runs
//! translated code look at the record. So along instructions that lead to neither, [`Emitter::record`] says which operation is the last,
//! and it is written at the end; and on the ways out where an access fails, which are rarely taken. The address of an operand in
//! memory, which most processors record for unmasked exceptions only, is written at once.

use ringfence_x86::SegmentRegister;

use super::asm::{Imm, Reg, Two, at, cc};
use super::emit::Emitter;
use super::helper::marks;
use super::native::Kind;
use super::registers::{A, B, PIN};
use super::state::field;
use super::unmasked::Raiser;
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
        let missing = if self.source.careful {
            self.a.test_byte(field::x87(), X87::PASS);
            self.a.jcc(cc::E)
        } else {
            self.a.imm_mem(Imm::Cmp, field::x87(), X87::Ready as i32);
            self.a.jcc(cc::NE)
        };
        (self.host_flags, self.units.x87) = (false, true);
        let id = self.site_back(step, |site| site.marks = site.marks & marks::CAREFUL | side.marks());
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

    /// A look, behind step `i`, at whether it has raised an exception that is not masked, in careful code.
    pub(super) fn check_raised(&mut self, i: usize) -> Option<()> {
        if self.source.careful {
            let site = self.site(i);
            let raiser = Raiser::x87(u32::try_from(site).ok()?);
            self.add_point(raiser)?;
            self.a.bytes(&[0x9b]); // fwait
        }
        Some(())
    }

    /// FLDCW of a word that leaves [`VectorUnit::passes`] as it is: one that masks all exceptions, in careful code also one that does not
    /// where all were not before.
    ///
    /// [`VectorUnit::passes`]: crate::vector::VectorUnit::passes
    pub(super) fn load_control(&mut self, i: usize) -> Option<()> {
        let passed = self.at(i).0.facts.passed?;
        self.want(passed.units, i);
        self.keep_flags(i);
        let (check, mut sites) = self.find_read(i, 2)?;
        // Another processor may change it in memory.
        self.a.load_word(B, at(A, 0));
        self.a.store_word(B, field::x87_control());
        self.a.imm(Imm::And, false, B, EXCEPTIONS);
        self.a.imm(Imm::Cmp, false, B, EXCEPTIONS);
        if self.source.careful {
            // What the field is to say of the new word.
            self.a.bytes(&[0x45, 0x19, 0xc0 | (B.0 & 7) << 3 | B.0 & 7]); // sbb B, B
            self.a.imm(Imm::And, false, B, X87::Unmasked as i32 - X87::Ready as i32);
            self.a.imm(Imm::Add, false, B, X87::Ready as i32);
            self.a.rm(Two::Cmp, B, field::x87());
        }
        sites.push(self.a.jcc(cc::NE));
        let control = field::x87_control();
        // D9 /5 (SDM 2A, FLDCW).
        self.a.bytes(&[0x41, 0xd9, 0x80 | 5 << 3 | PIN.0 & 7]);
        self.a.bytes(&control.disp.to_le_bytes());
        self.slow_unless_covered(i, check);
        self.slow(i, sites);
        if self.source.careful {
            // What it unmasks was raised by this or an earlier one.
            self.settle_record(A);
        }
        self.check_raised(i)
    }
}

/// The exceptions' masks in the control word.
const EXCEPTIONS: i32 = 0x3f;
