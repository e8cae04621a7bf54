//! What the CPU model offers, in the forms in which the interpreter asks.

use std::sync::OnceLock;

use iced_x86::{Code, CodeSize, CpuidFeature, DecoderOptions, Instruction, Mnemonic, Register};
use ringfence_x86::cpuid::Output::{self, Eax, Ebx, Ecx, Edx};
use ringfence_x86::cpuid::{CpuidResult, CpuidTable, Vendor};
use ringfence_x86::{Cr4, Efer};

use crate::vector::FeatureSet;

/// What the host's CPUID says, leaf by leaf. Read once: inside a virtual machine each leaf takes microseconds.
pub fn host_cpuid() -> &'static CpuidTable {
    static HOST: OnceLock<CpuidTable> = OnceLock::new();
    HOST.get_or_init(|| {
        let mut table = CpuidTable::default();
        for base in [0, 0x8000_0000] {
            let top = host_leaf(base, 0).eax.min(base | 0xff);
            for leaf in base..=top {
                let subleaves = match leaf {
                    4 | 0x8000_001d => 8,
                    7 | 0xb => 3,
                    0xd => 20,
                    _ => 1,
                };
                for subleaf in 0..subleaves {
                    table.set(leaf, subleaf, host_leaf(leaf, subleaf));
                }
            }
        }
        table
    })
}

fn host_leaf(leaf: u32, subleaf: u32) -> CpuidResult {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    CpuidResult::new(r.eax, r.ebx, r.ecx, r.edx)
}

/// What every 64-bit processor has, whether CPUID tells or not.
const ALWAYS: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::TSC,
    CpuidFeature::MSR,
    CpuidFeature::CX8,
    CpuidFeature::CMOV,
    CpuidFeature::CLFSH,
    CpuidFeature::RDPMC,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    // RSM is #UD outside system-management mode, which there is not.
    CpuidFeature::SMM,
];

/// Where CPUID announces that a bit of CR4 exists; TSD and PCE always do, VME and PVI never.
const CR4_ROWS: &[(Cr4, u32, u32, Output, u8)] = &[
    (Cr4::DE, 1, 0, Edx, 2),
    (Cr4::PSE, 1, 0, Edx, 3),
    (Cr4::PAE, 1, 0, Edx, 6),
    (Cr4::MCE, 1, 0, Edx, 7),
    (Cr4::PGE, 1, 0, Edx, 13),
    (Cr4::OSFXSR, 1, 0, Edx, 24),
    (Cr4::OSXMMEXCPT, 1, 0, Edx, 25),
    (Cr4::UMIP, 7, 0, Ecx, 2),
    (Cr4::FSGSBASE, 7, 0, Ebx, 0),
    (Cr4::PCIDE, 1, 0, Ecx, 17),
    (Cr4::OSXSAVE, 1, 0, Ecx, 26),
    (Cr4::SMEP, 7, 0, Ebx, 7),
    (Cr4::SMAP, 7, 0, Ebx, 20),
];

/// Likewise of EFER.
const EFER_ROWS: &[(Efer, u32, u32, Output, u8)] = &[
    (Efer::SCE, 0x8000_0001, 0, Edx, 11),
    (Efer::LME, 0x8000_0001, 0, Edx, 29),
    (Efer::NXE, 0x8000_0001, 0, Edx, 20),
    (Efer::AIBRSE, 0x8000_0021, 0, Eax, 8),
];

/// The features of a CPU model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    instructions: FeatureSet,
    vendor: Vendor,
    cr4: Cr4,
    efer: Efer,
    physical_bits: u32,
    /// What [`Features::allows`] says of each form, one bit each: every instruction that is decoded asks.
    allowed: Box<[u64]>,
}

