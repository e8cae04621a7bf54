//! One instruction of a region, with everything that is worked out of it once.

use iced_x86::Instruction;

use super::Options;
use super::facts::{Facts, Forms};
use super::flags::{self, Effect, Set};
use super::native::Kind;
use super::registers::{Home, home};
use crate::interp::decode::undefined;
use crate::interp::op::{Handler, Op, prefix, register_number};

/// One instruction of a region.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) instruction: Instruction,
    /// Its bytes and what follows, if the host takes them for the same; see [`Step::bytes`].
    own: Option<[u8; 16]>,
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
    /// An instruction that ends at `next`.
    pub(super) fn new(
        instruction: Option<&Instruction>,
        own: Option<&[u8]>,
        op: Op,
        next: u32,
        forms: &mut Forms,
        options: &Options,
    ) -> Self {
        // Nothing is native that the interpreter does not know.
        let known = !std::ptr::fn_addr_eq(op.handler, undefined as Handler);
        let facts = match instruction {
            Some(instruction) if known => forms.of_variant(instruction, op.has(prefix::MEMORY)),
            _ => Facts::INTERPRETED,
        };
        let instruction = instruction.copied().unwrap_or_default();
        let mut effect = match facts.kind {
            // Whatever it is, it finds the flags in the vCPU and leaves them there.
            Kind::Interpreted => Effect { reads: flags::ALL, changes: flags::ALL, kills: flags::ALL },
            _ => facts.effect(&instruction),
        };
        if options.exact_flags && may_fault(&facts) {
            effect.reads = flags::ALL;
        }
        let Used { changes, slots, moved } = used(&instruction, &facts);
        let stays = !moved && facts.memory.is_none() && own.is_some();
        Self {
            instruction,
            own: own.map(first),
            stays,
            facts,
            kind: facts.kind,
            op,
            effect,
            wanted: 0,
            changes,
            slots,
            next,
            last: false,
            label: false,
            unit: 0,
            behind: 0,
        }
    }

    /// Its bytes with others behind them, and how many are its own.
    pub(super) fn as_it_is(&self) -> Option<(u128, usize)> {
        Some((u128::from_le_bytes(self.own?), usize::from(self.op.length)))
    }

    /// Its bytes, if the host takes them for the same; none otherwise.
    pub(super) fn bytes(&self) -> &[u8] {
        self.own.as_ref().map_or(&[], |bytes| &bytes[..usize::from(self.op.length & 15)])
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

/// What an instruction does with general-purpose registers.
struct Used {
    /// Those that it changes, one bit each.
    changes: u16,
    /// Operands that have no host register. AH to BH count as such: with them, hardly anything can be encoded.
    slots: u8,
    /// An operand is not in the host register of the same name.
    moved: bool,
}

fn used(instruction: &Instruction, facts: &Facts) -> Used {
    let mut used = Used { changes: facts.implied, slots: 0, moved: false };
    for n in facts.general() {
        let number = register_number(instruction.op_register(n));
        if facts.writes(n) {
            // AH to BH are 16 to 19.
            used.changes |= 1 << (number % 16);
        }
        match home(number.min(15)) {
            Home::Slot => (used.slots, used.moved) = (used.slots + 1, true),
            Home::Host(reg) => used.moved |= reg.0 != number,
        }
    }
    used
}

/// The first bytes, filled up with zeros.
#[inline(always)]
fn first(bytes: &[u8]) -> [u8; 16] {
    match bytes.first_chunk() {
        Some(first) => *first,
        None => {
            let mut first = [0; 16];
            first[..bytes.len()].copy_from_slice(bytes);
            first
        }
    }
}

fn may_fault(facts: &Facts) -> bool {
    match facts.kind {
        Kind::Same => facts.memory.is_some(),
        Kind::Address | Kind::Nothing | Kind::Jump | Kind::Branch => false,
        _ => true,
    }
}
