//! One region at a time: how a tool drives the translator and looks at its code.

use ringfence_x86::Exception;

use super::Jit;
use super::stubs::reason;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::Cpu;
use crate::interp::run::Interpreter;

/// The region that comes next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Upcoming<'a> {
    entry: super::Entry,
    lengths: &'a [u8],
}

/// A region to be entered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    entry: super::Entry,
    /// Instructions in it.
    pub(crate) count: u64,
}

impl Upcoming<'_> {
    /// As something to enter.
    pub(crate) fn next(&self) -> Next {
        Next { entry: self.entry, count: self.lengths.len() as u64 }
    }

    /// Lengths of its instructions, in order.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = u8> {
        self.lengths.iter().copied()
    }
}

/// A region's host code.
#[derive(Clone, Debug)]
pub(crate) struct HostCode {
    /// Where it is executed, and the bytes: first what is often executed, then the rest.
    pub(crate) parts: [(u64, Vec<u8>); 2],
    /// Instructions of the guest from its start that follow each other.
    pub(crate) instructions: usize,
}

impl Jit {
    /// Whether regions lead to one another without a return to Rust; they do unless told otherwise, and are straight rows
    /// of instructions then. Set it before any code is translated.
    pub(crate) fn set_chaining(&mut self, chaining: bool) {
        self.cache.chaining = chaining;
    }

    /// The region at RIP, translated now if it is due. `None` if the interpreter is to run what is there. Only where regions
    /// do not lead to one another.
    ///
    /// # Errors
    /// What the fetch raises.
    pub(crate) fn upcoming(&mut self, cpu: &mut Cpu) -> Result<Option<Upcoming<'_>>, Exception> {
        let Some(entry) = self.code_at_rip(cpu)? else { return Ok(None) };
        Ok(self.cache.region(entry).map(|region| Upcoming { entry, lengths: &region.lengths }))
    }

    /// Executes the region that [`Jit::upcoming`] has just told of, once.
    ///
    /// # Errors
    /// As [`Jit::run`].
    pub(crate) fn run_region(&mut self, interpreter: &mut Interpreter, next: Next) -> Result<(), Exception> {
        let mut left = next.count;
        let cpu = &mut interpreter.cpu;
        let reason = self.enter(cpu, next.entry, &mut left);
        self.exits[reason as usize % reason::COUNT] += 1;
        match reason {
            reason::FAULT => cpu.translated.exception.take().map_or(Ok(()), Err),
            reason::LINK => {
                self.follow_link(cpu);
                Ok(())
            }
            reason::INTERPRET => interpreter.run_block(1),
            reason::CAREFUL => {
                self.take_care(&mut interpreter.cpu)?;
                interpreter.run_block(1)
            }
            _ => Ok(()),
        }
    }

    /// The host code made from the guest's at an address.
    pub(crate) fn host_code(&self, address: CodeAddress) -> Option<HostCode> {
        let region = self.cache.region(self.cache.find(address)?)?;
        let parts = region.code.map(|(at, length)| self.cache.code(at, length));
        Some(HostCode { parts, instructions: region.instructions })
    }
}
