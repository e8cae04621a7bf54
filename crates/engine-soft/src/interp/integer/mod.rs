//! Integer instructions: one module a family.

mod alu;
mod bcd;
mod bit;
mod bmi;
mod branch;
mod exchange;
mod flags;
mod muldiv;
mod operand;
mod shift;
mod stack;
mod string;
#[cfg(test)]
mod tests;
mod transfer;

use iced_x86::Instruction;

use super::op::Handler;

/// The families, in the order in which they are asked.
const FAMILIES: [fn(&Instruction) -> Option<Handler>; 12] = [
    alu::handler,
    transfer::handler,
    branch::handler,
    stack::handler,
    shift::handler,
    bit::handler,
    muldiv::handler,
    exchange::handler,
    string::handler,
    flags::handler,
    bmi::handler,
    bcd::handler,
];

/// The handler for an integer instruction.
pub fn handler(instruction: &Instruction) -> Option<Handler> {
    FAMILIES.iter().find_map(|family| family(instruction))
}
