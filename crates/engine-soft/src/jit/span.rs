//! What rows are made of: the bases that accesses are counted from, how they move, and what is accessed from each
//! ([`super::group`]).

use iced_x86::Code;

use super::native::Kind;
use super::step::Step;
use crate::interp::op::{Op, ZERO};
use crate::vector::pass::Units;

/// The longest span, in bytes. Spans are rarely longer, and a longer one crosses pages more often.
const MAX_SPAN: i64 = 1024;
/// How far it may be from its base: a displacement.
const FARTHEST: i64 = 1 << 30;
pub(super) const RSP: u8 = 4;

/// What a step accesses: register, first byte, byte behind the last, whether it writes, and what the address must be a
/// multiple of.
pub(super) struct Access {
    pub(super) base: Base,
    pub(super) from: i64,
    pub(super) to: i64,
    pub(super) write: bool,
    pub(super) alignment: u8,
}

/// What displacements are counted from: a base register and an index register with its shift, each if it is not [`ZERO`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) register: u8,
    pub(super) index: u8,
    pub(super) scale: u8,
}

pub(super) const STACK_POINTER: Base = Base { register: RSP, index: ZERO as u8, scale: 0 };

impl Base {
    /// That of an operand in memory.
    pub(super) fn of(op: &Op) -> Self {
        let Op { base: register, index, scale, .. } = *op;
        // A sum is the same the other way round.
        if scale == 0 && index < register {
            return Self { register: index, index: register, scale };
        }
        Self { register, index, scale }
    }

    /// Its registers, one bit each.
    pub(super) fn registers(self) -> u32 {
        1 << self.register | 1 << self.index
    }

    /// How far it moves when its registers do.
    pub(super) fn moved(self, by: impl Fn(u8) -> i64) -> i64 {
        let by = |register| if usize::from(register) == ZERO { 0 } else { by(register) };
        by(self.register) + (by(self.index) << self.scale)
    }
}

/// A general-purpose register to which an instruction adds a constant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    pub(super) register: u8,
    pub(super) by: i64,
}

impl Move {
    /// What an instruction without an operand in memory does, if that is all that it does to general-purpose registers. The stack
    /// pointer is another matter. In 32-bit code (`narrow`) registers have 32 bits.
    pub(super) fn of(step: &Step, narrow: bool) -> Option<Self> {
        let op = &step.op;
        let by = match op.code {
            _ if narrow => Self::distance_of_32(op)?,
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => op.immediate as i64,
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => -(op.immediate as i64),
            Code::Inc_rm64 => 1,
            Code::Dec_rm64 => -1,
            Code::Lea_r64_m
                if op.base == op.dst && usize::from(op.index) == ZERO && op.address_mask == u64::MAX =>
            {
                op.displacement
            }
            _ => return None,
        };
        let plain = matches!(step.kind, Kind::Same | Kind::Address)
            && (step.facts.memory.is_none() || step.kind == Kind::Address)
            && op.dst != RSP;
        plain.then_some(Self { register: op.dst, by })
    }

    /// How far an instruction of 32-bit code moves the register that it names first.
    fn distance_of_32(op: &Op) -> Option<i64> {
        let constant = i64::from(op.immediate as i32);
        match op.code {
            Code::Add_rm32_imm8 | Code::Add_rm32_imm32 | Code::Add_EAX_imm32 => Some(constant),
            Code::Sub_rm32_imm8 | Code::Sub_rm32_imm32 | Code::Sub_EAX_imm32 => Some(-constant),
            Code::Inc_rm32 | Code::Inc_r32 => Some(1),
            Code::Dec_rm32 | Code::Dec_r32 => Some(-1),
            Code::Lea_r32_m
                if op.base == op.dst && usize::from(op.index) == ZERO && op.address_mask == 0xffff_ffff =>
            {
                Some(op.displacement)
            }
            _ => None,
        }
    }

    /// How far it moves a register.
    pub(super) fn of_register(self, register: u8) -> i64 {
        if register == self.register { self.by } else { 0 }
    }
}

/// What a row accesses from one base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) base: Base,
    pub(super) lowest: i64,
    pub(super) highest: i64,
    pub(super) write: bool,
    /// What some address must be a multiple of, and that address's distance from the register.
    pub(super) alignment: Option<(u8, i64)>,
    /// How far the register has moved.
    pub(super) moved: i64,
    /// The row comes back to it from another base.
    pub(super) again: bool,
}

impl Span {
    pub(super) fn new(base: Base) -> Self {
        Self {
            base,
            lowest: i64::MAX,
            highest: i64::MIN,
            write: false,
            alignment: None,
            moved: 0,
            again: false,
        }
    }

    /// Adds an access; `None` if one check cannot cover it as well.
    pub(super) fn add(&mut self, access: &Access) -> Option<()> {
        let at = access.from + self.moved;
        self.lowest = self.lowest.min(at);
        self.highest = self.highest.max(access.to + self.moved);
        self.write |= access.write;
        if access.alignment > 1 {
            match self.alignment {
                // One address that is a multiple of the larger number settles them all.
                Some((alignment, other)) => {
                    let settled = alignment == access.alignment && (at - other) % i64::from(alignment) == 0;
                    settled.then_some(())?;
                }
                None => self.alignment = Some((access.alignment, at)),
            }
        }
        let near = -FARTHEST < self.lowest && self.highest < FARTHEST;
        (near && self.highest - self.lowest <= MAX_SPAN).then_some(())
    }

    pub(super) fn size(&self) -> i32 {
        (self.highest - self.lowest) as i32
    }
}

/// Most bases of a row.
pub(super) const BASES: usize = 6;
/// Most instructions of a row.
pub(super) const MOST_STEPS: usize = 64;

/// A row: the steps up to `end`, and what to check, that of the first access first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) end: usize,
    pub(super) spans: [Span; BASES],
    pub(super) count: usize,
    /// What it wants in the host's registers.
    pub(super) units: Units,
}

impl Row {
    pub(super) fn spans(&self) -> &[Span] {
        &self.spans[..self.count]
    }

    pub(super) fn find(&self, base: Base) -> Option<usize> {
        self.spans().iter().position(|span| span.base == base)
    }

    /// Makes room for one more base: its place, if there is one.
    pub(super) fn add(&mut self, span: Span) -> Option<usize> {
        *self.spans.get_mut(self.count)? = span;
        self.count += 1;
        Some(self.count - 1)
    }

    /// A register has moved.
    pub(super) fn move_spans(&mut self, by: Move) {
        for span in &mut self.spans[..self.count] {
            span.moved += span.base.moved(|register| by.of_register(register));
        }
    }

    /// The registers of its bases.
    pub(super) fn registers(&self) -> u32 {
        self.spans().iter().fold(0, |all, span| all | span.base.registers())
    }

    /// Those of its bases besides the stack pointer alone.
    pub(super) fn others(&self) -> u32 {
        let others = self.spans().iter().filter(|span| span.base != STACK_POINTER);
        others.fold(0, |all, span| all | span.base.registers())
    }
}
