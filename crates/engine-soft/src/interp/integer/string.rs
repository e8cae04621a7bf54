//! MOVS, STOS, LODS, CMPS, SCAS, with their repeat prefixes.
//!
//! A repeated instruction works page by page on host memory where it can, element by element where it cannot, and
//! gives way after a bounded number of elements: registers then say how far it got and RIP still points at it, exactly as
//! when an interrupt had come (SDM 2B, REP). The bound is fixed, so counted runs repeat.

use iced_x86::{Instruction, Mnemonic};
use ringfence_memory::{Scalar, host};
use ringfence_x86::{Exception, Gpr, Rflags, SegmentRegister};

use super::operand::for_size;
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, RIP, prefix};

const RAX: u8 = Gpr::Rax as u8;
const RCX: usize = Gpr::Rcx as usize;
const RSI: usize = Gpr::Rsi as usize;
const RDI: usize = Gpr::Rdi as usize;
const ES: u8 = SegmentRegister::Es as u8;

/// Elements per execution of a repeated instruction before interrupts are looked at again.
const BATCH: u64 = 4096;

/// Replaces the low part of an index or count register, as wide as the address size.
#[inline(always)]
fn set_index(cpu: &mut Cpu, register: usize, value: u64, mask: u64) {
    cpu.regs[register] =
        if mask == 0xffff { cpu.regs[register] & !0xffff | value & 0xffff } else { value & mask };
}

/// Moves an index register on by `count` elements in the direction of DF.
#[inline(always)]
fn advance<T: Int>(cpu: &mut Cpu, register: usize, count: u64, mask: u64) {
    let distance = count.wrapping_mul(T::SIZE as u64);
    let value = cpu.regs[register];
    let next = if cpu.flags.contains(Rflags::DF) {
        value.wrapping_sub(distance)
    } else {
        value.wrapping_add(distance)
    };
    set_index(cpu, register, next, mask);
}

/// Elements that fit between `linear` and the end of its page.
#[inline(always)]
fn room<T: Int>(linear: u64) -> u64 {
    (0x1000 - (linear & 0xfff)) / T::SIZE as u64
}

/// One repeated instruction: calls `step` with the elements left until it has done all, it says stop, or the batch is
/// over. `step` does at least one element, moves the index registers, and returns how many it did and whether to go on.
fn repeat(
    cpu: &mut Cpu,
    op: &Op,
    mut step: impl FnMut(&mut Cpu, u64) -> Result<(u64, bool), Exception>,
) -> Result<(), Exception> {
    if !op.has(prefix::REP | prefix::REPNE) {
        return step(cpu, 1).map(drop);
    }
    let mask = op.address_mask;
    // Single step traps after each iteration (SDM 3B 17.3.1.4).
    let mut budget = if cpu.flags.contains(Rflags::TF) { 1 } else { BATCH };
    loop {
        let left = cpu.regs[RCX] & mask;
        if left == 0 {
            return Ok(());
        }
        if budget == 0 {
            cpu.regs[RIP] = cpu.regs[RIP].wrapping_sub(u64::from(op.length));
            return Ok(());
        }
        let (done, go_on) = step(cpu, left.min(budget))?;
        set_index(cpu, RCX, left - done, mask);
        budget -= done;
        if !go_on {
            return Ok(());
        }
    }
}

/// The linear address of `count` elements at an index register, all inside the segment, or of one.
#[inline(always)]
fn element<T: Int>(
    cpu: &Cpu,
    segment: u8,
    register: usize,
    mask: u64,
    write: bool,
) -> Result<u64, Exception> {
    cpu.linear(segment, cpu.regs[register] & mask, T::SIZE as u64, write)
}

/// How many elements from the index register on can be done at once: upwards, within a page, without wrapping the index
/// and within the segment's limit.
#[inline(always)]
fn span<T: Int>(
    cpu: &Cpu,
    segment: u8,
    register: usize,
    mask: u64,
    linear: u64,
    wanted: u64,
    write: bool,
) -> u64 {
    if wanted == 1 || cpu.flags.contains(Rflags::DF) {
        return 1;
    }
    let count = wanted.min(room::<T>(linear)).max(1);
    let offset = cpu.regs[register] & mask;
    let bytes = count * T::SIZE as u64;
    let wraps = offset.checked_add(bytes - 1).is_none_or(|last| last > mask);
    if wraps || cpu.linear(segment, offset, bytes, write).is_err() { 1 } else { count }
}

