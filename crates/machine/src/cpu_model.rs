//! The CPU that a guest sees.

use std::arch::x86_64::__cpuid_count;
use std::fmt;
use std::str::FromStr;

use ringfence_x86::cpuid::{CpuidResult, CpuidTable, MissingFeatures, Mitigations, Model, Platform};

/// A CPU model by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuModel(pub Model);

impl CpuModel {
    /// Every model.
    pub const ALL: [Self; 4] = [Self(Model::V2), Self(Model::V3), Self(Model::Auto), Self(Model::Host)];
}

impl Default for CpuModel {
    /// What the host's CPU has, as far as every engine runs it at speed.
    fn default() -> Self {
        Self(Model::Auto)
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0.name())
    }
}

/// A CPU model that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU model {0:?}; choose x86-64-v2, x86-64-v3, auto or host")]
pub struct UnknownCpuModel(pub String);

impl FromStr for CpuModel {
    type Err = UnknownCpuModel;

    fn from_str(text: &str) -> Result<Self, UnknownCpuModel> {
        let found = Self::ALL.into_iter().find(|model| model.0.name() == text);
        found.ok_or_else(|| UnknownCpuModel(text.to_owned()))
    }
}

/// Bits of a physical address, enough for the largest machine and what lies above its memory.
const PHYSICAL_BITS: u8 = 46;

/// Subleaves that are looked at on leaves that have some.
const SUBLEAVES: u32 = 32;

/// What CPUID says on this model, on this host.
///
/// # Errors
/// [`MissingFeatures`] if the host's CPU lacks some that the model promises.
pub(crate) fn cpuid(model: CpuModel, cpus: u32, tsc_khz: u32) -> Result<CpuidTable, MissingFeatures> {
    let platform = Platform {
        cpus,
        tsc_khz,
        apic_khz: (ringfence_irqchip::TIMER_HZ / 1000) as u32,
        physical_bits: PHYSICAL_BITS,
        mitigations: Mitigations::NotNeeded,
    };
    model.0.table(&host(), &platform)
}

/// What CPUID says on the host.
fn host() -> CpuidTable {
    let mut table = CpuidTable::default();
    for first in [0, 0x8000_0000] {
        // The first leaf of a range tells its last (SDM 2A, CPUID).
        for leaf in first..=__cpuid_count(first, 0).eax.min(first + 0xff) {
            let subleaves = if matches!(leaf, 4 | 7 | 0xb | 0xd | 0x8000_001d) { SUBLEAVES } else { 1 };
            for subleaf in 0..subleaves {
                let raw = __cpuid_count(leaf, subleaf);
                table.set(leaf, subleaf, CpuidResult::new(raw.eax, raw.ebx, raw.ecx, raw.edx));
            }
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for model in CpuModel::ALL {
            assert_eq!(model.to_string().parse(), Ok(model));
        }
        assert!("z80".parse::<CpuModel>().is_err());
    }

    #[test]
    fn every_x86_64_host_of_today_runs_the_lowest_model() {
        let table = cpuid(CpuModel(Model::V2), 1, 1_000_000).unwrap();
        assert!(table.get(0, 0).eax >= 0xd);
        // SSE4.2, and no AVX.
        assert_eq!(table.get(1, 0).ecx & (1 << 20 | 1 << 28), 1 << 20);
    }
}
