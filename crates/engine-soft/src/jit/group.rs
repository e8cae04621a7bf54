//! One check for several accesses: instructions in a row whose memory operands all lie at small distances from the same
//! register, or the same sum of registers.
//!
//! Prologues and epilogues, stack frames and structures are such rows. The check covers the span from the lowest to the
//! highest byte, which must lie in one page; the row itself then runs without interruption, with its host address in
//! [`A`]. Where the check fails, the same instructions run from a second translation, each with a check of its own
//! ([`super::apart`]).

use std::ops::Range;

use ringfence_memory::GuestAddress;

use super::apart;
use super::asm::{Mem, Two, cc};
use super::emit::Emitter;
use super::native::Kind;
use super::operand::adds_base;
use super::registers::{A, B, Home, home};
use super::special::StackCheck;
use crate::interp::op::{RIP, ZERO};
use crate::vector::pass::Level;

/// The longest span, in bytes. Spans are rarely longer, and a longer one crosses pages more often.
const MAX_SPAN: i64 = 1024;
const RSP: u8 = 4;

/// A row being emitted.
#[derive(Clone, Copy, Debug)]
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

/// What a step accesses: register, first byte, byte behind the last, whether it writes, and what the address must be a
/// multiple of.
struct Access {
    base: Base,
    from: i64,
    to: i64,
    write: bool,
    alignment: u8,
}

/// What displacements are counted from: a base register and, if it is not [`ZERO`], an index register and its shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Base {
    register: u8,
    index: u8,
    scale: u8,
}

const STACK_POINTER: Base = Base { register: RSP, index: ZERO as u8, scale: 0 };

/// A row: the steps up to `end`, and what to check.
struct Row {
    end: usize,
    base: Base,
    lowest: i64,
    highest: i64,
    write: bool,
    /// What some address must be a multiple of, and that address's distance from the register.
    alignment: Option<(u8, i64)>,
    /// The vector registers that it wants.
    level: Option<Level>,
}

