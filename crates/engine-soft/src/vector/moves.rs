//! Handlers of the direct operations: no thunk, no table, operands taken from the operation itself.

use iced_x86::Instruction;
use ringfence_x86::Exception;
use ringfence_x86::paging::is_canonical;

use super::direct::{Direct, Operation, Place, Upper};
use super::form::{Form, Requirement, wide_alignment};
use super::ops::has_memory;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::mmu::tlb::Class;

/// What becomes of the bits above the result, as a constant parameter: see [`Upper`].
const KEEP: u8 = 0;
const CLEAR_TO_128: u8 = 1;
const CLEAR: u8 = 2;

const AND: u8 = 0;
const AND_NOT: u8 = 1;
const OR: u8 = 2;
const XOR: u8 = 3;

const SSE: u8 = Requirement::Sse as u8;
const AVX: u8 = Requirement::Avx as u8;

/// Marks in `Op::aux` above the requirement: the alignment, and that MXCSR.MM waives it.
const ALIGNMENT: u32 = 8;
const WAIVABLE: u32 = 16;

/// The operation for a direct form.
pub(super) fn lower(instruction: &Instruction, form: &Form, direct: Direct) -> Op {
    let mut op = Op::new(instruction, handler(direct));
    op.aux = form.requirement as u32;
    if let Some(memory) = form.memory {
        op.aux |= u32::from(memory.alignment) << ALIGNMENT | u32::from(memory.waivable) << WAIVABLE;
    }
    // A bitwise operation's sources are `src` and `third`, or `src` and memory; legacy forms repeat `dst`.
    if direct.operation() != Operation::Move && instruction.op_count() == 2 {
        if !has_memory(instruction) {
            op.third = op.src;
        }
        op.src = op.dst;
    }
    op
}

macro_rules! by_width {
    ($size:expr, $function:ident, $($rest:expr),*) => {
        match $size {
            16 => $function::<2, $({ $rest }),*>,
            32 => $function::<4, $({ $rest }),*>,
            _ => $function::<8, $({ $rest }),*>,
        }
    };
}

macro_rules! by_upper {
    ($upper:expr, $function:ident, $($rest:tt),*) => {
        match $upper {
            Upper::Keep => $function::<$($rest,)* KEEP>,
            Upper::ClearTo128 => $function::<$($rest,)* CLEAR_TO_128>,
            Upper::Clear => $function::<$($rest,)* CLEAR>,
        }
    };
}

fn handler(direct: Direct) -> Handler {
    let size = direct.size();
    let upper = direct.upper();
    let clear = upper == Upper::Clear;
    let memory = direct.source() == Place::Bounce;
    match direct.operation() {
        Operation::Move => match (direct.destination(), direct.source()) {
            (Place::Vector, Place::Bounce) => match (size, clear) {
                (4, _) => by_upper!(upper, load_short, true),
                (8, _) => by_upper!(upper, load_short, false),
                (_, false) => by_width!(size, load, false),
                (_, true) => by_width!(size, load, true),
            },
            (Place::Bounce, _) => match size {
                4 => store_short::<true>,
                8 => store_short::<false>,
                _ => by_width!(size, store,),
            },
            (Place::General, _) => match size {
                4 => to_general::<true>,
                _ => to_general::<false>,
            },
            (_, Place::General) => match size {
                4 => by_upper!(upper, from_general, true),
                _ => by_upper!(upper, from_general, false),
            },
            _ => match (size, clear) {
                (4, _) => by_upper!(upper, copy_short, true),
                (8, _) => by_upper!(upper, copy_short, false),
                (_, false) => by_width!(size, copy, false),
                (_, true) => by_width!(size, copy, true),
            },
        },
        Operation::And => bitwise::<AND>(size, clear, memory),
        Operation::AndNot => bitwise::<AND_NOT>(size, clear, memory),
        Operation::Or => bitwise::<OR>(size, clear, memory),
        Operation::Xor => bitwise::<XOR>(size, clear, memory),
    }
}

fn bitwise<const OPERATION: u8>(size: u8, clear: bool, memory: bool) -> Handler {
    match (clear, memory) {
        (false, false) => by_width!(size, combine, OPERATION, false, false),
        (false, true) => by_width!(size, combine, OPERATION, false, true),
        (true, false) => by_width!(size, combine, OPERATION, true, false),
        (true, true) => by_width!(size, combine, OPERATION, true, true),
    }
}

impl Cpu {
    #[inline(always)]
    fn require_direct(&self, op: &Op) -> Result<(), Exception> {
        let requirement = match op.aux as u8 {
            SSE => Requirement::Sse,
            AVX => Requirement::Avx,
            _ => Requirement::Avx512,
        };
        self.require(requirement)
    }

    #[inline(always)]
    fn direct_address(&self, op: &Op, size: u64, write: bool) -> Result<u64, Exception> {
        let offset = self.effective_address(op);
        let alignment = u64::from((op.aux >> ALIGNMENT) as u8);
        let misaligned =
            self.bases[usize::from(op.segment)].wrapping_add(offset) & alignment.wrapping_sub(1) != 0;
        if misaligned && !(op.aux >> WAIVABLE & 1 != 0 && self.vector.unit.misalignment_allowed()) {
            return Err(Exception::GP0);
        }
        let linear = self.linear(op.segment, offset, size, write)?;
        let last = linear.wrapping_add(size - 1);
        if self.long_mode() && !(is_canonical(linear) && is_canonical(last)) {
            return Err(self.not_canonical(op.segment));
        }
        self.check_operand_alignment(linear, wide_alignment(size as usize))?;
        Ok(linear)
    }

