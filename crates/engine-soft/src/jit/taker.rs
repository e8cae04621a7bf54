//! What becomes of instructions as they are found: steps of a region, or flags that are wanted.

use ringfence_memory::GuestAddress;

use super::Options;
use super::facts::Forms;
use super::flags::{self, Set};
use super::native::Kind;
use super::region::{Known, Source};
use crate::interp::code_address::CodeAddress;
use crate::interp::code_runs::{Sink, peek};
use crate::interp::cpu::Cpu;
use crate::interp::found::Found;
use crate::interp::op::Op;

/// Takes instructions that follow each other into a region.
pub(super) struct Taker<'a, E> {
    pub(super) source: &'a mut Source,
    pub(super) forms: &'a mut Forms,
    pub(super) options: &'a Options,
    /// Offset in the page of the next.
    pub(super) next: u32,
    /// What is known of the code around, if the region follows it.
    pub(super) known: Option<&'a Known<'a, E>>,
}

impl<E: Fn(GuestAddress) -> bool> Sink for Taker<'_, E> {
    #[inline(always)]
    fn room(&mut self) -> &mut Op {
        &mut self.source.steps.room().op
    }

    #[inline(always)]
    fn take(&mut self, found: &Found<'_>) -> bool {
        let source = &mut *self.source;
        let start = self.next;
        self.next += u32::from(found.length);
        source.put_place(start);
        let step = source.steps.room();
        step.complete(found, self.next, self.forms, self.options, source.careful);
        let (kind, target) = (step.kind, step.target());
        if kind.is_direct() {
            source.leads.push(source.steps.len() as u16);
        }
        source.steps.add();
        match self.known {
            None => self.next < 0x1000,
            Some(known) => {
                source.look_ahead(kind, target, self.next, known);
                let doubtful = kind == Kind::Branch && source.steps.len() >= self.options.ample;
                let wanted =
                    if doubtful { known.is_executed(self.next) } else { !known.is_translated(self.next) };
                self.next < 0x1000 && source.find(self.next).is_none() && wanted
            }
        }
    }
}

/// Instructions looked at for the flags that they want.
const LOOK: usize = 5;

/// Which flags the code at an address may look at. Whoever relies on it hears of a write to that code, because it is in the
/// same page; so it is as `careful` as who asks.
pub(super) fn flags_wanted(cpu: &mut Cpu, address: CodeAddress, forms: &mut Forms, careful: bool) -> Set {
    let mut look = Look { forms, careful, op: Op::UNDEFINED, read: 0, left: flags::ALL };
    peek(cpu, address, LOOK, &mut look);
    look.read | look.left
}

/// Looks for the flags that instructions want.
struct Look<'a> {
    forms: &'a mut Forms,
    careful: bool,
    op: Op,
    /// Those that are looked at.
    read: Set,
    /// Those of which nothing is known yet.
    left: Set,
}

impl Sink for Look<'_> {
    #[inline(always)]
    fn room(&mut self) -> &mut Op {
        &mut self.op
    }

    #[inline(always)]
    fn take(&mut self, found: &Found<'_>) -> bool {
        let noted = self.forms.of(found);
        let effect = noted.effect;
        self.read |= effect.reads & self.left;
        if !(self.careful && noted.facts.may_keep_flags()) {
            self.left &= !effect.kills;
        }
        // What else it is may be looked at elsewhere: only plain instructions go on.
        self.left != 0 && found.flows()
    }
}
