//! Guest registers without a host register, kept in scratch ones along a straight piece of code.
//!
//! A row ([`super::group`]) and a *stretch*, instructions in a row without an operand in memory, run from their first instruction to
//! their last without anything that could leave translated code or look at the vCPU. In there a register that lives in the
//! vCPU is loaded when it is first read, stays in a scratch register, and is stored at the end, or when its place is wanted for
//! another: the one whose next use is farthest off has to go. Ciphers and checksums, which want all registers that there are,
//! would otherwise pass every value through memory.

use std::ops::Range;

use super::asm::{Reg, Two};
use super::emit::Emitter;
use super::native::Kind;
use super::registers::{A, B, C, Home, STACK, home};
use super::span::{MOST_STEPS, RSP};
use super::state::field;
use super::step::Step;
use super::stubs::load_table;
use crate::interp::op::RIP;

/// A scratch register, and what is in it.
#[derive(Clone, Copy, Debug)]
struct Place {
    reg: Reg,
    /// The guest register.
    number: Option<u8>,
    /// Its slot is out of date.
    dirty: bool,
    /// The instruction under way names it.
    busy: bool,
    /// It has been taken from what it usually holds.
    taken: bool,
    /// Nothing is in it yet: the step under way writes it.
    empty: bool,
}

impl Place {
    const fn new(reg: Reg) -> Self {
        Self { reg, number: None, dirty: false, busy: false, taken: false, empty: false }
    }
}

/// The scratch registers that there are at most.
pub(super) const PLACES: [Reg; 4] = [A, B, C, STACK];

/// What is kept at the moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    places: [Place; PLACES.len()],
    /// How many of them there are; none if nothing is to be kept.
    count: usize,
    /// The step under way, from the first on, and the guest registers that each step names.
    step: usize,
    named: [u8; MOST_STEPS],
    /// There was no register for an operand.
    failed: bool,
}

impl Kept {
    /// Nothing.
    pub(super) const NOTHING: Self = Self {
        places: [Place::new(B); PLACES.len()],
        count: 0,
        step: 0,
        named: [0; MOST_STEPS],
        failed: false,
    };

    /// The guest registers in [`PLACES`] whose slots are out of date, four bits each and 0 for none; and whether STACK has been taken.
    pub(super) fn newer(&self) -> (u16, bool) {
        let mut newer = (0, false);
        for place in &self.places[..self.count] {
            let Place { reg, number, dirty, taken, empty, .. } = *place;
            newer.1 |= reg == STACK && taken;
            if let (Some(number), true, false) = (number, dirty, empty) {
                let place = PLACES.iter().position(|&place| place == reg).unwrap_or(0);
                newer.0 |= u16::from(number & 15) << (4 * place);
            }
        }
        newer
    }

    /// How many steps off a register is named next.
    fn distance(&self, number: u8) -> usize {
        let bit = 1 << (number % 8);
        self.named.iter().skip(self.step + 1).position(|named| named & bit != 0).unwrap_or(MOST_STEPS)
    }
}

/// The guest registers without a host register that a step names, one bit each: those from R8 on. An operand in memory does not
/// count, since the address of what it refers to is there already.
pub(super) fn named(step: &Step) -> u8 {
    let bit = |number: u8| match number {
        0..16 if home(number) == Home::Slot => 1 << (number % 8),
        _ => 0,
    };
    let mut named = 0;
    if step.slots != 0 {
        named = step.facts.general().fold(0, |all, n| all | bit(step.register(n)));
    }
    if step.kind == Kind::Address {
        named |= bit(step.op.base) | bit(step.op.index);
    }
    named
}