fn movs<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mask = op.address_mask;
    repeat(cpu, op, |cpu, wanted| {
        let from = element::<T>(cpu, op.segment, RSI, mask, false)?;
        let to = match element::<T>(cpu, ES, RDI, mask, true) {
            Ok(to) => to,
            Err(fault) => {
                // The source is read before the destination is looked at.
                cpu.load::<T>(op.segment, from)?;
                return Err(fault);
            }
        };
        let count = span::<T>(cpu, op.segment, RSI, mask, from, wanted, false)
            .min(span::<T>(cpu, ES, RDI, mask, to, wanted, true));
        let done = match host_spans::<T>(cpu, (op.segment, from, false), (ES, to, true), count) {
            Some((source, target)) => {
                copy::<T>(source, target, count);
                count
            }
            None => {
                let value = cpu.load::<T>(op.segment, from)?;
                cpu.store(ES, to, value)?;
                1
            }
        };
        advance::<T>(cpu, RSI, done, mask);
        advance::<T>(cpu, RDI, done, mask);
        Ok((done, true))
    })
}

/// Host addresses of `count` elements in each of two places (segment, linear address, whether to write), the first looked at
/// first; `None` if there is but one element, or the long way must be gone.
#[inline(always)]
fn host_spans<T: Int>(
    cpu: &mut Cpu,
    first: (u8, u64, bool),
    second: (u8, u64, bool),
    count: u64,
) -> Option<(*mut u8, *mut u8)> {
    let bytes = count as usize * T::SIZE;
    let mut look = |(segment, linear, write)| cpu.host_span(segment, linear, bytes, write);
    if count > 1 { Some((look(first)?, look(second)?)) } else { None }
}

/// Copies upwards, element after element, so that overlapping copies come out as the guest's own would.
fn copy<T: Int>(from: *mut u8, to: *mut u8, count: u64) {
    let bytes = count as usize * T::SIZE;
    let overlaps = (to as usize).wrapping_sub(from as usize) < bytes;
    let mut at = 0;
    // SAFETY: the caller got both pointers from soft-TLB hits for all `bytes`.
    unsafe {
        if !overlaps {
            host::copy_bytes(from, to, bytes);
            return;
        }
        while at < bytes {
            T::load(from.add(at)).store(to.add(at));
            at += T::SIZE;
        }
    }
}

fn stos<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mask = op.address_mask;
    let value = cpu.reg::<T>(RAX);
    repeat(cpu, op, |cpu, wanted| {
        let to = element::<T>(cpu, ES, RDI, mask, true)?;
        let count = span::<T>(cpu, ES, RDI, mask, to, wanted, true);
        let fast = if count > 1 { cpu.host_span(ES, to, count as usize * T::SIZE, true) } else { None };
        let done = match fast {
            Some(target) => {
                // SAFETY: the soft-TLB hit covers `count` elements.
                unsafe { host::fill_with(target, value, count as usize) };
                count
            }
            None => {
                cpu.store(ES, to, value)?;
                1
            }
        };
        advance::<T>(cpu, RDI, done, mask);
        Ok((done, true))
    })
}

fn lods<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mask = op.address_mask;
    repeat(cpu, op, |cpu, wanted| {
        let from = element::<T>(cpu, op.segment, RSI, mask, false)?;
        let count = span::<T>(cpu, op.segment, RSI, mask, from, wanted, false);
        let bytes = count as usize * T::SIZE;
        let fast = if count > 1 { cpu.host_span(op.segment, from, bytes, false) } else { None };
        let (done, value) = match fast {
            // SAFETY: the soft-TLB hit covers `count` elements; of plain memory only the last one loaded can be seen.
            Some(source) => (count, unsafe { T::load(source.add(bytes - T::SIZE)) }),
            None => (1, cpu.load::<T>(op.segment, from)?),
        };
        cpu.set_reg(RAX, value);
        advance::<T>(cpu, RSI, done, mask);
        Ok((done, true))
    })
}

/// Whether a repeated comparison goes on: REPE while equal, REPNE while not.
#[inline(always)]
fn goes_on(cpu: &Cpu, op: &Op) -> bool {
    cpu.status.zf() != op.has(prefix::REPNE)
}

