//! One check for several accesses: instructions in a row whose memory operands all lie at small distances from the same
//! register, or the same sum of registers, or from one of a few such *bases*.
//!
//! Prologues and epilogues, stack frames, structures, and sums over arrays are such rows. A register may be moved by constants on the
//! way: where it is is known all the same. The checks are made at its start: each covers
//! the span from the lowest to the highest byte of a base, which must lie in one page. The row itself then runs without interruption and
//! keeps its flags in the host's, with the host address of the base in use in [`A`] and others in the vCPU. Its pushes and pops move the
//! stack pointer once, at its end or where an instruction names it ([`Emitter::settle_stack`]). Where a check fails, the same
//! instructions run from a second translation, each with a check of its own ([`super::apart`]).

use std::ops::Range;

use super::apart;
use super::asm::{Mem, Two, at, cc};
use super::emit::Emitter;
use super::native::Kind;
use super::registers::{A, B};
use super::span::{Access, BASES, Base, MOST_STEPS, Move, RSP, Row, STACK_POINTER, Span};
use super::special::StackCheck;
use super::state::field;
use super::step::Step;
use super::x87::carries_record;
use crate::interp::op::{RIP, ZERO};
use crate::vector::pass::Units;

/// A base of a row being emitted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Group {
    /// Distance of the span's first byte from the register's value at the row's start.
    lowest: i64,
    /// How far the register has moved since (pushes and pops).
    moved: i64,
}

impl Group {
    /// Distance from [`A`] of what is `displacement` from the register now.
    pub(super) fn offset(&self, displacement: i64) -> i32 {
        (displacement + self.moved - self.lowest) as i32
    }
}