impl Features {
    /// The features that a table announces. An address size that is not given is 40 bits.
    pub fn new(cpuid: &CpuidTable) -> Self {
        let mut instructions = FeatureSet::from_cpuid(|leaf, subleaf| cpuid.get(leaf, subleaf));
        ALWAYS.iter().for_each(|&feature| instructions.insert(feature));
        let mut cr4 = Cr4::TSD | Cr4::PCE;
        for &(flag, leaf, subleaf, output, bit) in CR4_ROWS {
            cr4.set(flag, cpuid.bit(leaf, subleaf, output, bit));
        }
        let mut efer = Efer::LMA;
        for &(flag, leaf, subleaf, output, bit) in EFER_ROWS {
            efer.set(flag, cpuid.bit(leaf, subleaf, output, bit));
        }
        let physical_bits = match cpuid.get(0x8000_0008, 0).eax & 0xff {
            bits @ 32..=51 => bits,
            _ => 40,
        };
        let allowed = Box::default();
        let mut features = Self { instructions, vendor: cpuid.vendor(), cr4, efer, physical_bits, allowed };
        let mut allowed = vec![0; Code::values().len().div_ceil(64)];
        for code in Code::values().filter(|&code| features.has(code)) {
            allowed[code as usize / 64] |= 1 << (code as usize % 64);
        }
        features.allowed = allowed.into();
        features
    }

    /// Whether instructions of one of the decoder's features exist.
    pub fn contains(&self, feature: CpuidFeature) -> bool {
        self.instructions.contains(feature)
    }

    /// Whether the model has an instruction. Encodings that are no-operations where their feature is absent always
    /// exist.
    #[inline]
    pub fn allows(&self, instruction: &Instruction) -> bool {
        let code = instruction.code() as usize;
        self.allowed[code / 64] >> (code % 64) & 1 != 0
    }

    fn has(&self, code: Code) -> bool {
        use Mnemonic as M;
        let harmless = matches!(
            code.mnemonic(),
            M::Reservednop
                | M::Endbr32
                | M::Endbr64
                | M::Rdsspd
                | M::Rdsspq
                | M::Cldemote
                | M::Prefetch
                | M::Prefetchw
                | M::Prefetchwt1
                | M::Prefetchit0
                | M::Prefetchit1
                | M::Wbnoinvd
                | M::Vmcall
                | M::Vmmcall
        );
        // AMD's processors take PREFETCH with a register for undefined (APM 3, PREFETCH).
        let undefined = matches!(
            code,
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        ) && !self.is_intel();
        if undefined {
            return false;
        }
        harmless || self.instructions.contains_all(code.cpuid_features())
    }

    /// What an instruction, decoded from `bytes`, really is on this processor: LZCNT is BSR and TZCNT is BSF where they
    /// are hidden, and what AMD's processors take for XCHG is not PAUSE.
    pub fn disguise(&self, instruction: &mut Instruction, bytes: &[u8]) {
        if instruction.code() == Code::Pause && !self.is_intel() {
            return disguise_pause(instruction, bytes);
        }
        let (feature, code) = match instruction.code() {
            Code::Lzcnt_r16_rm16 => (CpuidFeature::LZCNT, Code::Bsr_r16_rm16),
            Code::Lzcnt_r32_rm32 => (CpuidFeature::LZCNT, Code::Bsr_r32_rm32),
            Code::Lzcnt_r64_rm64 => (CpuidFeature::LZCNT, Code::Bsr_r64_rm64),
            Code::Tzcnt_r16_rm16 => (CpuidFeature::BMI1, Code::Bsf_r16_rm16),
            Code::Tzcnt_r32_rm32 => (CpuidFeature::BMI1, Code::Bsf_r32_rm32),
            Code::Tzcnt_r64_rm64 => (CpuidFeature::BMI1, Code::Bsf_r64_rm64),
            _ => return,
        };
        if !self.contains(feature) {
            instruction.set_code(code);
        }
    }

    /// How the decoder reads bytes that mean different things on Intel's and AMD's processors.
    pub fn decoder_options(&self) -> u32 {
        match self.vendor {
            Vendor::Intel => DecoderOptions::NONE,
            Vendor::Amd => DecoderOptions::AMD,
        }
    }

