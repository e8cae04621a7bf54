//! One instruction of a region, with everything that is worked out of it once.

use super::Options;
use super::facts::{Facts, Forms, INTERPRETED, Noted};
use super::flags::{self, Effect, Set};
use super::native::Kind;
use super::registers::{Home, home};
use crate::interp::decode::undefined;
use crate::interp::found::Found;
use crate::interp::op::{Handler, Op};

/// One instruction of a region.
#[derive(Debug)]
pub(super) struct Step {
    /// Its bytes, or those that take their place, and what follows.
    pub(super) bytes: [u8; 16],
    /// How many.
    pub(super) length: u8,
    /// The host takes them for the same.
    pub(super) same: bool,
    /// They are as they are to be in translated code, if nothing but operands must be put in place.
    pub(super) stays: bool,
    /// What is known of its form.
    pub(super) facts: Facts,
    pub(super) kind: Kind,
    pub(super) op: Op,
    pub(super) effect: Effect,
    /// Flags wanted behind it.
    pub(super) wanted: Set,
    /// General-purpose registers that it may change, one bit each.
    pub(super) changes: u16,
    /// Operands that are guest registers without a host register.
    pub(super) slots: u8,
    /// Offset of the next instruction in the page; up to 0x1000 where the page ends, and beyond.
    pub(super) next: u32,
    /// It ends its run.
    pub(super) last: bool,
    /// Something other than the step before leads here.
    pub(super) label: bool,
    /// Instructions of the unit that starts here; 0 if none does.
    pub(super) unit: u16,
    /// Instructions of its unit behind it.
    pub(super) behind: u16,
}

impl Step {
    /// None.
    const BLANK: Self = Self {
        bytes: [0; 16],
        length: 0,
        same: false,
        stays: false,
        facts: Facts::INTERPRETED,
        kind: Kind::Interpreted,
        op: Op::UNDEFINED,
        effect: INTERPRETED.effect,
        wanted: 0,
        changes: 0,
        slots: 0,
        next: 0,
        last: false,
        label: false,
        unit: 0,
        behind: 0,
    };

    /// What the address of the operand in memory must be a multiple of, for the host to execute the instruction; 1 for anything. What is
    /// locked is not executed over two cache lines: that would stop all of the host's processors for a while, some hosts hold back
    /// programs that do so for milliseconds, and others end them.
    #[inline(always)]
    pub(super) fn alignment(&self) -> u8 {
        match (self.facts.passed, self.facts.size) {
            (Some(passed), _) => passed.alignment,
            (None, 16) => 16,
            (None, size @ (2 | 4 | 8)) if self.op.is_locked() => size as u8,
            _ => 1,
        }
    }

    /// Becomes an instruction that ends at `next`, whose operation is there already.
    #[inline(always)]
    /// `careful`: see [`super::region::Source::careful`].
    pub(super) fn complete(
        &mut self,
        found: &Found<'_>,
        next: u32,
        forms: &mut Forms,
        options: &Options,
        careful: bool,
    ) {
        let op = &self.op;
        // Nothing is native that the interpreter does not know.
        let known = found.is_plain() && !std::ptr::fn_addr_eq(op.handler, undefined as Handler);
        let noted = if known { forms.of(found) } else { &INTERPRETED };
        let facts = &noted.facts;
        let mut effect = if facts.kind == Kind::Interpreted { INTERPRETED.effect } else { noted.effect };
        if careful && facts.may_keep_flags() {
            effect.kills = 0;
        }
        if options.exact_flags && may_fault(facts) {
            effect.reads = flags::ALL;
        }
        let Used { changes, slots, moved } = Used::by(op, noted);
        let same = found.is_the_hosts();
        (self.bytes, self.length) = found.host_bytes();
        (self.same, self.stays) = (same, same & !moved & facts.memory.is_none());
        (self.facts, self.kind, self.effect) = (*facts, facts.kind, effect);
        (self.changes, self.slots, self.next) = (changes, slots, next);
        (self.wanted, self.last, self.label, self.unit, self.behind) = (0, false, false, 0, 0);
    }

    /// The number of the general-purpose register that operand `n` is.
    pub(super) fn register(&self, n: u32) -> u8 {
        self.facts.register(&self.op, n)
    }

    /// Offset of the instruction in the page.
    pub(super) fn start(&self) -> u32 {
        self.next - u32::from(self.op.length)
    }

    /// Where a relative branch goes, from the page's start.
    pub(super) fn target(&self) -> i64 {
        i64::from(self.next).wrapping_add(self.op.immediate as i64)
    }
}

/// Steps one after another, in memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Steps {
    all: Vec<Step>,
    count: usize,
}

impl Steps {
    /// Where the next one is made.
    #[inline(always)]
    pub(super) fn room(&mut self) -> &mut Step {
        if self.count == self.all.len() {
            self.all.push(Step::BLANK);
        }
        &mut self.all[self.count]
    }