impl Emitter<'_> {
    /// What step `i` accesses, if it can be part of a row.
    fn access(&self, i: usize) -> Option<Access> {
        let step = &self.source.steps[i];
        let op = &step.op;
        let stack =
            |from, write| Some(Access { base: STACK_POINTER, from, to: from + 8, write, alignment: 1 });
        match step.kind {
            Kind::Push | Kind::Call => stack(-8, true),
            Kind::Pop if op.dst == RSP => None,
            Kind::Pop | Kind::Return => stack(0, false),
            Kind::Same | Kind::Vector => {
                let facts = &step.facts;
                facts.memory?;
                // An index of vector registers counts as none here; nothing with one is translated.
                let simple = usize::from(op.base) < RIP
                    && op.address_mask == u64::MAX
                    && !adds_base(op)
                    && op.displacement.unsigned_abs() < 1 << 30;
                if !simple {
                    return None;
                }
                let (from, size) = (op.displacement, i64::from(facts.size));
                let alignment = match facts.passed {
                    Some(passed) => passed.alignment,
                    None if size == 16 => 16,
                    None => 1,
                };
                let write = facts.stores;
                let base = Base { register: op.base, index: op.index, scale: op.scale };
                Some(Access { base, from, to: from + size, write, alignment })
            }
            _ => None,
        }
    }

    /// Whether step `i` leaves the registers of `base` and the scratch register [`A`] alone.
    fn spares(&self, i: usize, base: Base) -> bool {
        let step = &self.source.steps[i];
        let scratch = match step.kind {
            Kind::Nothing => true,
            Kind::Same | Kind::Vector => step.slots <= 2,
            Kind::Pop => return step.op.dst != RSP,
            Kind::Push | Kind::Call | Kind::Return => return true,
            Kind::Address => {
                let op = &step.op;
                let in_register = |n: u8| n == 17 || n < 16 && home(n) != Home::Slot;
                step.slots == 0 && in_register(op.base) && in_register(op.index)
            }
            _ => false,
        };
        let counted = 1_u32 << base.register | 1_u32 << base.index;
        scratch && u32::from(step.changes) & counted == 0
    }

    /// Whether step `i` has an operand in memory.
    fn touches_memory(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        matches!(step.kind, Kind::Same | Kind::Vector) && step.facts.memory.is_some()
    }

    /// The row that starts with step `i`, if there is one of at least two accesses.
    fn row(&self, i: usize) -> Option<Row> {
        let first = self.access(i)?;
        let mut row = Row {
            end: i,
            base: first.base,
            lowest: first.from,
            highest: first.to,
            write: false,
            alignment: None,
            level: None,
        };
        let (mut moved, mut accesses) = (0, 0);
        let mut wanted = None;
        for n in i..self.source.steps.len() {
            let step = &self.source.steps[n];
            let kind = step.kind;
            if n > i && (step.unit != 0 || step.label || self.source.steps[n - 1].last) {
                break;
            }
            wanted = wanted.max(step.facts.passed.map(|passed| passed.level));
            if let Some(access) = self.access(n) {
                if access.base != row.base {
                    break;
                }
                let lowest = row.lowest.min(access.from + moved);
                let highest = row.highest.max(access.to + moved);
                if highest - lowest > MAX_SPAN || !self.spares(n, row.base) {
                    break;
                }
                if access.alignment > 1 {
                    let at = access.from + moved;
                    match row.alignment {
                        // One address that is a multiple of the larger number settles them all.
                        Some((alignment, other)) if alignment == access.alignment => {
                            if (at - other) % i64::from(alignment) != 0 {
                                break;
                            }
                        }
                        Some(_) => break,
                        None => row.alignment = Some((access.alignment, at)),
                    }
                }
                (row.lowest, row.highest) = (lowest, highest);
                row.write |= access.write;
                row.level = wanted;
                row.end = n + 1;
                accesses += 1;
                match kind {
                    Kind::Push => moved -= 8,
                    Kind::Pop => moved += 8,
                    Kind::Call | Kind::Return => break,
                    _ => {}
                }
            } else if self.touches_memory(n) || !self.spares(n, row.base) {
                break;
            }
        }
        (accesses >= 2).then_some(row)
    }

    /// The address `displacement` from what a row counts from. Uses [`A`] and [`B`].
    fn row_address(&mut self, base: Base, displacement: i32) -> Mem {
        let register = self.fetch(base.register, A);
        let index = (usize::from(base.index) != ZERO).then(|| (self.fetch(base.index, B), base.scale));
        Mem { base: Some(register), index, disp: displacement }
    }

    /// Emits the row that starts with step `i` and returns the index behind it; `None` if there is none.
    pub(super) fn try_row(&mut self, i: usize) -> Option<usize> {
        let row = self.row(i)?;
        let mark = self.mark();
        self.keep_flags(i);
        if let Some(level) = row.level {
            self.want_level(level, i);
        }
        let first = self.level;
        let (mut misaligned, mut missed) = (None, None);
        let span = (row.highest - row.lowest) as i32;
        let mut stack = None;
        if let Some((alignment, address)) = row.alignment {
            let address = self.row_address(row.base, address as i32);
            self.a.rm(Two::Lea, A, address);
            self.a.test_low(A, alignment - 1);
            misaligned = Some(self.a.jcc(cc::NE));
        }
        if row.base == STACK_POINTER {
            stack = Some(self.check_stack(row.lowest as i32, span));
        } else {
            let address = self.row_address(row.base, row.lowest as i32);
            self.a.rm(Two::Lea, A, address);
            missed = Some(self.check(span as usize, 1, row.write));
        }
        let stored = self.stored_flags;
        self.group = Some(Group { lowest: row.lowest, moved: 0 });
        let mut done = Some(());
        for n in i..row.end {
            let kind = self.source.steps[n].kind;
            done = self.native(n, kind);
            if done.is_none() {
                break;
            }
            if let Some(group) = &mut self.group {
                match kind {
                    Kind::Push => group.moved -= 8,
                    Kind::Pop => group.moved += 8,
                    _ => {}
                }
            }
        }
        self.group = None;
        if done.is_none() {
            self.take_back(&mark);
            return None;
        }
        let id = self.add_row(i..row.end, stored, first);
        if let Some(StackCheck { site, back, limit }) = stack {
            if let Some(row) = self.rows.last_mut() {
                (row.again, row.limit) = (back as u32, limit as u16);
            }
            self.lead_to_fixed([site], self.stubs.misses.row_of_stack, B, id);
        }
        if misaligned.or(missed).is_some() {
            self.lead_to_fixed([misaligned, missed].into_iter().flatten(), self.stubs.misses.row, B, id);
        }
        Some(row.end)
    }

    /// Notes what is to be known of a row that has just been emitted, if it must run apart: its distance from the first in bytes.
    fn add_row(&mut self, steps: Range<usize>, stored: bool, level: Option<Level>) -> u64 {
        let (first, last) = (&self.source.steps[steps.start], &self.source.steps[steps.end - 1]);
        self.rows.push(apart::Row {
            address: GuestAddress(self.source.address.page().0 + u64::from(first.start())),
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
            level,
            level_behind: self.level,
        });
        ((self.first_row + self.rows.len() - 1) * size_of::<apart::Row>()) as u64
    }
}
