//! Memory type range registers and the page attribute table (SDM 3A 11.11, 11.12). They are stored and checked, but all
//! memory is write-back here.

use ringfence_x86::{Exception, msr};

use crate::interp::cpu::Cpu;

/// Pairs of variable-range registers.
const VARIABLE: u32 = 8;
/// IA32_MTRRCAP: that many, fixed ranges, write-combining.
pub(super) const CAPABILITY: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;
/// IA32_PAT after power-on.
pub(super) const PAT_RESET: u64 = 0x0007_0406_0007_0406;

const fn is_memory_type(value: u64) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

fn every_byte(value: u64, good: impl Fn(u64) -> bool) -> bool {
    value.to_le_bytes().into_iter().all(|byte| good(u64::from(byte)))
}

/// Whether an MSR is one of these.
pub(super) fn is_memory_type_msr(number: u32) -> bool {
    matches!(
        number,
        msr::PAT
            | msr::MTRR_DEFAULT_TYPE
            | msr::MTRR_FIX64K_00000
            | msr::MTRR_FIX16K_80000
            | msr::MTRR_FIX16K_A0000
    ) || (msr::MTRR_PHYS_BASE0..msr::MTRR_PHYS_BASE0 + 2 * VARIABLE).contains(&number)
        || (msr::MTRR_FIX4K_C0000..msr::MTRR_FIX4K_C0000 + 8).contains(&number)
}

impl Cpu {
    pub(super) fn read_memory_type_msr(&self, number: u32) -> u64 {
        match self.msrs.get(number) {
            Some(value) => value,
            None if number == msr::PAT => PAT_RESET,
            None => 0,
        }
    }

    /// Whether such an MSR can hold a value.
    pub(super) fn check_memory_type_msr(&self, number: u32, value: u64) -> Result<(), Exception> {
        let physical = (1_u64 << self.physical_bits) - 1;
        let good = match number {
            // UC- (7) is a type only here.
            msr::PAT => every_byte(value, |t| is_memory_type(t) || t == 7),
            msr::MTRR_DEFAULT_TYPE => value & !0xcff == 0 && is_memory_type(value & 0xff),
            _ if number >= msr::MTRR_FIX64K_00000 => every_byte(value, is_memory_type),
            // Even numbers are bases, odd ones masks.
            _ if number.is_multiple_of(2) => {
                value & !(physical & !0xfff | 0xff) == 0 && is_memory_type(value & 0xff)
            }
            _ => value & !(physical & !0xfff | 0x800) == 0,
        };
        if good { Ok(()) } else { Err(Exception::GP0) }
    }
}