impl Emitter<'_> {
    /// What step `i` accesses, if it can be part of a row.
    pub(super) fn access(&self, i: usize) -> Option<Access> {
        let step = &self.source.steps[i];
        let op = &step.op;
        let word = i64::from(self.word());
        let stack =
            |from, write| Some(Access { base: STACK_POINTER, from, to: from + word, write, alignment: 1 });
        match step.kind {
            Kind::Push | Kind::Call => stack(-word, true),
            Kind::Pop if op.dst == RSP => None,
            Kind::Pop | Kind::Return => stack(0, false),
            Kind::Same | Kind::Vector => {
                let facts = &step.facts;
                facts.memory?;
                if self.records_address(i) {
                    return None;
                }
                // An index of vector registers would count as none here; what has one is of another kind.
                // 64-bit code hardly ever names an address without a base.
                let counted = match usize::from(op.base) {
                    RIP => false,
                    ZERO => self.is_narrow(),
                    _ => true,
                };
                if !counted || !self.is_plain(op) {
                    return None;
                }
                let (from, size) = (op.displacement, i64::from(facts.size));
                let alignment = step.alignment();
                let write = facts.stores;
                let base = Base::of(op);
                Some(Access { base, from, to: from + size, write, alignment })
            }
            _ => None,
        }
    }

    /// Whether step `i` leaves the registers of a row's bases, unless it moves one, and the scratch register [`A`] alone.
    fn spares(&self, i: usize, row: &Row) -> bool {
        let step = &self.source.steps[i];
        let scratch = match step.kind {
            Kind::Nothing => true,
            Kind::Same | Kind::Vector => step.slots <= 2,
            // The distance from the stack pointer is counted.
            Kind::Pop | Kind::Push | Kind::Call | Kind::Return => {
                let changes = self.changes(i);
                return changes & row.others() == 0 && (step.kind != Kind::Pop || step.op.dst != RSP);
            }
            Kind::Address => {
                // The page would be brought to the scratch register.
                usize::from(step.op.base) != RIP
            }
            _ => false,
        };
        scratch && (self.changes(i) & row.registers() == 0 || self.moves(step).is_some())
    }

    /// Whether step `i` is not simply what comes behind the one before it: a unit, a branch may lead there, or the run of steps before may have ended.
    pub(super) fn starts_anew(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        step.unit != 0 || step.label || self.source.steps[i - 1].last
    }

    /// The registers that step `i` may change.
    pub(super) fn changes(&self, i: usize) -> u32 {
        let step = &self.source.steps[i];
        let stack = matches!(step.kind, Kind::Pop | Kind::Push | Kind::Call | Kind::Return);
        u32::from(step.changes) | u32::from(stack) << RSP
    }

    /// How a step moves a register, if that is all that it does.
    pub(super) fn moves(&self, step: &Step) -> Option<Move> {
        Move::of(step, self.is_narrow())
    }

    /// Whether step `i` has an operand in memory.
    pub(super) fn touches_memory(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        matches!(step.kind, Kind::Same | Kind::Vector) && step.facts.memory.is_some()
    }

    /// Whether step `i` of a row takes the stack pointer from its register, other than to find its operand in memory, or puts it there.
    pub(super) fn names_stack_pointer(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        let op = &step.op;
        match step.kind {
            Kind::Push => op.dst == RSP,
            Kind::Address => op.base == RSP || op.dst == RSP,
            Kind::Same | Kind::Vector => step.facts.general().any(|n| step.register(n) == RSP),
            _ => false,
        }
    }

    /// The row that starts with step `i`, if there is one of at least two accesses. With several bases it must save more than it
    /// costs: a base is come back to, or the flags need not be put by between accesses.
    fn row(&self, i: usize) -> Option<Row> {
        let first = self.access(i)?;
        let mut row = Row { end: i, spans: [Span::new(first.base); BASES], count: 1, units: Units::NONE };
        let (mut accesses, mut runs, mut current) = (0, 1, 0);
        let (mut changed, mut wanted, mut keeps_flags) = (0, Units::NONE, false);
        let mut best = None;
        let word = i64::from(self.word());
        // How far registers have moved that have not been changed otherwise.
        let mut moved = [0; 16];
        for n in i..self.source.steps.len().min(i + MOST_STEPS) {
            let step = &self.source.steps[n];
            let kind = step.kind;
            if n > i && self.starts_anew(n) {
                break;
            }
            wanted = step.facts.passed.map_or(wanted, |passed| wanted.and(passed.units));
            let Some(access) = self.access(n) else {
                if self.touches_memory(n) || !self.spares(n, &row) {
                    break;
                }
                match self.moves(step) {
                    Some(by) => {
                        moved[usize::from(by.register) % 16] += by.by;
                        row.move_spans(by);
                    }
                    None => changed |= self.changes(n),
                }
                continue;
            };
            let known = row.find(access.base);
            if known.is_none() && changed & access.base.registers() != 0 {
                break;
            }
            let added = || {
                let moved = access.base.moved(|register| moved[usize::from(register) % 16]);
                row.add(Span { moved, ..Span::new(access.base) })
            };
            let Some(place) = known.or_else(added) else { break };
            if row.spans[place].add(&access).is_none() || !self.spares(n, &row) {
                break;
            }
            if place != current {
                (runs, current) = (runs + 1, place);
                row.spans[place].again = true;
                keeps_flags |= step.effect.before(step.wanted) != 0;
            }
            accesses += 1;
            changed |= self.changes(n);
            match kind {
                Kind::Push => row.spans[place].moved -= word,
                Kind::Pop => row.spans[place].moved += word,
                _ => {}
            }
            (row.units, row.end) = (wanted, n + 1);
            let saves = if row.count == 1 { accesses >= 2 } else { runs > row.count || keeps_flags };
            if saves {
                best = Some(row);
            }
            if matches!(kind, Kind::Call | Kind::Return) {
                break;
            }
        }
        best
    }

    /// The address `displacement` from what a row counts from. Uses [`A`] and [`B`].
    pub(super) fn row_address(&mut self, base: Base, displacement: i32) -> Mem {
        let register = (usize::from(base.register) != ZERO).then(|| self.fetch(base.register, A));
        let index = (usize::from(base.index) != ZERO).then(|| (self.fetch(base.index, B), base.scale));
        Mem { base: register, index, disp: displacement }
    }

    /// Emits the row that starts with step `i` and returns the index behind it; `None` if there is none.
    #[inline(always)]
    pub(super) fn try_row(&mut self, i: usize) -> Option<usize> {
        let step = &self.source.steps[i];
        let accesses = match step.kind {
            Kind::Push | Kind::Call | Kind::Pop | Kind::Return => true,
            Kind::Same | Kind::Vector => step.facts.memory.is_some(),
            _ => false,
        };
        if accesses { self.emit_row(i) } else { None }
    }

    fn emit_row(&mut self, i: usize) -> Option<usize> {
        let mut row = self.row(i)?;
        if !matches!(self.source.steps[row.end - 1].kind, Kind::Call | Kind::Return) {
            row.end = self.quiet_end(i, row.end);
        }
        let mark = self.mark();
        self.keep_flags(i);
        self.want(row.units, i);
        let (first, record) = (self.units, self.record);
        let (stack, misses) = self.check_spans(row.spans());
        let stored = self.stored_flags;
        let mut groups = [Group::default(); BASES];
        for (group, span) in groups.iter_mut().zip(row.spans()) {
            group.lowest = span.lowest;
        }
        let mut current = 0;
        let word = i64::from(self.word());
        self.group = Some(groups[0]);
        self.keep(i..row.end, true);
        let mut done = Some(());
        for n in i..row.end {
            let place = self.access(n).and_then(|access| row.find(access.base));
            if let Some(place) = place.filter(|&place| place != current) {
                self.a.rm(Two::Load, A, field::base_host(place));
                current = place;
                self.group = Some(groups[place]);
            }
            if self.names_stack_pointer(n) {
                self.settle_stack(0);
            }
            let kind = self.source.steps[n].kind;
            done = self.keep_for(n, i).and_then(|()| {
                if !carries_record(kind) {
                    self.settle_record(B);
                }
                self.native(n, kind)
            });
            if done.is_none() {
                break;
            }
            match kind {
                Kind::Push => groups[current].moved -= word,
                Kind::Pop => groups[current].moved += word,
                _ => {}
            }
            if let Some(by) = self.moves(&self.source.steps[n]) {
                for (group, span) in groups.iter_mut().zip(row.spans()) {
                    group.moved += span.base.moved(|register| by.of_register(register));
                }
            }
            self.group = Some(groups[current]);
        }
        if done.and_then(|()| self.let_go()).is_none() {
            self.take_back(&mark);
            return None;
        }
        self.group = None;
        self.settle_stack(0);
        let id = self.add_row(i..row.end, stored, first);
        let behind = std::mem::replace(&mut self.record, record);
        if let Some(StackCheck { site, back, limit }) = stack {
            if let Some(row) = self.rows.last_mut() {
                (row.again, row.limit) = (back as u32, limit as u16);
            }
            self.lead_to_fixed([site], self.stubs.misses.row_of_stack, B, id);
        }
        if !misses.is_empty() {
            self.lead_to_fixed(misses, self.stubs.misses.row, B, id);
        }
        self.record = behind;
        Some(row.end)
    }

    /// The checks of a row: the host address of the first base is in [`A`] then, those that the row comes to later are in the vCPU.
    /// Returns the check of the stack, and the branches taken where others fail.
    fn check_spans(&mut self, spans: &[Span]) -> (Option<StackCheck>, Vec<usize>) {
        let (mut stack, mut misses) = (None, Vec::new());
        for (place, span) in spans.iter().enumerate().rev() {
            if span.base == STACK_POINTER {
                stack = Some(self.check_stack(span.lowest as i32, span.size()));
            } else {
                let address = self.row_address(span.base, span.lowest as i32);
                self.lea(A, address);
                misses.push(self.check(span.size() as usize, 1, span.write));
            }
            if let Some((alignment, address)) = span.alignment {
                // A page's address is a multiple of more, the host's as well.
                let distance = (address - span.lowest) as i32;
                let aligned = distance % i32::from(alignment) == 0;
                if !aligned {
                    self.a.rm(Two::Lea, B, at(A, distance));
                }
                self.a.test_low(if aligned { A } else { B }, alignment - 1);
                misses.push(self.a.jcc(cc::NE));
            }
            if span.again {
                self.a.rm(Two::Store, A, field::base_host(place));
            }
        }
        (stack, misses)
    }

    /// Notes what is to be known of a row that has just been emitted, if it must run apart: its distance from the first in bytes.
    fn add_row(&mut self, steps: Range<usize>, stored: bool, units: Units) -> u64 {
        let (first, last) = (&self.source.steps[steps.start], &self.source.steps[steps.end - 1]);
        self.rows.push(apart::Row {
            address: self.source.address.in_page(first.start()),
            code: 0,
            again: 0,
            back: self.a.here() as u32,
            limit: 0,
            count: steps.len() as u16,
            length: (last.next - first.start()) as u16,
            behind: last.behind,
            wanted: last.wanted,
            last: last.last,
            stored,
            host_behind: self.host_flags,
            stored_behind: self.stored_flags,
            units,
            units_behind: self.units,
            careful: self.source.careful,
        });
        ((self.first_row + self.rows.len() - 1) * size_of::<apart::Row>()) as u64
    }
}
