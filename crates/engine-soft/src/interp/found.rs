//! Instructions of 64-bit and of 32-bit code as they are found: by their patterns, or by decoding. What becomes of those of 32-bit code is
//! in [`super::code32`].

use iced_x86::{Decoder, FlowControl, Instruction};

use super::code32;
use super::cpu::{CodeSize, Cpu};
use super::decode::{Decoded, decode_one, ends_block, lower_disguised};
use super::features::Features;
use super::layout::Layout;
use super::op::Op;
use super::patterns::{Marks, Pattern};
use super::window::Code64;

/// [`Marks`] of an instruction.
pub(super) mod marks {
    /// It is one; otherwise its operation raises an exception.
    pub(in super::super) const EXISTS: u8 = 1;
    /// The host takes its bytes for the same.
    pub(in super::super) const SAME: u8 = 2;
    /// See [`super::ends_block`].
    pub(in super::super) const ENDS: u8 = 4;
    /// It is a conditional branch, behind which a run goes on.
    pub(in super::super) const PASSES: u8 = 8;
    /// Control goes to the next instruction.
    pub(in super::super) const FLOWS: u8 = 16;
    /// It is for its handler to execute, whatever its form is.
    pub(in super::super) const HANDLED: u8 = 32;
    /// Other bytes take the place of its own; see [`code32::other_bytes`](super::super::code32::other_bytes).
    pub(in super::super) const OTHER: u8 = 64;
}

/// LOOP, LOOPE, LOOPNE, JECXZ and JRCXZ.
pub(crate) fn is_counted(instruction: &Instruction) -> bool {
    instruction.is_loop() || instruction.is_loopcc() || instruction.is_jcx_short()
}

/// Whether such an instruction counts in CX. It is its handler's then.
pub(crate) fn counts_in_cx(instruction: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(
        instruction.code(),
        C::Loop_rel8_32_CX | C::Loope_rel8_32_CX | C::Loopne_rel8_32_CX | C::Jcxz_rel8_32
    )
}

pub(super) fn marks_of(instruction: &Instruction, same: bool) -> Marks {
    // A branch with a 16-bit target (AMD's processors have them in 64-bit code) is the handler's business.
    let branches = instruction.is_jcc_short_or_near() || is_counted(instruction);
    let passes = branches && instruction.op0_kind() == iced_x86::OpKind::NearBranch64;
    let mark = |there, mark| if there { mark } else { 0 };
    marks::EXISTS
        | mark(same, marks::SAME)
        | mark(ends_block(instruction, CodeSize::Bits64), marks::ENDS)
        | mark(passes, marks::PASSES)
        | mark(instruction.flow_control() == FlowControl::Next, marks::FLOWS)
}

/// An instruction that was found in memory, in the terms of 64-bit code. It looks as if it were at zero: code may be mapped anywhere.
pub struct Found<'a> {
    /// Its pattern, if it has one.
    pub(crate) pattern: Option<Pattern>,
    /// Its length in bytes.
    pub length: u8,
    pub(super) marks: Marks,
    pub(super) code: Code64<'a>,
    /// It is of 32-bit code.
    pub(super) narrow: bool,
    pub(super) features: &'a Features,
    /// It, if it had to be decoded.
    pub(super) decoded: Option<&'a Instruction>,
}

impl std::fmt::Debug for Found<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Found").field("pattern", &self.pattern).finish_non_exhaustive()
    }
}

impl Found<'_> {
    #[inline(always)]
    pub(super) fn has(&self, mark: Marks) -> bool {
        self.marks & mark != 0
    }

    /// Whether it is an instruction; otherwise its operation raises an exception.
    #[inline(always)]
    pub fn exists(&self) -> bool {
        self.has(marks::EXISTS)
    }

    /// Whether it is an instruction whose form says how it can be translated.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.marks & (marks::EXISTS | marks::HANDLED) == marks::EXISTS
    }

    /// Whether the host takes [`Found::host_bytes`] for the same, but for an operand in memory.
    #[inline(always)]
    pub fn is_the_hosts(&self) -> bool {
        self.has(marks::SAME)
    }

    /// Whether control goes to the next instruction.
    pub fn flows(&self) -> bool {
        self.has(marks::FLOWS)
    }

    /// Its bytes, or those that take their place in translated code, and how many; behind them is anything.
    #[inline(always)]
    pub(crate) fn host_bytes(&self) -> ([u8; 16], u8) {
        let bytes = *self.code.all.first_chunk().unwrap_or(&[0; 16]);
        if self.has(marks::OTHER) { code32::other_bytes(bytes, self.length) } else { (bytes, self.length) }
    }

    /// The instruction.
    pub fn instruction(&self) -> Instruction {
        match self.decoded {
            Some(instruction) => *instruction,
            None => decode_again(self.code.bytes(), self.length, self.narrow, self.features),
        }
    }

    /// Whether the decoder library makes the same of it.
    #[cfg(debug_assertions)]
    fn holds(&self, cpu: &mut Cpu, op: &Op) -> bool {
        let (mut instruction, mut other) = (Instruction::default(), Op::UNDEFINED);
        let marks = find_anew(cpu, self.code.bytes(), self.narrow, None, &mut instruction, &mut other);
        marks == Some((self.marks, None)) && op.is(&other) && self.instruction() == instruction
    }
}