    /// Whether Intel's choices hold where the vendors differ.
    pub fn is_intel(&self) -> bool {
        self.vendor == Vendor::Intel
    }

    /// The bits of CR4 that exist.
    pub fn cr4(&self) -> Cr4 {
        self.cr4
    }

    /// The bits of EFER that exist.
    pub fn efer(&self) -> Efer {
        self.efer
    }

    /// Bits in a physical address.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }
}

/// F3 REX.B 90: the REX prefix makes it XCHG of R8 and the accumulator (as observed on AMD's processors).
fn disguise_pause(instruction: &mut Instruction, bytes: &[u8]) {
    let length = instruction.len();
    let Some([prefixes @ .., rex, 0x90]) = bytes.get(..length) else { return };
    if instruction.code_size() != CodeSize::Code64 || rex & 0xf1 != 0x41 {
        return;
    }
    let (code, register, accumulator) = if rex & 8 != 0 {
        (Code::Xchg_r64_RAX, Register::R8, Register::RAX)
    } else if prefixes.contains(&0x66) {
        (Code::Xchg_r16_AX, Register::R8W, Register::AX)
    } else {
        (Code::Xchg_r32_EAX, Register::R8D, Register::EAX)
    };
    if let Ok(mut exchange) = Instruction::with2(code, register, accumulator) {
        exchange.set_len(length);
        exchange.set_code_size(CodeSize::Code64);
        *instruction = exchange;
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Decoder;
    use ringfence_x86::cpuid::{Mitigations, Model, Platform};

    use super::*;

    fn model(model: Model) -> Features {
        let platform = Platform {
            cpus: 1,
            tsc_khz: 1_000_000,
            apic_khz: 1_000_000,
            physical_bits: 40,
            mitigations: Mitigations::NotNeeded,
        };
        Features::new(&model.table(host_cpuid(), &platform).unwrap())
    }

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn instruction_is_allowed_as_far_as_its_model_has_it() {
        let v2 = model(Model::V2);
        let cases: [(&[u8], bool, &str); 9] = [
            (&[0x0f, 0xa2], true, "cpuid"),
            (&[0x66, 0x0f, 0x38, 0x17, 0xc1], true, "ptest"),
            (&[0xc5, 0xf4, 0x58, 0xc2], false, "vaddps"),
            (&[0xc4, 0xe2, 0x70, 0xf2, 0xc2], false, "andn"),
            (&[0x0f, 0x01, 0xc8], false, "monitor"),
            (&[0xf3, 0x0f, 0x1e, 0xfa], true, "endbr64"),
            (&[0xf3, 0x0f, 0x09], true, "wbnoinvd"),
            (&[0x0f, 0x01, 0xc1], true, "vmcall"),
            (&[0x0f, 0x01, 0xee], false, "rdpkru"),
        ];
        for (bytes, allowed, name) in cases {
            assert_eq!(v2.allows(&decode(bytes)), allowed, "{name}");
        }
    }

    #[test]
    fn hidden_tzcnt_is_bsf() {
        let mut instruction = decode(&[0xf3, 0x0f, 0xbc, 0xc1]);
        model(Model::V2).disguise(&mut instruction, &[]);
        assert_eq!(instruction.code(), Code::Bsf_r32_rm32);
        let mut instruction = decode(&[0xf3, 0x0f, 0xbc, 0xc1]);
        if host_cpuid().bit(7, 0, Ebx, 3) {
            model(Model::Host).disguise(&mut instruction, &[]);
            assert_eq!(instruction.code(), Code::Tzcnt_r32_rm32);
        }
    }

    #[test]
    fn model_offers_no_bit_of_cr4_that_is_not_implemented() {
        let host = model(Model::Host);
        assert!(!host.cr4().intersects(Cr4::VME | Cr4::PVI | Cr4::LA57));
        assert!(host.cr4().contains(Cr4::PCIDE | Cr4::SMEP | Cr4::SMAP | Cr4::UMIP));
        assert_eq!(host.physical_bits(), 40);
    }
}
