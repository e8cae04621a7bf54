//! Which instruction-set extensions a CPU offers, in the decoder's own terms.

use iced_x86::CpuidFeature;
use ringfence_x86::cpuid::{CpuidResult, Output};

/// A set of the decoder's CPUID features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet([u64; 4]);

/// Feature, leaf, subleaf, register, bit (SDM 2A CPUID; APM 3 appendix D).
type Row = (CpuidFeature, u32, u32, Output, u8);

/// Where CPUID announces each feature of instructions.
#[rustfmt::skip]
const ROWS: &[Row] = &[
    (CpuidFeature::FPU, 1, 0, Output::Edx, 0),
    (CpuidFeature::FPU287, 1, 0, Output::Edx, 0),
    (CpuidFeature::FPU387, 1, 0, Output::Edx, 0),
    (CpuidFeature::CMOV, 1, 0, Output::Edx, 15),
    (CpuidFeature::MMX, 1, 0, Output::Edx, 23),
    (CpuidFeature::FXSR, 1, 0, Output::Edx, 24),
    (CpuidFeature::SSE, 1, 0, Output::Edx, 25),
    (CpuidFeature::SSE2, 1, 0, Output::Edx, 26),
    (CpuidFeature::SSE3, 1, 0, Output::Ecx, 0),
    (CpuidFeature::PCLMULQDQ, 1, 0, Output::Ecx, 1),
    (CpuidFeature::SSSE3, 1, 0, Output::Ecx, 9),
    (CpuidFeature::FMA, 1, 0, Output::Ecx, 12),
    (CpuidFeature::SSE4_1, 1, 0, Output::Ecx, 19),
    (CpuidFeature::SSE4_2, 1, 0, Output::Ecx, 20),
    (CpuidFeature::AES, 1, 0, Output::Ecx, 25),
    (CpuidFeature::XSAVE, 1, 0, Output::Ecx, 26),
    (CpuidFeature::AVX, 1, 0, Output::Ecx, 28),
    (CpuidFeature::F16C, 1, 0, Output::Ecx, 29),
    (CpuidFeature::AVX2, 7, 0, Output::Ebx, 5),
    (CpuidFeature::AVX512F, 7, 0, Output::Ebx, 16),
    (CpuidFeature::AVX512DQ, 7, 0, Output::Ebx, 17),
    (CpuidFeature::AVX512_IFMA, 7, 0, Output::Ebx, 21),
    (CpuidFeature::AVX512CD, 7, 0, Output::Ebx, 28),
    (CpuidFeature::SHA, 7, 0, Output::Ebx, 29),
    (CpuidFeature::AVX512BW, 7, 0, Output::Ebx, 30),
    (CpuidFeature::AVX512VL, 7, 0, Output::Ebx, 31),
    (CpuidFeature::AVX512_VBMI, 7, 0, Output::Ecx, 1),
    (CpuidFeature::AVX512_VBMI2, 7, 0, Output::Ecx, 6),
    (CpuidFeature::GFNI, 7, 0, Output::Ecx, 8),
    (CpuidFeature::VAES, 7, 0, Output::Ecx, 9),
    (CpuidFeature::VPCLMULQDQ, 7, 0, Output::Ecx, 10),
    (CpuidFeature::AVX512_VNNI, 7, 0, Output::Ecx, 11),
    (CpuidFeature::AVX512_BITALG, 7, 0, Output::Ecx, 12),
    (CpuidFeature::AVX512_VPOPCNTDQ, 7, 0, Output::Ecx, 14),
    (CpuidFeature::AVX_VNNI, 7, 1, Output::Eax, 4),
    (CpuidFeature::AVX512_BF16, 7, 1, Output::Eax, 5),
    (CpuidFeature::AVX_IFMA, 7, 1, Output::Eax, 23),
    (CpuidFeature::AVX_VNNI_INT8, 7, 1, Output::Edx, 4),
    (CpuidFeature::AVX_NE_CONVERT, 7, 1, Output::Edx, 5),
    (CpuidFeature::XSAVEOPT, 0xd, 1, Output::Eax, 0),
    (CpuidFeature::XSAVEC, 0xd, 1, Output::Eax, 1),
    (CpuidFeature::XSAVES, 0xd, 1, Output::Eax, 3),
    (CpuidFeature::SSE4A, 0x8000_0001, 0, Output::Ecx, 6),
    // Of the integer side.
    (CpuidFeature::SEP, 1, 0, Output::Edx, 11),
    (CpuidFeature::CMPXCHG16B, 1, 0, Output::Ecx, 13),
    (CpuidFeature::MOVBE, 1, 0, Output::Ecx, 22),
    (CpuidFeature::POPCNT, 1, 0, Output::Ecx, 23),
    (CpuidFeature::RDRAND, 1, 0, Output::Ecx, 30),
    (CpuidFeature::FSGSBASE, 7, 0, Output::Ebx, 0),
    (CpuidFeature::BMI1, 7, 0, Output::Ebx, 3),
    (CpuidFeature::BMI2, 7, 0, Output::Ebx, 8),
    (CpuidFeature::INVPCID, 7, 0, Output::Ebx, 10),
    (CpuidFeature::RDSEED, 7, 0, Output::Ebx, 18),
    (CpuidFeature::ADX, 7, 0, Output::Ebx, 19),
    (CpuidFeature::SMAP, 7, 0, Output::Ebx, 20),
    (CpuidFeature::CLFLUSHOPT, 7, 0, Output::Ebx, 23),
    (CpuidFeature::CLWB, 7, 0, Output::Ebx, 24),
    (CpuidFeature::RDPID, 7, 0, Output::Ecx, 22),
    (CpuidFeature::SERIALIZE, 7, 0, Output::Edx, 14),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, Output::Ecx, 5),
    (CpuidFeature::SYSCALL, 0x8000_0001, 0, Output::Edx, 11),
    (CpuidFeature::RDTSCP, 0x8000_0001, 0, Output::Edx, 27),
];

