//! Code out of the way: what is rarely executed lies behind all that is often executed.
//!
//! Nearly all of it says what it is about, by the number of a record, and goes to fixed code ([`super::misses`]). Most of it is never
//! executed, so what can be worked out when it is does not take memory and time before.

use std::ops::Range;

use super::asm::{CONSTANT_AND_JUMP, Imm, Reg, cc};
use super::emit::Emitter;
use super::registers::{A, BUDGET, C};
use super::stubs::{load_table, pack_unit};

/// A way to fixed code.
#[derive(Debug)]
pub(super) struct Fixed {
    /// Branches that lead here, in `misses`.
    sites: Range<usize>,
    /// What the fixed code wants to know, and in which register.
    number: u32,
    register: Reg,
    /// Where the code is in the arena.
    stub: usize,
    /// The step that is to be recorded first ([`super::x87`]).
    record: Option<usize>,
}

/// A conditional branch that is taken.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) site: usize,
    /// Offset of the target from the page's start, and the step there if it is in the region.
    pub(super) target: i64,
    pub(super) inside: Option<usize>,
    /// The host's flags must be stored first.
    pub(super) save: bool,
    /// Instructions of the unit not executed.
    pub(super) refund: u16,
    /// The soft TLB's table must be loaded.
    pub(super) table: bool,
}

impl Emitter<'_> {
    /// Makes branches lead out of the way, to fixed code.
    pub(super) fn lead_to_fixed(
        &mut self,
        sites: impl IntoIterator<Item = usize>,
        stub: usize,
        register: Reg,
        number: u64,
    ) {
        let start = self.misses.len();
        self.misses.extend(sites);
        // Numbers of records: there is no memory for more.
        let number = number as u32;
        let (sites, record) = (start..self.misses.len(), self.record);
        self.fixed.push(Fixed { sites, number, register, stub, record });
    }

    /// Takes the unit that starts with step `i` off the budget, and leads elsewhere if that does not cover it.
    pub(super) fn take_off_budget(&mut self, i: usize) {
        let step = &self.source.steps[i];
        // Processors take a subtraction and JL for one operation, unlike JS.
        self.a.imm(Imm::Sub, true, BUDGET, i32::from(step.unit));
        let site = self.a.jcc(cc::L);
        let number = pack_unit(step.start(), step.unit);
        self.lead_to_fixed([site], self.stubs.budget, A, number);
    }

    /// Branches taken: out of the way, but not rare.
    pub(super) fn emit_sides(&mut self) {
        let mut sides = std::mem::take(&mut self.sides);
        for Side { site, target, inside, save, refund, table } in sides.drain(..) {
            self.a.bind(site);
            self.stored_flags = !save;
            self.save_flags();
            self.stored_flags = true;
            if table {
                load_table(&mut self.a);
            }
            if refund != 0 {
                self.a.imm(Imm::Add, true, BUDGET, refund.into());
            }
            match inside {
                Some(step) => {
                    let site = self.a.jmp();
                    self.lead_to_label(site, step);
                }
                None => self.exit_to(target),
            }
        }
        self.sides = sides;
    }

    /// The ways of links that lead nowhere yet, or not for certain.
    pub(super) fn emit_unlinked(&mut self) {
        for link in 0..self.links.len() {
            self.unlinked(link);
        }
    }

    /// The ways to fixed code on which something is to be recorded first. They must come before the others, as their length
    /// is not known.
    pub(super) fn emit_recorded(&mut self) {
        let mut fixed = std::mem::take(&mut self.fixed);
        fixed.retain(|Fixed { sites, number, register, stub, record }| {
            if record.is_none() {
                return true;
            }
            for at in sites.clone() {
                self.a.bind(self.misses[at]);
            }
            self.record = *record;
            self.settle_record(C);
            load_table(&mut self.a);
            self.a.constant(*register, (*number).into());
            self.jump_out(*stub);
            false
        });
        self.fixed = fixed;
    }

    /// Bytes of all other ways to fixed code.
    pub(super) fn length_of_fixed(&self) -> usize {
        self.fixed.len() * CONSTANT_AND_JUMP
    }

    /// The other ways to fixed code. What lies behind `split` bytes has been `moved` by that many, and so are they.
    pub(super) fn emit_fixed(&mut self, split: usize, moved: i64) {
        for Fixed { sites, number, register, stub, .. } in &self.fixed {
            let at = self.a.here() as i64;
            for &site in &self.misses[sites.clone()] {
                let apart = if site < split { moved } else { 0 };
                self.a.displace(site, at + apart - (site as i64 + 4));
            }
            self.a.constant_and_jump(*register, *number, *stub as i64 - self.base as i64 - moved);
        }
    }
}
