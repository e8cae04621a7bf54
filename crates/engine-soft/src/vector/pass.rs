//! Which instructions the translator may execute as they are, with the guest's vector registers in the host's, and its x87 state.
//!
//! All that the table lists, but for those with rules of their own: gathers and scatters, and moves of
//! masked bytes (of which it is told what they want), and what saves, loads or resets state. x87 and MMX instructions run as they are while no exception of the unit's own is
//! pending ([`X87::Ready`], [`X87::Unmasked`]). What is to be kept of one besides is where it was, which x87 operations record: the host's
//! unit records it as well, but with the host's addresses.

use std::sync::OnceLock;

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

use super::floating::uses_mxcsr;
use super::form::{Requirement, is_x87, names_mmx, operand_alignment};
use super::state::Registers;
pub(crate) use super::state::mxcsr as mxcsr_bits;
use super::store::Vector;
use super::table::{self, X87Kind};

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

/// Whether x87 and MMX instructions may be executed as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum X87 {
    /// They may once the guest's x87 state is in the host's unit, if it then turns out that nothing is in the way.
    Away = 0,
    /// They may: the state is there, the instructions are enabled, all exceptions are masked, and none is pending.
    Ready = 1,
    /// They may not.
    Refused = 2,
    /// They may, but some exception is not masked: each that may raise one wants a look behind it.
    Unmasked = 3,
}

impl X87 {
    /// A bit that [`X87::Ready`] and [`X87::Unmasked`] have and the others have not.
    pub(crate) const PASS: u8 = 1;
}

const _: () = assert!(X87::Ready as u8 & X87::Unmasked as u8 & X87::PASS != 0);
const _: () = assert!((X87::Away as u8 | X87::Refused as u8) & X87::PASS == 0);

/// What must be in the host's registers for an instruction, or is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Units {
    /// Vector registers; `None` for none.
    pub(crate) level: Option<Level>,
    /// The x87 state, so that its instructions pass.
    pub(crate) x87: bool,
}

impl Units {
    /// Nothing.
    pub(crate) const NONE: Self = Self { level: None, x87: false };

    /// This and that.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { level: self.level.max(other.level), x87: self.x87 | other.x87 }
    }

    /// Whether it is all of what is wanted.
    pub(crate) fn cover(self, wanted: Self) -> bool {
        self.and(wanted) == self
    }
}

/// An instruction to be executed as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// What it wants in the host's registers.
    pub(crate) units: Units,
    /// What the address of the memory operand must be a multiple of; 1 for anything.
    pub(crate) alignment: u8,
    /// The x87 unit records where it is, and its operand in memory.
    pub(crate) records: bool,
    /// It may raise a SIMD exception.
    pub(crate) raises: bool,
}

/// Whether a vector, x87 or MMX instruction of 64-bit code, or of 32-bit code in its terms, can be executed as it is.
pub(crate) fn passes(instruction: &Instruction) -> Option<Passed> {
    let mut level = match instruction.encoding() {
        EncodingKind::Legacy => Level::Sse,
        EncodingKind::VEX => Level::Avx,
        EncodingKind::EVEX => Level::Avx512,
        _ => return None,
    };
    let special = table::special(instruction);
    let plain = matches!(
        special,
        Some(
            table::Special::ZeroUpper
                | table::Special::ZeroAll
                | table::Special::StoreMxcsr
                | table::Special::LoadMxcsr
        )
    );
    let of_x87 = is_x87(instruction);
    let plain_x87 = matches!(special, Some(table::Special::Wait | table::Special::StoreStatusAx));
    if !table::concerns(instruction) || special.is_some() && !plain && !plain_x87 {
        return None;
    }
    // Conversions of operands in memory to general and MMX registers name no vector register, but obey MXCSR, which comes with them.
    let mut vector = plain || uses_mxcsr(instruction.mnemonic());
    let mut alignment = 1;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                if register.is_vector_register() {
                    vector = true;
                } else if register.is_k() {
                    (vector, level) = (true, Level::Avx512);
                } else if !register.is_gpr() && !register.is_mm() && !register.is_st() {
                    return None;
                }
            }
            OpKind::Memory => {
                let size = instruction.memory_size().size();
                // Where all of the operand may be accessed, nothing can be told from a mask's leaving parts of it alone.
                let whole = matches!(size, 1 | 2 | 4 | 8 | 16 | 32 | 64) || of_x87 && size == 10;
                if !whole || instruction.memory_index().is_vector_register() {
                    return None;
                }
                alignment = operand_alignment(instruction, size);
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    let x87 = of_x87 || names_mmx(instruction) || instruction.mnemonic() == Mnemonic::Emms;
    let passes = (vector || x87) && (!vector || level < Level::Avx512 || host_has_avx512());
    let records = of_x87 && table::x87_kind(instruction.mnemonic()) == X87Kind::Operation;
    let units = Units { level: vector.then_some(level), x87 };
    passes.then_some(Passed { units, alignment, records, raises: uses_mxcsr(instruction.mnemonic()) })
}

