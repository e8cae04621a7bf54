//! Handlers: the interpreter's side of vector instructions.

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Cr4, Exception, SegmentRegister, Vector as Number};

use super::elements::{Elements, Mask};
use super::encode::slots;
use super::form::{Denial, Execution, Form, Location, Memory, Outcome, Refusal, Requirement, x87_opcode};
use super::state::Slots;
use super::store::Found;
use super::table;
use super::{moves, special};
use crate::interp::cpu::Cpu;
use crate::interp::decode::undefined;
use crate::interp::op::{Handler, Op, prefix};
use crate::mmu::tlb::Class;
use crate::status::Status;

/// Where [`Op::aux`] holds the opcode that an x87 operation records; below is the index of its form. [`Op::immediate`]
/// holds its [`Slots`].
const OPCODE: u32 = 20;

/// The opcode that the x87 unit records of an operation.
pub(crate) fn recorded_opcode(op: &Op) -> u16 {
    (op.aux >> OPCODE) as u16
}

/// The operation for an instruction of this module; `None` for any other. `bytes` are those it was decoded from.
pub fn lower(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8]) -> Option<Op> {
    if !table::concerns(instruction) {
        return None;
    }
    let own;
    let (kept, form) = match cpu.vector.prepare(instruction, bytes) {
        Ok(Found::Kept(index)) => (Some(index), cpu.vector.form(index)),
        Ok(Found::NoRoom(form)) => {
            own = form;
            (None, &*own)
        }
        Err(Refusal::Foreign) => return None,
        Err(Refusal::Undefined) => return Some(Op::new(instruction, undefined)),
    };
    let handler: Handler = match &form.execution {
        Execution::Direct(direct) => return Some(moves::lower(instruction, form, *direct)),
        Execution::Special(kind) => return Some(special::lower(instruction, form, *kind)),
        Execution::Thunk(_) if kept.is_none() => run_unprepared,
        Execution::Thunk(_) if form.is_x87() => run_x87,
        Execution::Thunk(_) if form.memory.is_none() && form.general == 0 && !form.status => run_on_registers,
        Execution::Thunk(_) => run,
    };
    let Ok(slots) = slots(instruction) else { return Some(Op::new(instruction, undefined)) };
    let mut op = Op::new(instruction, handler);
    op.aux = kept.unwrap_or(0) | u32::from(x87_opcode(instruction, bytes)) << OPCODE;
    op.immediate = slots.pack();
    Some(op)
}

/// The form that an operation runs.
#[derive(Clone, Copy)]
enum Source<'a> {
    Kept(u32),
    Own(&'a Form),
}

impl<'a> Source<'a> {
    #[inline(always)]
    fn kept(op: &Op) -> Self {
        Self::Kept(op.aux & ((1 << OPCODE) - 1))
    }

