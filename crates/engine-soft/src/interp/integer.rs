//! Integer instructions.

use iced_x86::Instruction;

use super::op::Handler;

/// The handler for an integer instruction.
pub fn handler(_instruction: &Instruction) -> Option<Handler> {
    None
}