    #[inline(always)]
    fn load_words<const WORDS: usize>(&mut self, op: &Op) -> Result<[u64; WORDS], Exception> {
        let linear = self.direct_address(op, 8 * WORDS as u64, false)?;
        let mut words = [0; WORDS];
        if self.class == Class::Slow || linear & 0xfff > 0x1000 - 8 * WORDS as u64 {
            let mut bytes = [0; 64];
            self.load_bytes(op.segment, linear, &mut bytes[..8 * WORDS])?;
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            return Ok(words);
        }
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.load(op.segment, linear.wrapping_add(8 * i as u64))?;
        }
        Ok(words)
    }

    #[inline(always)]
    fn vector_words<const WORDS: usize>(&self, number: u8) -> [u64; WORDS] {
        let register = &self.vector.unit.registers.zmm[usize::from(number) & 31];
        std::array::from_fn(|i| register[i])
    }

    #[inline(always)]
    fn set_vector_words<const WORDS: usize, const CLEAR: bool>(&mut self, number: u8, words: [u64; WORDS]) {
        let register = &mut self.vector.unit.registers.zmm[usize::from(number) & 31];
        register[..WORDS].copy_from_slice(&words);
        if CLEAR {
            register[WORDS..].fill(0);
        }
    }

    #[inline(always)]
    fn set_vector_short<const DOUBLEWORD: bool, const UPPER: u8>(&mut self, number: u8, value: u64) {
        let register = &mut self.vector.unit.registers.zmm[usize::from(number) & 31];
        match UPPER {
            KEEP if DOUBLEWORD => register[0] = register[0] & !0xffff_ffff | value,
            KEEP => register[0] = value,
            CLEAR_TO_128 => [register[0], register[1]] = [value, 0],
            _ => *register = [value, 0, 0, 0, 0, 0, 0, 0],
        }
    }
}

fn shorten<const DOUBLEWORD: bool>(value: u64) -> u64 {
    if DOUBLEWORD { value & 0xffff_ffff } else { value }
}

fn load<const WORDS: usize, const CLEAR: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let words = cpu.load_words::<WORDS>(op)?;
    cpu.set_vector_words::<WORDS, CLEAR>(op.dst, words);
    Ok(())
}

fn copy<const WORDS: usize, const CLEAR: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let words = cpu.vector_words::<WORDS>(op.src);
    cpu.set_vector_words::<WORDS, CLEAR>(op.dst, words);
    Ok(())
}

fn store<const WORDS: usize>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let linear = cpu.direct_address(op, 8 * WORDS as u64, true)?;
    let words = cpu.vector_words::<8>(op.src);
    cpu.put_whole(op.segment, linear, 8 * WORDS as u16, &words)
}

fn combine<const WORDS: usize, const OPERATION: u8, const CLEAR: bool, const MEMORY: bool>(
    cpu: &mut Cpu,
    op: &Op,
) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let b = if MEMORY { cpu.load_words::<WORDS>(op)? } else { cpu.vector_words::<WORDS>(op.third) };
    let a = cpu.vector_words::<WORDS>(op.src);
    let words = std::array::from_fn(|i| match OPERATION {
        AND => a[i] & b[i],
        AND_NOT => !a[i] & b[i],
        OR => a[i] | b[i],
        _ => a[i] ^ b[i],
    });
    cpu.set_vector_words::<WORDS, CLEAR>(op.dst, words);
    Ok(())
}

fn load_short<const DOUBLEWORD: bool, const UPPER: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let value = if DOUBLEWORD { cpu.read::<u32>(op)?.into() } else { cpu.read::<u64>(op)? };
    cpu.set_vector_short::<DOUBLEWORD, UPPER>(op.dst, value);
    Ok(())
}

fn store_short<const DOUBLEWORD: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let [value] = cpu.vector_words::<1>(op.src);
    if DOUBLEWORD { cpu.write(op, value as u32) } else { cpu.write(op, value) }
}

fn copy_short<const DOUBLEWORD: bool, const UPPER: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let [value] = cpu.vector_words::<1>(op.src);
    cpu.set_vector_short::<DOUBLEWORD, UPPER>(op.dst, shorten::<DOUBLEWORD>(value));
    Ok(())
}

fn from_general<const DOUBLEWORD: bool, const UPPER: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let value = shorten::<DOUBLEWORD>(cpu.regs[usize::from(op.src)]);
    cpu.set_vector_short::<DOUBLEWORD, UPPER>(op.dst, value);
    Ok(())
}

fn to_general<const DOUBLEWORD: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_direct(op)?;
    let [value] = cpu.vector_words::<1>(op.src);
    cpu.regs[usize::from(op.dst)] = shorten::<DOUBLEWORD>(value);
    Ok(())
}
