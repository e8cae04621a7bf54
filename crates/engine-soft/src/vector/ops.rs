//! Handlers: the interpreter's side of vector instructions.

use iced_x86::{Code, Instruction, OpKind};
use ringfence_x86::{Cr4, Exception, SegmentRegister, Vector as Number};

use super::elements::Elements;
use super::encode::Gpr;
use super::form::{Denial, Execution, Location, Memory, Outcome, Refusal, Requirement};
use super::store::Vector;
use super::table;
use super::{moves, special};
use crate::interp::cpu::Cpu;
use crate::interp::decode::undefined;
use crate::interp::op::{Op, prefix};
use crate::status::Status;

/// The operation for an instruction of this module; `None` for any other. `bytes` are those it was decoded from.
pub fn lower(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8]) -> Option<Op> {
    if !table::concerns(instruction) {
        return None;
    }
    let (index, form) = match cpu.vector.prepare(instruction, bytes) {
        Ok(found) => found,
        Err(Refusal::Foreign) => return None,
        Err(Refusal::Undefined) => return Some(Op::new(instruction, undefined)),
    };
    let mut op = match &form.execution {
        Execution::Direct(direct) => moves::lower(instruction, form, *direct),
        Execution::Special(kind) => special::lower(instruction, form, *kind),
        Execution::Thunk(_) if form.is_x87() => Op::new(instruction, run_x87),
        Execution::Thunk(_) if form.memory.is_none() && form.gpr_count == 0 && !form.status => {
            Op::new(instruction, run_on_registers)
        }
        Execution::Thunk(_) => Op::new(instruction, run),
    };
    if Vector::has_thunk(form) {
        op.aux = index;
    }
    Some(op)
}

impl Cpu {
    /// #UD or #NM if the control registers forbid an instruction.
    #[inline(always)]
    pub(super) fn require(&self, requirement: Requirement) -> Result<(), Exception> {
        match self.vector.enabled().fault(requirement) {
            None => Ok(()),
            Some(denial) => Err(denied(denial)),
        }
    }

    /// The linear address of a vector memory operand after segment and alignment checks.
    #[inline]
    pub(super) fn vector_address(&self, op: &Op, memory: &Memory) -> Result<u64, Exception> {
        let address = self.effective_address(op);
        let linear = if memory.elements == Elements::Whole {
            self.linear(op.segment, address, u64::from(memory.size), memory.write)?
        } else {
            // Elements that are not accessed may lie outside the segment.
            let mut first = address;
            for run in runs(self.vector.unit.touched(memory)).collect::<Vec<_>>().into_iter().rev() {
                let start = run.start as u64;
                let place = address.wrapping_add(start) & op.address_mask;
                first = self.linear(op.segment, place, run.len() as u64, memory.write)?.wrapping_sub(start);
            }
            first
        };
        if linear & (u64::from(memory.alignment) - 1) != 0
            && !(memory.waivable && self.vector.unit.misalignment_allowed())
        {
            return Err(Exception::GP0);
        }
        Ok(linear)
    }

    /// Fills the bounce buffer with the bytes that the instruction accesses.
    fn fetch_operand(&mut self, segment: u8, linear: u64, memory: &Memory) -> Result<(), Exception> {
        let touched = self.vector.unit.touched(memory);
        if touched == ones(memory.size) {
            return self.fetch_whole(segment, linear, memory.size);
        }
        let mut bytes = [0; 64];
        for run in runs(touched) {
            self.load_bytes(segment, linear.wrapping_add(run.start as u64), &mut bytes[run])?;
        }
        for (word, bytes) in self.vector.unit.bounce_mut().iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }

    #[inline]
    fn fetch_whole(&mut self, segment: u8, linear: u64, size: u16) -> Result<(), Exception> {
        let first = match size {
            1 => self.load::<u8>(segment, linear)?.into(),
            2 => self.load::<u16>(segment, linear)?.into(),
            4 => self.load::<u32>(segment, linear)?.into(),
            _ => self.load::<u64>(segment, linear)?,
        };
        self.vector.unit.bounce_mut()[0] = first;
        if size == 10 {
            let last = self.load::<u16>(segment, linear.wrapping_add(8))?;
            self.vector.unit.bounce_mut()[1] = last.into();
            return Ok(());
        }
        for i in 1..usize::from(size / 8) {
            let word = self.load::<u64>(segment, linear.wrapping_add(8 * i as u64))?;
            self.vector.unit.bounce_mut()[i] = word;
        }
        Ok(())
    }

    /// Raises what storing the operand would raise.
    fn probe_operand(&mut self, segment: u8, linear: u64, memory: &Memory) -> Result<(), Exception> {
        for run in runs(self.vector.unit.touched(memory)) {
            let start = linear.wrapping_add(run.start as u64);
            if self.host_span(segment, start, run.len(), true).is_none() {
                self.probe(segment, start, run.len(), true)?;
            }
        }
        Ok(())
    }

    /// Writes the bytes of the bounce buffer that the instruction stores.
    fn put_operand(&mut self, segment: u8, linear: u64, memory: &Memory) -> Result<(), Exception> {
        let touched = self.vector.unit.touched(memory);
        let bounce = *self.vector.unit.bounce();
        if touched == ones(memory.size) {
            return self.put_whole(segment, linear, memory.size, &bounce);
        }
        self.probe_operand(segment, linear, memory)?;
        let mut bytes = [0; 64];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(bounce) {
            *bytes = u64::to_le_bytes(word);
        }
        for run in runs(touched) {
            self.store_bytes(segment, linear.wrapping_add(run.start as u64), &bytes[run])?;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn put_whole(
        &mut self,
        segment: u8,
        linear: u64,
        size: u16,
        words: &[u64; 8],
    ) -> Result<(), Exception> {
        match size {
            1 => return self.store(segment, linear, words[0] as u8),
            2 => return self.store(segment, linear, words[0] as u16),
            4 => return self.store(segment, linear, words[0] as u32),
            8 => return self.store(segment, linear, words[0]),
            _ => {}
        }
        if linear & 0xfff > 0x1000 - u64::from(size) {
            // Nothing may be written if the second page faults.
            self.probe(segment, linear, size.into(), true)?;
        }
        for (i, &word) in words.iter().enumerate().take(usize::from(size / 8)) {
            self.store(segment, linear.wrapping_add(8 * i as u64), word)?;
        }
        if size == 10 {
            self.store(segment, linear.wrapping_add(8), words[1] as u16)?;
        }
        Ok(())
    }

    /// Hands general operands and status flags to the unit.
    #[inline]
    fn copy_in(&mut self, gprs: &[Gpr]) {
        let registers = &mut self.vector.unit.registers;
        for (slot, gpr) in registers.gpr.iter_mut().zip(gprs) {
            *slot = self.regs[usize::from(gpr.number)];
        }
        registers.status = self.status.0;
    }

    /// Takes back what it wrote.
    #[inline]
    fn copy_out(&mut self, gprs: &[Gpr], status: bool) {
        let registers = &self.vector.unit.registers;
        for (slot, gpr) in registers.gpr.iter().zip(gprs) {
            if gpr.written {
                self.regs[usize::from(gpr.number)] = *slot;
            }
        }
        if status {
            self.status = Status(registers.status_out).canonical();
        }
    }

    /// The exception for an outcome.
    #[cold]
    fn vector_fault(&self, outcome: Outcome) -> Exception {
        match outcome {
            Outcome::SimdException if !self.cr4.contains(Cr4::OSXMMEXCPT) => Exception::UD,
            Outcome::SimdException => Exception::new(Number::SimdError),
            // Without CR0.NE a PC would raise interrupt 13 instead; no system that runs here asks for that.
            _ => Exception::new(Number::X87Error),
        }
    }

    /// Where an x87 instruction is, for the unit's pointers.
    pub(super) fn x87_location(&self, op: &Op) -> Location {
        let data = op.has(prefix::MEMORY).then(|| {
            let selector = self.segments[usize::from(op.segment)].selector.0;
            (selector, self.effective_address(op))
        });
        Location {
            cs: self.segment(SegmentRegister::Cs).selector.0,
            ip: self.rip().wrapping_sub(op.length.into()),
            data,
        }
    }
}

fn denied(denial: Denial) -> Exception {
    match denial {
        Denial::Undefined => Exception::UD,
        Denial::NotAvailable => Exception::new(Number::DeviceNotAvailable),
    }
}

fn ones(count: u16) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The runs of ones in a mask, lowest first.
pub(super) fn runs(mut mask: u64) -> impl Iterator<Item = std::ops::Range<usize>> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let start = mask.trailing_zeros();
            let length = (mask >> start).trailing_ones();
            let end = start + length;
            mask &= if end >= 64 { 0 } else { u64::MAX << end };
            start as usize..end as usize
        })
    })
}

