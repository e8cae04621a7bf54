//! The second code of a loop ([`super::loops`]): laps without checks.

use std::ops::Range;

use iced_x86::{Code, Instruction};

use super::asm::{Imm, Mem, Reg, Two, at, cc};
use super::emit::Emitter;
use super::kept::named;
use super::loops::Loop;
use super::native::Kind;
use super::registers::{A, B, BUDGET, C, Home, home, sized};
use super::span::{MOST_STEPS, STACK_POINTER, Span};
use super::state::field;
use super::stubs::{data_entry, load_table};
use crate::interp::op::RIP;

/// How a second code is emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Laps {
    /// None is.
    None,
    /// Distances are in the vCPU; the one in use is in [`A`], the other scratch registers are free.
    Shared,
    /// They are in scratch registers, and only there may they be looked for.
    Held,
    /// Likewise, and the soft TLB's table is not in its register.
    WithoutTable,
}

/// Where distances are held.
const HOLDERS: [Reg; 3] = [A, B, C];

/// log2 of the least power of two that is not below a stride.
fn shift_of(stride: i64) -> u8 {
    stride.unsigned_abs().next_power_of_two().trailing_zeros() as u8
}

impl Emitter<'_> {
    /// Emits the second code of all loops.
    pub(super) fn emit_loops(&mut self) {
        self.laps = Laps::Shared;
        for n in 0..self.loops.len() {
            let all = self.loops[n];
            let mark = self.mark();
            self.a.bind(all.site);
            let done = [true, false].into_iter().any(|held| {
                let done = self.emit_laps(&all, held).is_some();
                (self.operand, self.laps) = (None, Laps::Shared);
                if !done {
                    self.take_back(&mark);
                }
                done
            });
            if !done {
                self.lead_to_label(all.site, all.start);
            }
        }
        self.laps = Laps::None;
        self.loops.clear();
    }

    /// `held`: the distances stay in scratch registers, which nothing else wants then.
    fn emit_laps(&mut self, all: &Loop, held: bool) -> Option<()> {
        let counter = all.counter();
        // Two bits of the budget that take on all values in four laps.
        let length = (all.end + 1 - all.start) as u32;
        self.a.test_imm(BUDGET, 3 << length.trailing_zeros());
        self.go_back(all, cc::NE);
        let anew = self.a.here();
        if held && all.row.count > HOLDERS.len() {
            return None;
        }
        let takes_table = held && all.row.count == HOLDERS.len();
        if takes_table {
            load_table(&mut self.a);
        }
        self.enter_laps(all, counter)?;
        if held {
            for (place, reg) in HOLDERS.into_iter().enumerate().take(all.row.count) {
                self.a.rm(Two::Load, reg, field::base_host(place));
            }
            self.laps = if takes_table { Laps::WithoutTable } else { Laps::Held };
        }
        let top = self.a.here();
        if let Some(counter) = counter {
            let register = match home(counter) {
                Home::Host(reg) => reg,
                Home::Slot if held => return None,
                Home::Slot => self.fetch(counter, B),
            };
            self.a.rm(Two::Cmp, register, field::laps_end());
            let site = self.a.jcc(cc::E);
            // Maybe all are at the start of another page.
            self.a.patch(site, anew as i64);
        }
        (self.host_flags, self.stored_flags, self.units) = (false, true, all.row.units);
        let mut i = all.start;
        while i < all.end {
            self.take_unit(i)?;
            let straight = |&n: &usize| n < all.end && self.source.steps[n].kind != Kind::Branch;
            let end = (i..i + MOST_STEPS).take_while(straight).last().map_or(i, |last| last + 1);
            if end == i {
                self.scratch_is_free(i)?;
                self.branch(i)?;
                i += 1;
            } else {
                self.straight_part(all, i..end)?;
                i = end;
            }
        }
        self.take_unit(all.end)?;
        self.end_lap(all, top)
    }

    /// Takes the unit that starts with step `i`, if one does, off the budget.
    fn take_unit(&mut self, i: usize) -> Option<()> {
        if self.source.steps[i].unit != 0 {
            if self.source.wanted_before(i) != 0 {
                if self.laps != Laps::Shared && !self.stored_flags {
                    return None;
                }
                self.save_flags();
            }
            (self.host_flags, self.stored_flags) = (false, true);
            self.take_off_budget(i);
        }
        Some(())
    }

    /// Steps of a lap that come one after another, along which registers are kept.
    fn straight_part(&mut self, all: &Loop, steps: Range<usize>) -> Option<()> {
        let held = self.laps != Laps::Shared;
        if !held {
            self.keep(steps.clone(), true);
        }
        let mut current = None;
        for i in steps.clone() {
            let step = &self.source.steps[i];
            self.keep_for(i, steps.start)?;
            self.operand = None;
            if self.touches_memory(i) {
                let base = self.access(i)?.base;
                let place = all.row.find(base)?;
                if current != Some(place) && !held {
                    self.a.rm(Two::Load, A, field::base_host(place));
                    current = Some(place);
                }
                let index = match all.moving(base) {
                    Some((register, scale)) => Some((self.lap_register(register)?, scale)),
                    None => None,
                };
                let disp = i32::try_from(step.op.displacement).ok()?;
                let holder = if held { HOLDERS[place] } else { A };
                self.operand = Some(Mem { base: Some(holder), index, disp });
            }
            self.scratch_is_free(i)?;
            self.native(i, step.kind)?;
            if step.kind == Kind::Address {
                current = None;
            }
        }
        self.operand = None;
        self.let_go()
    }

    /// The host register that holds a guest register which operands count from.
    fn lap_register(&mut self, number: u8) -> Option<Reg> {
        match home(number) {
            Home::Host(reg) => Some(reg),
            Home::Slot if self.keeps() => self.kept(number, true, false),
            Home::Slot => None,
        }
    }

    /// `None` if step `i` would need a scratch register and all are taken.
    fn scratch_is_free(&self, i: usize) -> Option<()> {
        let step = &self.source.steps[i];
        let branches = step.kind == Kind::Branch;
        let saves = branches && !self.stored_flags && self.source.wanted_at(step.target()) != 0;
        let loads = !self.host_flags && (branches || step.effect.needs_flags(step.wanted));
        let names = step.slots != 0 || named(step) != 0 || usize::from(step.op.base) == RIP;
        (self.laps == Laps::Shared || !(saves || loads || names)).then_some(())
    }

    /// The branch back, in a lap, and what comes behind it.
    fn end_lap(&mut self, all: &Loop, top: usize) -> Option<()> {
        self.scratch_is_free(all.end)?;
        let (step, _) = self.at(all.end);
        let site = self.jump_if(all.end);
        self.a.patch(site, top as i64);
        if self.laps == Laps::WithoutTable {
            load_table(&mut self.a);
        }
        match all.after {
            Some(after) if !step.last => {
                if self.source.wanted_before(all.end + 1) != 0 {
                    self.save_flags();
                }
                let site = self.a.jmp();
                self.a.patch(site, after as i64);
            }
            _ => self.go_on(all.end),
        }
        Some(())
    }

    /// A branch to the first code of a loop.
    fn go_back(&mut self, all: &Loop, condition: u8) {
        let site = self.a.jcc(condition);
        self.lead_to_label(site, all.start);
    }

    /// What comes before the laps: for each base its distance to the host, to the vCPU; and at what value of the counter they end. Flags
    /// are in the vCPU, and vector registers where the lap before, in the first code, has wanted them.
    fn enter_laps(&mut self, all: &Loop, counter: Option<u8>) -> Option<()> {
        let mut limited = false;
        for (place, span) in all.row.spans().iter().enumerate() {
            self.find_distance(all, span)?;
            self.a.rm(Two::Store, A, field::base_host(place));
            if all.stride(span.base) != 0 {
                // The laps behind the first, the least of all bases.
                let more = limited.then(|| {
                    self.a.rm(Two::Cmp, B, field::slot());
                    self.a.jcc(cc::AE)
                });
                self.a.rm(Two::Store, B, field::slot());
                if let Some(more) = more {
                    self.a.bind(more);
                }
                limited = true;
            }
        }
        if let Some(counter) = counter {
            let step = i32::try_from(all.moves[usize::from(counter) % 16]).ok()?;
            self.a.rm(Two::Load, B, field::slot());
            self.a.imm(Imm::Add, true, B, 1);
            let register = sized(B, 8);
            self.encode(&Instruction::with3(Code::Imul_r64_rm64_imm32, register, register, step).ok()?)?;
            let counter = self.fetch(counter, A);
            self.a.rr(Two::Add, B, counter);
            self.a.rm(Two::Store, B, field::laps_end());
        }
        Some(())
    }

    /// What to add to a base, or to its moving register alone, for the address in the host, to [`A`]; and how many laps fit in its page
    /// behind the first, to [`B`], if it moves. Goes to the first code if not even that does.
    fn find_distance(&mut self, all: &Loop, span: &Span) -> Option<()> {
        let lowest = i32::try_from(span.lowest).ok()?;
        let address = self.row_address(span.base, lowest);
        self.a.rm(Two::Lea, A, address);
        let [page, host] = if span.base == STACK_POINTER {
            [field::stack_page(), field::stack_host()]
        } else {
            data_entry(&mut self.a, span.write)
        };
        self.a.rm(Two::Sub, A, page);
        self.a.compare_imm(A, 0x1000 - span.size());
        self.go_back(all, cc::A);
        self.a.rm(Two::Add, A, host);
        if let Some((register, scale)) = all.moving(span.base) {
            let register = self.fetch(register, B);
            self.a.rm(Two::Lea, B, Mem { base: None, index: Some((register, scale)), disp: 0 });
            // The host's page begins where the guest's does.
            self.a.rr(Two::Sub, A, B);
            self.a.rm(Two::Lea, B, Mem { base: Some(A), index: Some((B, 0)), disp: 0 });
        }
        let stride = all.stride(span.base);
        if stride != 0 {
            self.a.imm(Imm::And, false, B, 0xfff);
            if stride > 0 {
                self.a.imm(Imm::Xor, false, B, 0xfff);
                self.a.imm(Imm::Sub, false, B, span.size() - 1);
            }
            self.a.shr32(B, shift_of(stride));
        }
        self.a.rm(Two::Lea, A, at(A, lowest.checked_neg()?));
        Some(())
    }
}