    /// The one for which there was room is one of them.
    #[inline(always)]
    pub(super) fn add(&mut self) {
        self.count += 1;
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.count = 0;
    }
}

impl std::ops::Deref for Steps {
    type Target = [Step];

    #[inline(always)]
    fn deref(&self) -> &[Step] {
        &self.all[..self.count]
    }
}

impl std::ops::DerefMut for Steps {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [Step] {
        &mut self.all[..self.count]
    }
}

/// What an instruction does with general-purpose registers.
struct Used {
    /// Those that it changes, one bit each.
    changes: u16,
    /// Operands that have no host register. AH to BH count as such: with them, hardly anything can be encoded.
    slots: u8,
    /// An operand is not in the host register of the same name.
    moved: bool,
}

/// Of each register's number: a bit for it in the low half (AH to BH count as the registers they are part of), and [`SLOT`] and
/// [`MOVED`].
static NUMBERS: [u32; 32] = {
    let mut numbers = [0; 32];
    let mut number = 0;
    while number < 32 {
        numbers[number] = 1 << (number % 16)
            | match home(if number < 16 { number as u8 } else { 15 }) {
                Home::Slot => SLOT | MOVED,
                Home::Host(reg) if reg.0 as usize != number => MOVED,
                Home::Host(_) => 0,
            };
        number += 1;
    }
    numbers
};

/// It has no host register.
const SLOT: u32 = 1 << 16;
/// It is not in the host register of the same name.
const MOVED: u32 = 1 << 31;

impl Used {
    #[inline(always)]
    fn by(op: &Op, noted: &Noted) -> Self {
        let (mut all, mut slots, mut changes) = (0, 0, u32::from(noted.facts.implied));
        for (number, [named, written]) in [op.dst, op.src, op.third].into_iter().zip(noted.fields) {
            let known = NUMBERS[usize::from(number % 32)];
            all |= known & named;
            slots += known & named & SLOT;
            changes |= known & written;
        }
        Self { changes: changes as u16, slots: (slots >> 16) as u8, moved: all & MOVED != 0 }
    }
}

fn may_fault(facts: &Facts) -> bool {
    match facts.kind {
        Kind::Same => facts.memory.is_some(),
        Kind::Address | Kind::Nothing | Kind::Jump | Kind::Branch => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Instruction;

    use super::super::native::Host;
    use super::*;
    use crate::interp::found::tests::show_of;
    use crate::interp::handlers::tests::bytes;
    use crate::interp::op::register_number;
    use crate::interp::testing::Lab;

    /// What [`Used::by`] finds, from the instruction.
    fn used(instruction: &Instruction, facts: &Facts) -> (u16, u8, bool) {
        let (mut changes, mut slots, mut moved) = (facts.implied, 0, false);
        for n in facts.general() {
            let number = register_number(instruction.op_register(n));
            if facts.writes(n) {
                changes |= 1 << (number % 16);
            }
            match home(number.min(15)) {
                Home::Slot => (slots, moved) = (slots + 1, true),
                Home::Host(reg) => moved |= reg.0 != number,
            }
        }
        (changes, slots, moved)
    }

    #[test]
    fn step_of_a_known_pattern_is_that_of_its_instruction() {
        check_steps::<false>();
    }

    #[test]
    fn step_of_a_known_pattern_of_32_bit_code_is_that_of_its_instruction() {
        check_steps::<true>();
    }

    fn check_steps<const NARROW: bool>() {
        let mut lab = Lab::long();
        let mut forms = Forms::new(Host::detect());
        let mut native = 0;
        for seed in 0..300_000 {
            let bytes = bytes(seed);
            show_of::<NARROW>(&mut lab.m.cpu, &bytes, |found, op| {
                let mut step = Step::BLANK;
                step.op = *op;
                step.complete(found, 100, &mut forms, &Options::default(), false);
                if step.kind == Kind::Interpreted {
                    return;
                }
                native += 1;
                let (instruction, facts) = (found.instruction(), &step.facts);
                let told = forms.of_instruction(&instruction);
                assert_eq!(format!("{told:?}"), format!("{facts:?}"), "{bytes:x?}");
                assert_eq!(step.effect, flags::effect(&instruction), "{bytes:x?}");
                for n in facts.general() {
                    assert_eq!(step.register(n), register_number(instruction.op_register(n)), "{bytes:x?}");
                }
                let (changes, slots, moved) = used(&instruction, facts);
                assert_eq!((step.changes, step.slots), (changes, slots), "{bytes:x?}");
                assert_eq!(step.stays, step.same && !moved && facts.memory.is_none(), "{bytes:x?}");
            });
        }
        assert!(native > 50_000, "{native}");
    }
}
