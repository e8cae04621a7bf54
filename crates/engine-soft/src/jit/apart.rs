//! Rows whose common check has failed: their instructions once more, each with a check of its own.
//!
//! Few rows ever fail, so that code is made when one does, from the guest's bytes. A failing check goes to fixed code
//! ([`super::misses`]), which looks whether the row has such code and calls [`Jit::apart`] if it has none yet.

use std::time::Instant;

use super::cache::Cache;
use super::emit::{Emitter, emit_apart};
use super::enter::show_code;
use super::facts::Forms;
use super::flags::Set;
use super::region::Source;
use super::registers::A;
use super::vector::Side;
use super::{Jit, Options};
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;
use crate::vector::pass::Units;

/// A row that may have to run apart, and what the code around it expects. Offsets are those in the arena.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Row {
    /// Where its first instruction is.
    pub(super) address: CodeAddress,
    /// Its code, 0 while there is none.
    pub(super) code: u32,
    /// Where to go on with a check of the stack that succeeds now.
    pub(super) again: u32,
    /// Where to go on behind it.
    pub(super) back: u32,
    /// The last offset in the stack's page at which it fits.
    pub(super) limit: u16,
    /// Instructions, and their bytes.
    pub(super) count: u16,
    pub(super) length: u16,
    /// Instructions of its unit behind its last.
    pub(super) behind: u16,
    /// Flags wanted behind it.
    pub(super) wanted: Set,
    /// Its last ends a run.
    pub(super) last: bool,
    /// The guest's flags are in the vCPU before it.
    pub(super) stored: bool,
    /// The guest's flags are expected to be in the host's behind it, and in the vCPU.
    pub(super) host_behind: bool,
    pub(super) stored_behind: bool,
    /// What is in the host's registers before it, and expected to be behind.
    pub(super) units: Units,
    pub(super) units_behind: Units,
    /// See [`Source::careful`].
    pub(super) careful: bool,
}

impl Row {
    /// Puts places in the code right.
    pub(super) fn put(&mut self, place: impl Fn(&mut u32)) {
        place(&mut self.again);
        place(&mut self.back);
    }
}

impl Emitter<'_> {
    /// The steps of a row, which are all that there are.
    pub(super) fn apart(&mut self, row: &Row) {
        (self.host_flags, self.stored_flags, self.units) = (false, row.stored, row.units);
        let mut open = true;
        for i in 0..self.source.steps.len() {
            open = self.step(i).open;
        }
        if !open {
            return;
        }
        if row.stored_behind {
            self.save_flags();
        }
        self.settle_record(A);
        if self.units != row.units_behind {
            self.save_flags();
            self.load(row.units_behind, self.source.steps.len() - 1, Side::Behind);
        }
        if row.host_behind {
            self.restore_flags(A);
        }
        self.a.jmp_to(i64::from(row.back) - self.base as i64);
    }
}

impl Source {
    /// Decodes the steps of a row; `None` if they are not what they were.
    fn decode_row(&mut self, cpu: &mut Cpu, row: &Row, forms: &mut Forms, options: &Options) -> Option<()> {
        self.careful = row.careful;
        self.decode_steps(cpu, row.address, row.count.into(), forms, options);
        let end = row.address.page_offset() as u32 + u32::from(row.length);
        let steps = &mut self.steps;
        if steps.len() != usize::from(row.count) || steps.last()?.next != end {
            return None;
        }
        let (mut wanted, mut behind) = (row.wanted, row.behind);
        for step in steps.iter_mut().rev() {
            (step.wanted, step.behind, step.last) = (wanted, behind, false);
            wanted = step.effect.before(wanted);
            behind += 1;
        }
        steps.last_mut()?.last = row.last;
        Some(())
    }
}

impl Cache {
    /// Adds code for a row. Nothing is dropped for it, since translated code is running.
    fn add_apart(&mut self, number: usize, source: &Source) -> Option<u32> {
        let row = *self.rows.get(number)?;
        let output =
            emit_apart(&row, source, &self.stubs, self.place(), self.output.take().unwrap_or_default());
        let room = self.used + output.code().len() <= self.rare;
        let code = room.then(|| self.add_rare(&output, row.address.page()));
        self.output = Some(output);
        self.rows[number].code = code?;
        code
    }
}

impl Jit {
    /// The host's address of code for a row, by its distance from the first in bytes: its own, made now, or what hands it to the interpreter.
    pub(super) fn apart(&mut self, cpu: &mut Cpu, distance: usize) -> u64 {
        let start = Instant::now();
        let number = distance / size_of::<Row>();
        let row = self.cache.rows.get(number).copied();
        let code = row.and_then(|row| {
            self.row.decode_row(cpu, &row, &mut self.forms, &self.options)?;
            self.cache.add_apart(number, &self.row)
        });
        // Looking at the code may have made its page one that is not to be written.
        cpu.find_stack();
        self.cache.publish(&mut cpu.translated);
        self.translating += start.elapsed();
        if let Some(code) = code {
            show_code(&mut self.cache);
            return self.cache.host(code as usize);
        }
        if let Some(row) = row {
            cpu.regs[RIP] = cpu.translated.page.wrapping_add(row.address.page_offset());
            cpu.translated.budget += i64::from(row.count) + i64::from(row.behind);
        }
        self.cache.host(self.cache.stubs.misses.give_up)
    }
}