/// A thunk with neither memory nor general operands.
fn run_on_registers(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(cpu.vector.form(op.aux).requirement)?;
    match cpu.vector.run(op.aux, Location::default()) {
        Outcome::Done => Ok(()),
        outcome => Err(cpu.vector_fault(outcome)),
    }
}

/// Any thunk of vector registers.
fn run(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let form = cpu.vector.form(op.aux);
    let (memory, gprs, count, status) = (form.memory, form.gprs, usize::from(form.gpr_count), form.status);
    let probe_first = form.commits_before_store();
    cpu.require(form.requirement)?;
    let mut linear = 0;
    if let Some(memory) = &memory {
        linear = cpu.vector_address(op, memory)?;
        if memory.read {
            cpu.fetch_operand(op.segment, linear, memory)?;
        }
        if memory.write && probe_first {
            cpu.probe_operand(op.segment, linear, memory)?;
        }
    }
    cpu.copy_in(&gprs[..count]);
    let outcome = cpu.vector.run(op.aux, Location::default());
    if outcome != Outcome::Done {
        return Err(cpu.vector_fault(outcome));
    }
    if let Some(memory) = &memory
        && memory.write
    {
        cpu.put_operand(op.segment, linear, memory)?;
    }
    cpu.copy_out(&gprs[..count], status);
    Ok(())
}

/// A thunk of the x87 unit, or of MMX.
fn run_x87(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let form = cpu.vector.form(op.aux);
    let (memory, gprs, count, status) = (form.memory, form.gprs, usize::from(form.gpr_count), form.status);
    let waits = form.waits();
    cpu.require(form.requirement)?;
    let mut linear = 0;
    if let Some(memory) = &memory {
        let prepared = cpu.vector_address(op, memory).and_then(|found| {
            linear = found;
            if memory.read {
                cpu.fetch_operand(op.segment, linear, memory)?;
            }
            if memory.write {
                cpu.probe_operand(op.segment, linear, memory)?;
            }
            Ok(())
        });
        if let Err(fault) = prepared {
            // A pending exception comes before those of the operand (SDM 3A table 6-2).
            let pending = waits && cpu.vector.unit.x87_pending();
            return Err(if pending { cpu.vector_fault(Outcome::X87Pending) } else { fault });
        }
    }
    cpu.copy_in(&gprs[..count]);
    let location = cpu.x87_location(op);
    match cpu.vector.run(op.aux, location) {
        Outcome::Done => {
            if let Some(memory) = &memory
                && memory.write
            {
                cpu.put_operand(op.segment, linear, memory)?;
            }
        }
        Outcome::DoneWithoutStore => {}
        outcome => return Err(cpu.vector_fault(outcome)),
    }
    cpu.copy_out(&gprs[..count], status);
    Ok(())
}

/// Whether an operand of the instruction is memory.
pub(super) fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Memory)
}

/// #MF if an exception is pending.
pub(super) fn check_pending(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.vector.unit.x87_pending() { Err(cpu.vector_fault(Outcome::X87Pending)) } else { Ok(()) }
}

/// FXSAVE64 and its like: REX.W.
pub(super) fn is_wide(code: Code) -> bool {
    matches!(
        code,
        Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
    )
}