/// Whether a part of `value`, as wide as an element, is zero.
#[inline(always)]
fn has_zero<T: Int>(value: u64) -> bool {
    let ones = u64::MAX / (u64::MAX >> (64 - 8 * T::SIZE));
    value.wrapping_sub(ones) & !value & ones << (8 * T::SIZE - 1) != 0
}

/// Compares pairs of elements, up to the first at which the repetition ends or the last of `count`: how many, and the last
/// pair. `words` gives eight bytes of each side at an offset, `pair` one element.
///
/// Whole words are only looked at to pass over them: what ends it is decided by the pair returned, whatever others write
/// to the memory meanwhile.
#[inline(always)]
fn compare<T: Int>(
    count: u64,
    while_equal: bool,
    words: impl Fn(usize) -> (u64, u64),
    pair: impl Fn(usize) -> (T, T),
) -> (u64, (T, T)) {
    let bytes = count as usize * T::SIZE;
    let mut at = 0;
    loop {
        while at + 8 < bytes {
            let (a, b) = words(at);
            if if while_equal { a != b } else { has_zero::<T>(a ^ b) } {
                break;
            }
            at += 8;
        }
        for _ in 0..8 / T::SIZE {
            let (a, b) = pair(at);
            at += T::SIZE;
            if at >= bytes || (a.widen() == b.widen()) != while_equal {
                return ((at / T::SIZE) as u64, (a, b));
            }
        }
    }
}

fn cmps<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mask = op.address_mask;
    repeat(cpu, op, |cpu, wanted| {
        // The manuals do not say which operand comes first; AMD's processors begin with the second.
        let to = element::<T>(cpu, ES, RDI, mask, false)?;
        let from = element::<T>(cpu, op.segment, RSI, mask, false);
        let count = match from {
            Ok(from) => span::<T>(cpu, op.segment, RSI, mask, from, wanted, false)
                .min(span::<T>(cpu, ES, RDI, mask, to, wanted, false)),
            Err(_) => 1,
        };
        let fast = match from {
            Ok(from) => host_spans::<T>(cpu, (ES, to, false), (op.segment, from, false), count),
            Err(_) => None,
        };
        let (done, (a, b)) = match fast {
            // SAFETY: the soft-TLB hits cover `count` elements, and `compare` stays inside them.
            Some((second, first)) => unsafe {
                compare::<T>(
                    count,
                    !op.has(prefix::REPNE),
                    |at| (u64::load(first.add(at)), u64::load(second.add(at))),
                    |at| (T::load(first.add(at)), T::load(second.add(at))),
                )
            },
            None => {
                let b = cpu.load::<T>(ES, to)?;
                (1, (cpu.load::<T>(op.segment, from?)?, b))
            }
        };
        cpu.status = a.sub(b).1;
        advance::<T>(cpu, RSI, done, mask);
        advance::<T>(cpu, RDI, done, mask);
        Ok((done, goes_on(cpu, op)))
    })
}

fn scas<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let mask = op.address_mask;
    let value = cpu.reg::<T>(RAX);
    let spread = value.widen().wrapping_mul(u64::MAX / (u64::MAX >> (64 - 8 * T::SIZE)));
    repeat(cpu, op, |cpu, wanted| {
        let to = element::<T>(cpu, ES, RDI, mask, false)?;
        let count = span::<T>(cpu, ES, RDI, mask, to, wanted, false);
        let fast = if count > 1 { cpu.host_span(ES, to, count as usize * T::SIZE, false) } else { None };
        let (done, (_, b)) = match fast {
            // SAFETY: the soft-TLB hit covers `count` elements, and `compare` stays inside them.
            Some(at) => unsafe {
                compare::<T>(
                    count,
                    !op.has(prefix::REPNE),
                    |offset| (spread, u64::load(at.add(offset))),
                    |offset| (value, T::load(at.add(offset))),
                )
            },
            None => (1, (value, cpu.load::<T>(ES, to)?)),
        };
        cpu.status = value.sub(b).1;
        advance::<T>(cpu, RDI, done, mask);
        Ok((done, goes_on(cpu, op)))
    })
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    if !instruction.is_string_instruction() {
        return None;
    }
    let size = instruction.memory_size().size();
    match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
            for_size!(size, movs, [], [])
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            for_size!(size, stos, [], [])
        }
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
            for_size!(size, lods, [], [])
        }
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => {
            for_size!(size, cmps, [], [])
        }
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
            for_size!(size, scas, [], [])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
