//! Names of CPU models.

use std::fmt;
use std::str::FromStr;

use ringfence_x86::cpuid::CpuidTable;

/// The CPU that a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CpuModel {
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: and AVX2, BMI, FMA.
    V3,
    /// What the host's CPU has, as far as the engine can run it.
    #[default]
    Host,
}

impl CpuModel {
    /// Every model with its name.
    pub const ALL: [(&'static str, Self); 3] =
        [("x86-64-v2", Self::V2), ("x86-64-v3", Self::V3), ("host", Self::Host)];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, model)| *model == self).map_or("", |(name, _)| name)
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A CPU model that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU model {0:?}; choose x86-64-v2, x86-64-v3 or host")]
pub struct UnknownCpuModel(pub String);

impl FromStr for CpuModel {
    type Err = UnknownCpuModel;

    fn from_str(text: &str) -> Result<Self, UnknownCpuModel> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, model)| *model).ok_or_else(|| UnknownCpuModel(text.to_owned()))
    }
}

/// What CPUID says on this model.
pub(crate) fn cpuid(_model: CpuModel) -> CpuidTable {
    CpuidTable::default()
}