impl FeatureSet {
    /// No feature.
    pub const EMPTY: Self = Self([0; 4]);

    /// Adds one feature.
    pub fn insert(&mut self, feature: CpuidFeature) {
        let bit = feature as usize;
        if let Some(word) = self.0.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    }

    /// Whether a feature is in the set.
    pub fn contains(&self, feature: CpuidFeature) -> bool {
        let bit = feature as usize;
        self.0.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 != 0)
    }

    /// Whether every one of `features` is in the set.
    pub fn contains_all(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|&feature| self.contains(feature))
    }

    /// What both sets have.
    pub fn intersection(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// Without what XCR0 cannot enable: AVX and what builds on it, or AVX-512.
    fn without_extended_state(mut self, avx: bool, avx512: bool) -> Self {
        for &(feature, ..) in ROWS {
            let name = format!("{feature:?}");
            let evex = name.starts_with("AVX512");
            let vex = name.starts_with("AVX")
                || matches!(
                    feature,
                    CpuidFeature::FMA | CpuidFeature::F16C | CpuidFeature::VAES | CpuidFeature::VPCLMULQDQ
                );
            if (evex && !avx512) || (vex && !avx) {
                let bit = feature as usize;
                self.0[bit / 64] &= !(1 << (bit % 64));
            }
        }
        self
    }

    /// The features that a CPUID table announces.
    pub fn from_cpuid(cpuid: impl Fn(u32, u32) -> CpuidResult) -> Self {
        let mut set = Self::EMPTY;
        for &(feature, leaf, subleaf, output, bit) in ROWS {
            let top = cpuid(leaf & 0x8000_0000, 0).eax;
            if leaf > top {
                continue;
            }
            let value = cpuid(leaf, subleaf).get(output);
            if value >> bit & 1 != 0 {
                set.insert(feature);
            }
        }
        set
    }

    /// The features of the host, as far as its operating system has enabled their state. Found out once: CPUID
    /// is slow inside a virtual machine.
    pub fn host() -> Self {
        static HOST: std::sync::OnceLock<FeatureSet> = std::sync::OnceLock::new();
        *HOST.get_or_init(|| {
            Self::from_cpuid(super::call::host_cpuid).without_extended_state(
                std::arch::is_x86_feature_detected!("avx"),
                std::arch::is_x86_feature_detected!("avx512f"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_has_at_least_the_baseline() {
        let host = FeatureSet::host();
        assert!(host.contains_all(&[CpuidFeature::FPU, CpuidFeature::SSE, CpuidFeature::SSE2]));
        assert!(!host.contains(CpuidFeature::KNC));
    }

    #[test]
    fn hidden_leaf_hides_its_features() {
        let set = FeatureSet::from_cpuid(|leaf, _| match leaf {
            0 => CpuidResult { eax: 1, ..Default::default() },
            7 => CpuidResult { eax: !0, ebx: !0, ecx: !0, edx: !0 },
            _ => CpuidResult { edx: 1 << 25, ..Default::default() },
        });
        assert!(set.contains(CpuidFeature::SSE));
        assert!(!set.contains(CpuidFeature::AVX2));
        assert!(!set.contains(CpuidFeature::SSE2));
    }
}
