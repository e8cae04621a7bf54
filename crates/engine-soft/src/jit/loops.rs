//! Small loops, checked once for many iterations.
//!
//! Where straight code ends in a branch back to its start, and all that it accesses lies at small distances from registers that stay
//! as they are or are moved by constants, how often it can go round without an access leaving its pages is known beforehand. Such a loop
//! is translated twice. The code that everybody enters has the usual checks. Every fourth time that its branch leads back, it goes on
//! in the second code instead: that checks all pages, works out how many *laps* fit in them, and then runs these without a check. Each
//! operand in memory is, from then on, a constant distance from the guest's own register. What does not fit, or finds no page in the soft
//! TLB, runs in the first code.
//!
//! Nothing in a lap can leave translated code but through a branch out of the loop, and where the budget ends before a lap, so the
//! distances stay true for as long as they are used.

use super::emit::Emitter;
use super::laps::Laps;
use super::native::Kind;
use super::span::{BASES, Base, Row, Span};
use crate::vector::pass::Units;

/// Most bytes that a base may move in a lap: so many laps fit in a page that they are worth what comes before.
const FARTHEST: i64 = 512;

/// A loop, from its first step to the branch back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loop {
    /// The branch back.
    pub(super) site: usize,
    pub(super) start: usize,
    pub(super) end: usize,
    /// Where the first code goes on if it is not taken, before the next unit's budget.
    pub(super) after: Option<usize>,
    /// What is accessed.
    pub(super) row: Row,
    /// How far each register is moved in a lap, and which are moved at all.
    pub(super) moves: [i64; 16],
    moved: u32,
}

impl Loop {
    /// How far a base is moved in a lap.
    pub(super) fn stride(&self, base: Base) -> i64 {
        base.moved(|register| self.moves[usize::from(register) % 16])
    }

    /// Which of a base's registers is moved, and the shift by which it counts.
    pub(super) fn moving(&self, base: Base) -> Option<(u8, u8)> {
        let is_moved = |register: u8| self.moved >> register & 1 != 0;
        match base {
            Base { register, .. } if is_moved(register) => Some((register, 0)),
            Base { index, scale, .. } if is_moved(index) => Some((index, scale)),
            _ => None,
        }
    }

    /// A register that tells how many laps have been done, if there is an end to them.
    pub(super) fn counter(&self) -> Option<u8> {
        let span = self.row.spans().iter().find(|span| self.stride(span.base) != 0)?;
        self.moving(span.base).map(|(register, _)| register)
    }

    /// Whether the distance between what a base is and where its page is in the host stays the same as laps go by.
    fn suits(&self, span: &Span, changed: u32) -> bool {
        let Base { register, index, .. } = span.base;
        let moved = span.base.registers() & self.moved;
        let stride = self.stride(span.base);
        span.base.registers() & changed == 0
            && moved.count_ones() <= 1
            && (register != index || moved == 0)
            && stride.abs() <= FARTHEST
            // The lap before in the first code has made sure of the rest.
            && span.alignment.is_none_or(|(alignment, _)| stride % i64::from(alignment) == 0)
    }
}

impl Emitter<'_> {
    /// Takes the branch at `site`, step `end`, back to step `start`, for that of a loop, if it is one that is worth it.
    pub(super) fn begin_loop(&mut self, site: usize, start: usize, end: usize) -> bool {
        // In 32-bit code addresses may wrap between one lap and the next.
        if self.laps != Laps::None || start > end || self.is_narrow() {
            return false;
        }
        let found = self.find_loop(site, start, end);
        self.loops.extend(found);
        found.is_some()
    }

    fn find_loop(&self, site: usize, start: usize, end: usize) -> Option<Loop> {
        let first = self.access_in(start, end)?;
        let row = Row { end, spans: [Span::new(first); BASES], count: 0, units: Units::NONE };
        let mut all = Loop { site, start, end, after: None, row, moves: [0; 16], moved: 0 };
        let mut changed = 0;
        for i in start..=end {
            let step = &self.source.steps[i];
            // Units may start behind branches.
            if i > start && (step.label || self.source.steps[i - 1].last) {
                return None;
            }
            match step.kind {
                Kind::Same | Kind::Vector if step.slots <= 2 => {}
                Kind::Address | Kind::Nothing | Kind::Branch => {}
                _ => return None,
            }
            if let Some(passed) = step.facts.passed {
                all.row.units = all.row.units.and(passed.units);
            }
            if self.touches_memory(i) {
                let access = self.access(i)?;
                let place = all.row.find(access.base);
                let place = place.or_else(|| all.row.add(Span::new(access.base)))?;
                let span = &mut all.row.spans[place];
                span.moved = access.base.moved(|register| all.moves[usize::from(register) % 16]);
                span.add(&access)?;
            }
            match self.moves(step) {
                Some(by) => {
                    all.moves[usize::from(by.register) % 16] += by.by;
                    all.moved |= 1 << by.register;
                }
                None => changed |= self.changes(i),
            }
        }
        let suits = !all.row.units.x87 && all.row.spans().iter().all(|span| all.suits(span, changed));
        suits.then_some(all)
    }

    /// The base of the first access of some steps.
    fn access_in(&self, start: usize, end: usize) -> Option<Base> {
        (start..=end).find(|&i| self.touches_memory(i)).and_then(|i| self.access(i)).map(|access| access.base)
    }

    /// Emission is where the first code of a loop goes on behind it.
    pub(super) fn arrive_behind_loop(&mut self, i: usize) {
        let here = self.a.here();
        if let Some(last) = self.loops.last_mut().filter(|last| last.end + 1 == i) {
            last.after = Some(here);
        }
    }
}
