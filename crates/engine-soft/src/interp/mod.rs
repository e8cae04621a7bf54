//! The reference interpreter.
//!
//! Guest code is decoded once into [`block::Block`]s of [`op::Op`]s: a handler and its operands, ready for use.
//! Running a block is calling one handler after the other:
//!
//! * A handler gets the [`cpu::Cpu`] and its `Op`. `regs[RIP]` already points behind the instruction.
//! * It returns `Err(exception)` to fault. Nothing that the guest can see may have changed by then, but for what
//!   the architecture says; the run loop puts RIP back and delivers the exception.
//! * Memory is reached through [`access`]: `cpu.read::<u32>(op)`, `cpu.write`, `cpu.modify`, or `load`/`store` by
//!   linear address. Each checks segment, page and alignment and raises what the processor would raise.
//! * A handler that changes what decoding or privilege depends on calls [`cpu::Cpu::update_mode`]; one that changes
//!   translations calls the TLB's flush. Both, and everything after which interrupts must be looked at again, set
//!   `cpu.leave_block`; [`decode::ends_block`] lists instructions that always end their block.
//!
//! Families of instructions are one module each, with a `handler(&Instruction) -> Option<Handler>` that
//! [`decode`] asks in turn; for integer instructions once for each form ([`handlers`]).

pub mod access;
pub mod block;
mod code32;
pub mod code_address;
pub mod code_runs;
mod counted;
pub mod cpu;
pub mod decode;
pub mod event;
pub mod features;
pub mod found;
pub(crate) mod handlers;
pub mod integer;
mod layout;
pub(crate) mod msrs;
pub mod op;
mod opcodes;
pub(crate) mod patterns;
mod pieces;
pub mod run;
pub mod stack;
mod state;
pub mod system;
#[cfg(test)]
pub(crate) mod testing;
mod window;