    #[inline(always)]
    fn form(self, cpu: &'a Cpu) -> &'a Form {
        match self {
            Self::Kept(index) => cpu.vector.form(index),
            Self::Own(form) => form,
        }
    }

    #[inline(always)]
    fn run(self, cpu: &mut Cpu, op: &Op, location: Location) -> Outcome {
        let slots = Slots::unpack(op.immediate);
        match self {
            Self::Kept(index) => cpu.vector.run(index, slots, location),
            Self::Own(form) => cpu.vector.unit.run(form, slots, location),
        }
    }
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

    /// Where a vector memory operand is, after alignment and segment checks: its linear address, or for one that is
    /// accessed element by element its offset, since each element has its checks then.
    #[inline]
    pub(super) fn vector_address(&mut self, op: &Op, memory: &Memory) -> Result<u64, Exception> {
        let offset = self.effective_address(op);
        let guess = self.bases[usize::from(op.segment)].wrapping_add(offset);
        let whole = memory.elements == Elements::Whole;
        if !whole
            && self.vector.unit.touched(memory, Slots::unpack(op.immediate)) == 0
            && !memory.probes_whole
        {
            return Ok(offset);
        }
        if guess & (u64::from(memory.alignment) - 1) != 0
            && !(memory.waivable && self.vector.unit.misalignment_allowed())
        {
            return Err(Exception::GP0);
        }
        if !whole && !memory.probes_whole {
            return Ok(offset);
        }
        if memory.first_part > 0 {
            let first = self.whole_address(op, offset, memory.first_part.into(), memory.write)?;
            self.check_operand_alignment(first, memory.checked_alignment)?;
            self.probe_bytes(op.segment, first, memory.first_part.into(), memory.write)?;
        }
        let linear = self.whole_address(op, offset, memory.size, memory.write)?;
        self.check_operand_alignment(linear, memory.checked_alignment)?;
        Ok(if whole { linear } else { offset })
    }

    /// Segment and canonical checks of all of an operand.
    #[inline]
    pub(super) fn whole_address(
        &self,
        op: &Op,
        offset: u64,
        size: u16,
        write: bool,
    ) -> Result<u64, Exception> {
        let linear = self.linear(op.segment, offset, size.into(), write)?;
        let last = linear.wrapping_add(u64::from(size) - 1);
        if self.long_mode() && !(is_canonical(linear) && is_canonical(last)) {
            return Err(self.not_canonical(op.segment));
        }
        Ok(linear)
    }

    /// #AC, if that is on and the address no multiple of `alignment`.
    #[inline]
    pub(super) fn check_operand_alignment(&self, linear: u64, alignment: u8) -> Result<(), Exception> {
        if linear & (u64::from(alignment) - 1) != 0 && self.class == Class::Slow && self.alignment_checked() {
            return Err(Exception::AC0);
        }
        Ok(())
    }

    /// Calls `access` with the place in the operand and the linear address of each element that a mask selects, lowest
    /// first.
    fn each_element(
        &mut self,
        op: &Op,
        offset: u64,
        memory: &Memory,
        mut access: impl FnMut(&mut Self, Range<usize>, u64) -> Result<(), Exception>,
    ) -> Result<(), Exception> {
        let touched = self.vector.unit.touched(memory, Slots::unpack(op.immediate));
        let granule = memory.elements.granule(memory.size);
        for start in (0..usize::from(memory.size)).step_by(granule) {
            if touched >> start & 1 != 0 {
                let place = offset.wrapping_add(start as u64);
                // VMASKMOV computes each element's address anew; EVEX forms only move on within the operand.
                let wraps = matches!(memory.elements, Elements::Masked { mask: Mask::Signs(_), .. });
                let place = if wraps { place & op.address_mask } else { place };
                let linear = self.whole_address(op, place, granule as u16, memory.write)?;
                if !memory.probes_whole {
                    let base = linear.wrapping_sub(start as u64);
                    self.check_operand_alignment(base, memory.checked_alignment)?;
                }
                access(self, start..start + granule, linear)?;
            }
        }
        Ok(())
    }

    /// Fills the bounce buffer with the bytes that the instruction accesses.
    fn fetch_operand(&mut self, op: &Op, address: u64, memory: &Memory) -> Result<(), Exception> {
        if memory.elements == Elements::Whole {
            return self.fetch_whole(op.segment, address, memory.size);
        }
        let mut bytes = [0; 64];
        self.each_element(op, address, memory, |cpu, place, linear| {
            cpu.load_bytes(op.segment, linear, &mut bytes[place])
        })?;
        self.set_bounce(&bytes);
        Ok(())
    }

    fn set_bounce(&mut self, bytes: &[u8; 64]) {
        for (word, bytes) in self.vector.unit.bounce_mut().iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
    }

    #[inline]
    fn fetch_whole(&mut self, segment: u8, linear: u64, size: u16) -> Result<(), Exception> {
        if self.class == Class::Slow || linear & 0xfff > 0x1000 - u64::from(size) {
            // All of it is looked at before any part, and it has alignment rules of its own.
            let mut bytes = [0; 64];
            self.load_bytes(segment, linear, &mut bytes[..size.min(64).into()])?;
            self.set_bounce(&bytes);
            return Ok(());
        }
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
    fn probe_operand(&mut self, op: &Op, address: u64, memory: &Memory) -> Result<(), Exception> {
        if memory.elements == Elements::Whole {
            return self.probe_store(op.segment, address, memory.size.into());
        }
        if memory.probes_whole {
            let linear = self.whole_address(op, address, memory.size, true)?;
            return self.probe_bytes(op.segment, linear, memory.size.into(), true);
        }
        self.each_element(op, address, memory, |cpu, place, linear| {
            cpu.probe_bytes(op.segment, linear, place.len(), true)
        })
    }

    fn probe_store(&mut self, segment: u8, linear: u64, size: usize) -> Result<(), Exception> {
        if self.class == Class::Slow || self.host_span(segment, linear, size, true).is_none() {
            self.probe_bytes(segment, linear, size, true)?;
        }
        Ok(())
    }

    /// Writes the bytes of the bounce buffer that the instruction stores.
    fn put_operand(&mut self, op: &Op, address: u64, memory: &Memory) -> Result<(), Exception> {
        let bounce = *self.vector.unit.bounce();
        if memory.elements == Elements::Whole {
            return self.put_whole(op.segment, address, memory.size, &bounce);
        }
        self.probe_operand(op, address, memory)?;
        let bytes = to_bytes(&bounce);
        self.each_element(op, address, memory, |cpu, place, linear| {
            cpu.store_bytes(op.segment, linear, &bytes[place])
        })
    }

    #[inline]
    pub(super) fn put_whole(
        &mut self,
        segment: u8,
        linear: u64,
        size: u16,
        words: &[u64; 8],
    ) -> Result<(), Exception> {
        if self.class == Class::Slow || linear & 0xfff > 0x1000 - u64::from(size) {
            // Nothing may be written if the second page faults.
            return self.store_bytes(segment, linear, &to_bytes(words)[..size.min(64).into()]);
        }
        match size {
            1 => return self.store(segment, linear, words[0] as u8),
            2 => return self.store(segment, linear, words[0] as u16),
            4 => return self.store(segment, linear, words[0] as u32),
            8 => return self.store(segment, linear, words[0]),
            _ => {}
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
    fn copy_in(&mut self, slots: Slots, general: u8) {
        let registers = &mut self.vector.unit.registers;
        for slot in 0..usize::from(general).min(Slots::GENERAL) {
            registers.gpr[slot] = self.regs[slots.general(slot)];
        }
        registers.status = self.status.0;
    }

    /// Takes back what it wrote.
    #[inline]
    fn copy_out(&mut self, slots: Slots, stored: u8, status: bool) {
        let registers = &self.vector.unit.registers;
        for slot in (0..Slots::GENERAL).filter(|slot| stored >> slot & 1 != 0) {
            self.regs[slots.general(slot)] = registers.gpr[slot];
        }
        if status {
            self.status = Status(registers.status_out).canonical();
        }
    }

    /// The exception for a SIMD exception that is not masked (SDM 3A 2.5, CR4.OSXMMEXCPT).
    pub(crate) fn simd_exception(&self) -> Exception {
        if self.cr4.contains(Cr4::OSXMMEXCPT) { Exception::new(Number::SimdError) } else { Exception::UD }
    }

    /// The exception for an outcome.
    #[cold]
    fn vector_fault(&self, outcome: Outcome) -> Exception {
        match outcome {
            Outcome::SimdException => self.simd_exception(),
            // Without CR0.NE a PC would raise interrupt 13 instead; no system that runs here asks for that.
            _ => Exception::new(Number::X87Error),
        }
    }

    /// Where an x87 instruction is, for the unit's pointers.
    pub(crate) fn x87_location(&self, op: &Op) -> Location {
        let data = op.has(prefix::MEMORY).then(|| {
            let selector = self.segments[usize::from(op.segment)].selector.0;
            (selector, self.effective_address(op))
        });
        Location {
            cs: self.segment(SegmentRegister::Cs).selector.0,
            ip: self.rip().wrapping_sub(op.length.into()),
            opcode: recorded_opcode(op),
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

fn to_bytes(words: &[u64; 8]) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    bytes
}

/// The runs of ones in a mask, lowest first.
pub(super) fn runs(mut mask: u64) -> impl Iterator<Item = Range<usize>> {
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
    let source = Source::kept(op);
    cpu.require(source.form(cpu).requirement)?;
    match source.run(cpu, op, Location::default()) {
        Outcome::Done => Ok(()),
        outcome => Err(cpu.vector_fault(outcome)),
    }
}

/// Any thunk of vector registers.
fn run(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    execute(cpu, op, Source::kept(op))
}

/// A thunk of the x87 unit, or of MMX.
fn run_x87(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    execute_x87(cpu, op, Source::kept(op))
}

/// A thunk for which there was no room: the instruction is decoded and prepared each time.
#[cold]
fn run_unprepared(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mut bytes = [0; 15];
    let bytes = &mut bytes[..usize::from(op.length).min(15)];
    let linear = cpu.fetch_address().wrapping_sub(op.length.into());
    cpu.load_bytes(SegmentRegister::Cs as u8, linear, bytes)?;
    let instruction = Decoder::with_ip(cpu.code_size.bits(), bytes, 0, DecoderOptions::NONE).decode();
    // Should another processor just have changed it, this is as good as any other outcome.
    if instruction.code() != op.code || instruction.len() != bytes.len() {
        return Err(Exception::UD);
    }
    match cpu.vector.prepare(&instruction, bytes) {
        Ok(Found::NoRoom(form)) if form.is_x87() => execute_x87(cpu, op, Source::Own(&form)),
        Ok(Found::NoRoom(form)) => execute(cpu, op, Source::Own(&form)),
        _ => Err(Exception::UD),
    }
}

fn execute(cpu: &mut Cpu, op: &Op, source: Source) -> Result<(), Exception> {
    let form = source.form(cpu);
    let (memory, general, stored, status) = (form.memory, form.general, form.general_stored, form.status);
    let probe_first = form.commits_before_store();
    cpu.require(form.requirement)?;
    let slots = Slots::unpack(op.immediate);
    let mut address = 0;
    if let Some(memory) = &memory {
        address = cpu.vector_address(op, memory)?;
        if memory.read {
            cpu.fetch_operand(op, address, memory)?;
        }
        if memory.write && probe_first {
            cpu.probe_operand(op, address, memory)?;
        }
    }
    cpu.copy_in(slots, general);
    let outcome = source.run(cpu, op, Location::default());
    if outcome != Outcome::Done {
        return Err(cpu.vector_fault(outcome));
    }
    if let Some(memory) = &memory
        && memory.write
    {
        cpu.put_operand(op, address, memory)?;
    }
    cpu.copy_out(slots, stored, status);
    Ok(())
}

fn execute_x87(cpu: &mut Cpu, op: &Op, source: Source) -> Result<(), Exception> {
    let form = source.form(cpu);
    let (memory, general, stored, status) = (form.memory, form.general, form.general_stored, form.status);
    let waits = form.waits();
    cpu.require(form.requirement)?;
    let slots = Slots::unpack(op.immediate);
    let mut address = 0;
    if let Some(memory) = &memory {
        let prepared = cpu.vector_address(op, memory).and_then(|found| {
            address = found;
            if memory.read {
                cpu.fetch_operand(op, address, memory)?;
            }
            if memory.write {
                cpu.probe_operand(op, address, memory)?;
            }
            Ok(())
        });
        if let Err(fault) = prepared {
            // A pending exception comes before those of the operand (SDM 3A table 6-2).
            let pending = waits && cpu.vector.unit.x87_pending();
            return Err(if pending { cpu.vector_fault(Outcome::X87Pending) } else { fault });
        }
    }
    cpu.copy_in(slots, general);
    let location = cpu.x87_location(op);
    match source.run(cpu, op, location) {
        Outcome::Done => {
            if let Some(memory) = &memory
                && memory.write
            {
                cpu.put_operand(op, address, memory)?;
            }
        }
        Outcome::DoneWithoutStore => {}
        outcome => return Err(cpu.vector_fault(outcome)),
    }
    cpu.copy_out(slots, stored, status);
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
