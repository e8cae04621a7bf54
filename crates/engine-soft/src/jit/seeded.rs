//! Mistakes of a translator, made on purpose: what lock-step must catch.
//!
//! They are made in the decoded region, so that they do not depend on how code is generated from it.

use iced_x86::Mnemonic;

use super::native::Kind;
use super::region::Source;

/// A kind of mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeededBug {
    /// Conditional branches are taken where they should not be, and the other way round.
    WrongCondition,
    /// Flags that a shift computes never reach the guest's.
    LostFlags,
    /// Stores go 8 bytes too far.
    WrongDisplacement,
}

/// Makes the mistake in a region wherever it applies.
pub(super) fn seed(bug: Option<SeededBug>, source: &mut Source) {
    let Some(bug) = bug else { return };
    for step in source.steps.iter_mut() {
        let mnemonic = step.op.code.mnemonic();
        match bug {
            SeededBug::WrongCondition if step.kind == Kind::Branch => step.op.condition ^= 1,
            SeededBug::LostFlags if mnemonic == Mnemonic::Shl => step.effect.changes = 0,
            SeededBug::WrongDisplacement if mnemonic == Mnemonic::Mov && step.facts.memory == Some(0) => {
                step.op.displacement += 8;
            }
            _ => {}
        }
    }
}
