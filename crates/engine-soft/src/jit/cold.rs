//! Code out of the way: what is rarely executed lies behind all that is often executed.

use std::ops::Range;

use super::asm::Imm;
use super::emit::{Emitter, load_flags};
use super::native::Kind;
use super::registers::A;
use super::special::StackCheck;
use super::state::field;
use super::stubs::pack_unit;
use super::vector::Side;
use crate::vector::pass::Level;

/// Code out of the way.
#[derive(Debug)]
pub(super) enum Cold {
    /// The instruction by its handler.
    Slow {
        /// Branches that lead here, in `misses`.
        sites: Range<usize>,
        /// Which step.
        step: usize,
        /// Where to go on.
        back: usize,
        /// The host's flags are expected to be the guest's there.
        restore: bool,
        /// Vector registers are expected to be in the host's there.
        level: Option<Level>,
    },
    /// The stack is not in the page that it was in. Then, where it cannot be brought into place, the instruction by its
    /// handler.
    Stack {
        site: usize,
        step: usize,
        /// Where to go on with the check, and behind the instruction.
        back: (usize, usize),
        /// The last offset in a page at which the access fits.
        limit: i32,
        restore: bool,
        level: Option<Level>,
    },
    /// The steps of a row, each with its own check.
    Apart {
        sites: Range<usize>,
        /// The check of the stack, tried again first.
        stack: Option<StackCheck>,
        steps: Range<usize>,
        /// Where to go on.
        back: usize,
        /// Where the flags are before and behind: in the host's, in the vCPU.
        before: (bool, bool),
        behind: (bool, bool),
        /// Which vector registers are in the host's, before and behind.
        level: (Option<Level>, Option<Level>),
    },
    /// A conditional branch that is taken.
    Side {
        site: usize,
        /// Offset of the target from the page's start, and the step there if it is in the region.
        target: i64,
        inside: Option<usize>,
        /// The host's flags must be stored first.
        save: bool,
        /// Instructions of the unit not executed.
        refund: u16,
    },
    /// A unit that the budget does not cover.
    Exceeded { site: usize, step: usize },
    /// Brings vector registers into the host's for a step.
    Load { site: usize, level: Level, step: usize, side: Side, back: usize },
    /// The way of a link, by its index in `links`, while it leads nowhere.
    Unlinked { link: usize },
    /// An indirect branch whose cell does not know the target.
    Cell { sites: [usize; 2], cell: usize, step: usize, back: usize },
    /// The only instruction ends in another page than it did.
    OtherSecond { sites: [usize; 2] },
    /// A return that does not match the call on top.
    Return { site: usize, step: usize },
}

impl Emitter<'_> {
    /// Notes branches that lead to code out of the way.
    pub(super) fn missed(&mut self, sites: impl IntoIterator<Item = usize>) -> Range<usize> {
        let start = self.misses.len();
        self.misses.extend(sites);
        start..self.misses.len()
    }

    /// Makes such branches lead here.
    fn bind_missed(&mut self, sites: Range<usize>) {
        for &site in &self.misses[sites] {
            self.a.bind(site);
        }
    }

    /// Branches taken: out of the way, but not rare.
    pub(super) fn emit_sides(&mut self) {
        let mut sides = std::mem::take(&mut self.sides);
        for side in sides.drain(..) {
            self.emit_one_cold(side);
        }
        self.sides = sides;
    }

    pub(super) fn emit_cold(&mut self) {
        while let Some(cold) = self.cold.pop().or_else(|| self.sides.pop()) {
            self.emit_one_cold(cold);
        }
    }

    fn emit_one_cold(&mut self, cold: Cold) {
        match cold {
            Cold::Apart { sites, stack, steps, back, before, behind, level } => {
                if let Some(StackCheck { site, back, limit }) = stack {
                    self.cold_stack(site, limit, back);
                }
                self.bind_missed(sites);
                (self.host_flags, self.stored_flags) = before;
                self.level = level.0;
                let last = steps.end - 1;
                let mut open = true;
                for i in steps {
                    open = self.step(i).open;
                }
                if !open {
                    return;
                }
                if self.source.steps[last].kind == Kind::Call {
                    // Its return comes here.
                    self.go_on(last);
                    return;
                }
                if behind.1 {
                    self.save_flags();
                }
                if let Some(level) = level.1
                    && self.level != Some(level)
                {
                    self.save_flags();
                    self.load_level(level, last, Side::Behind);
                }
                if behind.0 {
                    self.restore_flags(A);
                }
                self.a.jmp_to(back as i64);
            }
            Cold::Slow { sites, step, back, restore, level } => {
                self.bind_missed(sites);
                self.call_handler(step);
                if self.ends(step) {
                    self.follow_rip();
                    return;
                }
                if let Some(level) = level {
                    self.stored_flags = true;
                    self.load_level(level, step, Side::Behind);
                }
                if restore {
                    load_flags(&mut self.a, A);
                }
                self.a.jmp_to(back as i64);
            }
            Cold::Side { site, target, inside, save, refund } => {
                self.a.bind(site);
                self.stored_flags = !save;
                self.save_flags();
                self.stored_flags = true;
                if refund != 0 {
                    self.a.imm_mem(Imm::Add, field::budget(), refund.into());
                }
                match inside {
                    Some(step) => {
                        let site = self.a.jmp();
                        self.lead_to_label(site, step);
                    }
                    None => self.exit_to(target),
                }
            }
            Cold::Stack { site, step, back, limit, restore, level } => {
                self.cold_stack(site, limit, back.0);
                self.emit_one_cold(Cold::Slow { sites: 0..0, step, back: back.1, restore, level });
            }
            Cold::Exceeded { site, step } => {
                let step = &self.source.steps[step];
                self.a.bind(site);
                self.a.constant(A, pack_unit(step.start(), step.unit));
                self.jump_out(self.stubs.budget);
            }
            Cold::Load { site, level, step, side, back } => self.cold_load(site, level, step, side, back),
            Cold::Unlinked { link } => self.unlinked(link),
            Cold::Cell { sites, cell, step, back } => self.cold_cell(sites, cell, step, back),
            Cold::OtherSecond { sites } => {
                for site in sites {
                    self.a.bind(site);
                }
                self.a.constant(A, self.source.address.page_offset());
                self.jump_out(self.stubs.by_interpreter);
            }
            Cold::Return { site, step } => self.cold_return(site, step),
        }
    }
}