impl Emitter<'_> {
    /// Whether guest registers are being kept.
    #[inline(always)]
    pub(super) fn keeps(&self) -> bool {
        self.kept.count != 0
    }

    /// Whether step `i` can be part of a stretch.
    pub(super) fn is_quiet(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        match step.kind {
            Kind::Nothing => true,
            Kind::Same => step.facts.memory.is_none() && step.slots <= 2,
            Kind::Address => usize::from(step.op.base) != RIP,
            _ => false,
        }
    }

    /// Keeps registers in the steps to come, which are executed one after another with nothing between, if that is of use. In a row,
    /// [`A`] is taken.
    pub(super) fn keep(&mut self, steps: Range<usize>, row: bool) {
        let mut named = [0; MOST_STEPS];
        let (mut uses, mut all, mut stack) = (0, 0_u8, false);
        for (named, i) in named.iter_mut().zip(steps) {
            let step = &self.source.steps[i];
            *named = self::named(step);
            all |= *named;
            uses += usize::from(*named != 0);
            stack |= self.uses_stack_pointer(i);
        }
        // LEA would use a row's scratch register.
        if uses < if row { 1 } else { 2 } {
            return;
        }
        self.kept = Kept { named, ..Kept::NOTHING };
        let mut add = |reg| {
            self.kept.places[self.kept.count] = Place::new(reg);
            self.kept.count += 1;
        };
        add(B);
        if !row {
            add(A);
        }
        add(C);
        if !stack && all.count_ones() > 2 && uses > 8 {
            add(STACK);
        }
    }

    fn uses_stack_pointer(&self, i: usize) -> bool {
        self.changes(i) >> RSP & 1 != 0 || self.names_stack_pointer(i)
    }

    /// Step `i` comes next, the first of them having been step `first`.
    pub(super) fn keep_for(&mut self, i: usize, first: usize) -> Option<()> {
        if matches!(self.source.steps[i].kind, Kind::Call | Kind::Return) {
            return self.let_go();
        }
        self.kept.step = i - first;
        self.release();
        for place in &mut self.kept.places {
            place.empty = false;
        }
        Some(())
    }

    /// What the step under way names may give way to others.
    pub(super) fn release(&mut self) {
        for place in &mut self.kept.places {
            place.busy = false;
        }
    }

    /// A place for something else; changes no flag.
    fn vacate(&mut self) -> Option<usize> {
        let count = self.kept.count;
        let free = (0..count).find(|&n| !self.kept.places[n].busy && self.kept.places[n].number.is_none());
        let place = match free {
            Some(place) => place,
            None => {
                let distance = |place: &usize| {
                    self.kept.places[*place].number.map_or(0, |number| self.kept.distance(number))
                };
                (0..count).filter(|&n| !self.kept.places[n].busy).max_by_key(distance)?
            }
        };
        self.store_kept(place);
        let Place { reg, taken, .. } = self.kept.places[place];
        if !taken && reg == STACK {
            self.a.rm(Two::Store, STACK, field::register(RSP));
        }
        self.kept.places[place] = Place { taken: true, ..Place::new(reg) };
        Some(place)
    }

    /// Brings a slot up to date.
    fn store_kept(&mut self, place: usize) {
        let Place { reg, number, dirty, .. } = self.kept.places[place];
        if let (Some(number), true) = (number, dirty) {
            self.a.rm(Two::Store, reg, field::register(number));
            self.kept.places[place].dirty = false;
        }
    }

    /// The host register of guest register `number`, which has none of its own, for the step under way, which reads it, writes it, or
    /// both. Changes no flag. Of a step's registers, those that it reads come first.
    pub(super) fn kept(&mut self, number: u8, read: bool, write: bool) -> Option<Reg> {
        let known = (0..self.kept.count).find(|&n| self.kept.places[n].number == Some(number));
        let Some(place) = known.or_else(|| self.vacate()) else {
            self.kept.failed = true;
            return None;
        };
        let reg = self.kept.places[place].reg;
        if known.is_none() && read {
            self.a.rm(Two::Load, reg, field::register(number));
        }
        let place = &mut self.kept.places[place];
        (place.number, place.busy) = (Some(number), true);
        place.empty |= known.is_none() && !read;
        place.dirty |= write;
        Some(reg)
    }

    /// A scratch register for the step under way: `usual`, unless registers are kept. Changes no flag.
    pub(super) fn scratch(&mut self, usual: Reg) -> Reg {
        if !self.keeps() {
            return usual;
        }
        let Some(place) = self.vacate() else {
            self.kept.failed = true;
            return usual;
        };
        self.kept.places[place].busy = true;
        self.kept.places[place].reg
    }

    /// All registers are where they usually are after this; changes no flag. `None` if some operand found no register.
    pub(super) fn let_go(&mut self) -> Option<()> {
        for n in 0..self.kept.count {
            self.store_kept(n);
        }
        for n in 0..self.kept.count {
            match self.kept.places[n] {
                Place { taken: true, reg: C, .. } => load_table(&mut self.a),
                Place { taken: true, reg: STACK, .. } => {
                    self.a.rm(Two::Load, STACK, field::register(RSP));
                }
                _ => {}
            }
        }
        let failed = self.kept.failed;
        self.kept = Kept::NOTHING;
        (!failed).then_some(())
    }

    /// Emits the stretch that starts with step `i` and returns the index behind it; `None` if there is none.
    #[inline(always)]
    pub(super) fn try_stretch(&mut self, i: usize) -> Option<usize> {
        if named(&self.source.steps[i]) == 0 { None } else { self.stretch(i) }
    }

    fn stretch(&mut self, i: usize) -> Option<usize> {
        let end = self.quiet_end(i, i);
        if end < i + 2 {
            return None;
        }
        let mark = self.mark();
        self.keep(i..end, false);
        if !self.keeps() {
            return None;
        }
        let done = (i..end).try_for_each(|n| {
            self.keep_for(n, i)?;
            self.native(n, self.source.steps[n].kind)
        });
        if done.and_then(|()| self.let_go()).is_none() {
            self.take_back(&mark);
            return None;
        }
        Some(end)
    }

    /// Where the quiet steps from step `i` on end of which the last names a register to be kept; what they are part of starts with
    /// step `first`.
    pub(super) fn quiet_end(&self, first: usize, i: usize) -> usize {
        let steps = &self.source.steps;
        let mut end = i;
        for n in i..steps.len().min(first + MOST_STEPS) {
            let step = &steps[n];
            if n > first && self.starts_anew(n) || !self.is_quiet(n) {
                break;
            }
            if named(step) != 0 {
                end = n + 1;
            }
        }
        end
    }
}