/// An instruction that has been found in some bytes of 64-bit code, or of 32-bit code (`narrow`).
pub(crate) fn decode_again(bytes: &[u8], length: u8, narrow: bool, features: &Features) -> Instruction {
    let bytes = bytes.get(..length.into()).unwrap_or(bytes);
    let bits = if narrow { 32 } else { 64 };
    let mut instruction = Decoder::with_ip(bits, bytes, 0, features.decoder_options()).decode();
    features.disguise(&mut instruction, bytes);
    if narrow {
        code32::to_64_bit(&mut instruction);
    }
    instruction
}

/// Finds what is at the start of some bytes of 64-bit code, or of 32-bit code if `NARROW`; `None` if they are too few. Its operation goes
/// to `op`, and `decoded` is changed if it had to be decoded. The operation is that of the instruction in its own mode.
#[inline(always)]
pub(super) fn find<'a, const NARROW: bool>(
    cpu: &'a mut Cpu,
    code: Code64<'a>,
    decoded: &'a mut Instruction,
    op: &mut Op,
) -> Option<Found<'a>> {
    let narrow = NARROW;
    let layout = Layout::of::<NARROW>(code.all).filter(|layout| usize::from(layout.length) <= code.length);
    if let Some(layout) = &layout
        && let Some((marks, pattern)) = cpu.patterns.find(layout, op)
    {
        let pattern = Some(pattern);
        #[cfg(debug_assertions)]
        {
            let features = &std::sync::Arc::clone(&cpu.features);
            let found = Found { pattern, length: op.length, marks, code, narrow, features, decoded: None };
            assert!(found.holds(cpu, op), "{op:x?} of {:x?}", &code.all[..op.length.into()]);
        }
        return Some(Found {
            pattern,
            length: op.length,
            marks,
            code,
            narrow,
            features: &cpu.features,
            decoded: None,
        });
    }
    let (marks, pattern) = find_anew(cpu, code.bytes(), narrow, layout.as_ref(), decoded, op)?;
    let decoded = Some(&*decoded);
    Some(Found { pattern, length: op.length, marks, code, narrow, features: &cpu.features, decoded })
}

/// What the decoder library finds at the start of some bytes of either, likewise. It is kept if it has a layout.
#[inline(never)]
fn find_anew(
    cpu: &mut Cpu,
    bytes: &[u8],
    narrow: bool,
    layout: Option<&Layout>,
    instruction: &mut Instruction,
    op: &mut Op,
) -> Option<(Marks, Option<Pattern>)> {
    match decode_one(cpu, bytes, if narrow { CodeSize::Bits32 } else { CodeSize::Bits64 }) {
        Decoded::Instruction(decoded) => {
            *instruction = decoded;
            cpu.features.disguise(instruction, bytes);
            *op = lower_disguised(cpu, instruction, bytes);
            let marks = if narrow {
                code32::adapt(cpu, bytes, &decoded, instruction, op)
            } else {
                marks_of(instruction, instruction.code() == decoded.code())
            };
            Some((marks, layout.map(|layout| cpu.patterns.keep(layout, instruction, *op, marks))))
        }
        Decoded::Bad(bad) => {
            *op = bad;
            Some((marks::ENDS, None))
        }
        Decoded::Truncated => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::layout::LOOKED_AT;
    use super::*;

    /// Shows `look` what is at the start of some bytes, with something else behind them, and its operation: the length.
    pub(crate) fn show(cpu: &mut Cpu, bytes: &[u8], look: impl FnOnce(&Found<'_>, &Op)) -> Option<u8> {
        show_of::<false>(cpu, bytes, look)
    }

    /// Likewise, of 32-bit code if `NARROW`.
    pub(crate) fn show_of<const NARROW: bool>(
        cpu: &mut Cpu,
        bytes: &[u8],
        look: impl FnOnce(&Found<'_>, &Op),
    ) -> Option<u8> {
        let mut all = [0x5a; LOOKED_AT];
        all[..bytes.len()].copy_from_slice(bytes);
        let code = Code64 { all: &all, length: bytes.len() };
        let mut op = Op::UNDEFINED;
        let mut decoded = Instruction::default();
        let found = find::<NARROW>(cpu, code, &mut decoded, &mut op)?;
        look(&found, &op);
        Some(found.length)
    }
}
