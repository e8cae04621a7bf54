//! Which instructions the translator may execute as they are, with the guest's vector registers in the host's.
//!
//! All that the table lists, but for those with rules of their own: x87 and MMX, whose records show addresses, and gathers and
//! scatters.

use std::sync::OnceLock;

use iced_x86::{EncodingKind, Instruction, OpKind};

use super::form::{Requirement, names_mmx, operand_alignment};
use super::state::Registers;
use super::store::Vector;
use super::table;

/// Which registers must be in the host's for an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    /// The low 128 bits of registers 0 to 15.
    Sse = 1,
    /// The low 256 bits; the bits above are zero.
    Avx = 2,
    /// All 512 bits of registers 0 to 31, and the opmask registers.
    Avx512 = 3,
}

/// How many there are.
pub(crate) const LEVELS: usize = 3;

/// Whether the host's processor has the registers of the highest level, and all of AVX-512 that moving them takes: opmask
/// registers of 64 bits are AVX512BW's.
pub(crate) fn host_has_avx512() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"))
}

/// An instruction to be executed as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) level: Level,
    /// What the address of the memory operand must be a multiple of; 1 for anything.
    pub(crate) alignment: u8,
}

/// Whether a vector instruction of 64-bit code can be executed as it is.
pub(crate) fn passes(instruction: &Instruction) -> Option<Passed> {
    let mut level = match instruction.encoding() {
        EncodingKind::Legacy => Level::Sse,
        EncodingKind::VEX => Level::Avx,
        EncodingKind::EVEX => Level::Avx512,
        _ => return None,
    };
    let plain = matches!(
        table::special(instruction),
        Some(table::Special::ZeroUpper | table::Special::ZeroAll | table::Special::StoreMxcsr)
    );
    if !table::concerns(instruction) || table::special(instruction).is_some() && !plain {
        return None;
    }
    let mut vector = plain;
    let mut alignment = 1;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                if register.is_vector_register() {
                    vector = true;
                } else if register.is_k() {
                    (vector, level) = (true, Level::Avx512);
                } else if !register.is_gpr() {
                    return None;
                }
            }
            OpKind::Memory => {
                let size = instruction.memory_size().size();
                // Where all of the operand may be accessed, nothing can be told from a mask's leaving parts of it alone.
                let whole = matches!(size, 1 | 2 | 4 | 8 | 16 | 32 | 64);
                if !whole || instruction.memory_index().is_vector_register() {
                    return None;
                }
                alignment = operand_alignment(instruction, size);
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    let passes = vector && !names_mmx(instruction) && (level < Level::Avx512 || host_has_avx512());
    passes.then_some(Passed { level, alignment })
}

impl Vector {
    /// The highest [`Level`] at which instructions may be executed as they are; 0 if at none. None is where an instruction
    /// would raise #UD or #NM, nor where a SIMD exception is not masked.
    #[inline(always)]
    pub(crate) fn passing_level(&self) -> u8 {
        let allowed = |requirement| self.enabled().fault(requirement).is_none();
        if self.unit.registers.mxcsr_unmasked != 0 || !allowed(Requirement::Sse) {
            0
        } else if allowed(Requirement::Avx512) && host_has_avx512() {
            Level::Avx512 as u8
        } else if allowed(Requirement::Avx) {
            Level::Avx as u8
        } else {
            Level::Sse as u8
        }
    }

    /// Address of the register file. It stays where it is as long as the vCPU does.
    #[inline(always)]
    pub(crate) fn registers_address(&self) -> u64 {
        (&raw const *self.unit.registers) as u64
    }
}

/// Offsets in the register file.
pub(crate) mod offset {
    use super::Registers;
    use std::mem::offset_of;

    /// Register 0; the others follow, 64 bytes each.
    pub(crate) const ZMM: i32 = offset_of!(Registers, zmm) as i32;
    /// Opmask register 0; the others follow.
    pub(crate) const K: i32 = offset_of!(Registers, k) as i32;
    /// The guest's MXCSR.
    pub(crate) const MXCSR: i32 = offset_of!(Registers, mxcsr) as i32;
    /// Rust's.
    pub(crate) const MXCSR_HOST: i32 = offset_of!(Registers, mxcsr_host) as i32;
}