/// Whether an instruction is a gather or a scatter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elements {
    Gathered,
    Scattered,
}

/// What a gather or scatter wants in the host's registers: it is not executed as it is, but by instructions on those.
pub(crate) fn moves_elements(instruction: &Instruction) -> Option<(Elements, Passed)> {
    let elements = match table::special(instruction)? {
        table::Special::Gather => Elements::Gathered,
        table::Special::Scatter => Elements::Scattered,
        _ => return None,
    };
    let evex = instruction.encoding() == EncodingKind::EVEX;
    let level = Some(if evex { Level::Avx512 } else { Level::Avx });
    Some((
        elements,
        Passed { units: Units { level, x87: false }, alignment: 1, records: false, raises: false },
    ))
}

/// What MASKMOVQ, MASKMOVDQU or VMASKMOVDQU wants in the host's registers; its operand in memory, which it does not name, has to be told.
pub(crate) fn stores_masked_bytes(instruction: &Instruction) -> Option<Passed> {
    if table::special(instruction)? != table::Special::MaskedBytes {
        return None;
    }
    let units = match (instruction.mnemonic(), instruction.encoding()) {
        (Mnemonic::Maskmovq, _) => Units { level: None, x87: true },
        (_, EncodingKind::Legacy) => Units { level: Some(Level::Sse), x87: false },
        _ => Units { level: Some(Level::Avx), x87: false },
    };
    Some(Passed { units, alignment: 1, records: false, raises: false })
}

impl Vector {
    /// The highest [`Level`] at which instructions may be executed as they are; 0 if at none. None is where an instruction
    /// would raise #UD or #NM.
    #[inline(always)]
    pub(crate) fn passing_level(&self) -> u8 {
        let allowed = |requirement| self.enabled().fault(requirement).is_none();
        if !allowed(Requirement::Sse) {
            0
        } else if allowed(Requirement::Avx512) && host_has_avx512() {
            Level::Avx512 as u8
        } else if allowed(Requirement::Avx) {
            Level::Avx as u8
        } else {
            Level::Sse as u8
        }
    }

    /// Whether x87 and MMX instructions may be executed as they are.
    #[inline(always)]
    pub(crate) fn x87_passes(&self) -> X87 {
        let denied = |requirement| self.enabled().fault(requirement).is_some();
        if denied(Requirement::X87) || denied(Requirement::Mmx) {
            return X87::Refused;
        }
        self.unit.passes()
    }

    /// Brings the x87 state into the host's unit, for instructions to be executed as they are.
    pub(crate) fn bring_x87(&mut self) {
        self.unit.ensure_live();
    }

    /// Address of the register file. It stays where it is as long as the vCPU does.
    #[inline(always)]
    pub(crate) fn registers_address(&self) -> u64 {
        (&raw const *self.unit.registers) as u64
    }
}

/// Offsets in the register file.
pub(crate) mod offset {
    use super::{Registers, Vector};
    use std::mem::offset_of;

    /// Register 0; the others follow, 64 bytes each.
    pub(crate) const ZMM: i32 = offset_of!(Registers, zmm) as i32;
    /// Opmask register 0; the others follow.
    pub(crate) const K: i32 = offset_of!(Registers, k) as i32;
    /// The guest's MXCSR.
    pub(crate) const MXCSR: i32 = offset_of!(Registers, mxcsr) as i32;
    /// What follows from that: see [`Registers::set_mxcsr`].
    pub(crate) const MXCSR_RUN: i32 = offset_of!(Registers, mxcsr_run) as i32;
    pub(crate) const MXCSR_UNMASKED: i32 = offset_of!(Registers, mxcsr_unmasked) as i32;
    /// Rust's.
    pub(crate) const MXCSR_HOST: i32 = offset_of!(Registers, mxcsr_host) as i32;

    /// Of what the x87 unit records, in [`Vector`]: instruction pointer, its segment's selector, opcode, data pointer and its selector.
    pub(crate) const FIP: usize = offset_of!(Vector, unit.pointers.fip);
    pub(crate) const FCS: usize = offset_of!(Vector, unit.pointers.fcs);
    pub(crate) const FOP: usize = offset_of!(Vector, unit.pointers.fop);
    pub(crate) const FDP: usize = offset_of!(Vector, unit.pointers.fdp);
    pub(crate) const FDS: usize = offset_of!(Vector, unit.pointers.fds);
}
