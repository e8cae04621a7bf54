//! The features that a guest can be offered: nothing that is not in this list.

use super::Output::{self, Eax, Ebx, Ecx, Edx};
use super::{CpuidTable, Vendor};

/// Who provides a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The engine, whatever the host is.
    Engine,
    /// The host: its instructions are executed, so it must have it.
    Host,
    /// How the host's x87 unit behaves, which shows through whatever the model says.
    Quirk,
}

/// The least model that has a feature. Levels are those of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// x86-64-v2 and all above.
    V2,
    /// x86-64-v3 and all above.
    V3,
    /// The models `auto` and `host`.
    Host,
    /// Only the model `host`: AVX-512.
    Wide,
}

/// One feature bit.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// As Linux names it in `/proc/cpuinfo`, mostly.
    pub name: &'static str,
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Result register.
    pub register: Output,
    /// Bit of the register.
    pub bit: u8,
    /// Who provides it.
    pub provider: Provider,
    /// Which models have it.
    pub level: Level,
}

const fn row(
    name: &'static str,
    (leaf, subleaf, register, bit): (u32, u32, Output, u8),
    provider: Provider,
    level: Level,
) -> Feature {
    Feature { name, leaf, subleaf, register, bit, provider, level }
}

use Level::{Host as HostOnly, V2, V3, Wide};
use Provider::{Engine, Host, Quirk};

/// Every feature on offer. Not here, so never offered: MONITOR, VMX, SVM, VME, PKU, CET, AMX, RTM, UINTR, LA57, performance
/// monitoring, FXSAVE without XMM registers (FFXSR).
#[rustfmt::skip]
pub const FEATURES: &[Feature] = &[
    row("fpu", (1, 0, Edx, 0), Host, V2),
    row("de", (1, 0, Edx, 2), Engine, V2),
    row("pse", (1, 0, Edx, 3), Engine, V2),
    row("tsc", (1, 0, Edx, 4), Engine, V2),
    row("msr", (1, 0, Edx, 5), Engine, V2),
    row("pae", (1, 0, Edx, 6), Engine, V2),
    row("mce", (1, 0, Edx, 7), Engine, V2),
    row("cx8", (1, 0, Edx, 8), Engine, V2),
    row("apic", (1, 0, Edx, 9), Engine, V2),
    row("sep", (1, 0, Edx, 11), Engine, V2),
    row("mtrr", (1, 0, Edx, 12), Engine, V2),
    row("pge", (1, 0, Edx, 13), Engine, V2),
    row("mca", (1, 0, Edx, 14), Engine, V2),
    row("cmov", (1, 0, Edx, 15), Host, V2),
    row("pat", (1, 0, Edx, 16), Engine, V2),
    row("pse36", (1, 0, Edx, 17), Engine, V2),
    row("clflush", (1, 0, Edx, 19), Engine, V2),
    row("mmx", (1, 0, Edx, 23), Host, V2),
    row("fxsr", (1, 0, Edx, 24), Host, V2),
    row("sse", (1, 0, Edx, 25), Host, V2),
    row("sse2", (1, 0, Edx, 26), Host, V2),
    row("sse3", (1, 0, Ecx, 0), Host, V2),
    row("pclmulqdq", (1, 0, Ecx, 1), Host, HostOnly),
    row("ssse3", (1, 0, Ecx, 9), Host, V2),
    row("fma", (1, 0, Ecx, 12), Host, V3),
    row("cx16", (1, 0, Ecx, 13), Host, V2),
    row("pcid", (1, 0, Ecx, 17), Engine, V2),
    row("sse4_1", (1, 0, Ecx, 19), Host, V2),
    row("sse4_2", (1, 0, Ecx, 20), Host, V2),
    row("x2apic", (1, 0, Ecx, 21), Engine, V2),
    row("movbe", (1, 0, Ecx, 22), Host, V3),
    row("popcnt", (1, 0, Ecx, 23), Host, V2),
    row("tsc_deadline_timer", (1, 0, Ecx, 24), Engine, V2),
    row("aes", (1, 0, Ecx, 25), Host, HostOnly),
    row("xsave", (1, 0, Ecx, 26), Host, V3),
    row("avx", (1, 0, Ecx, 28), Host, V3),
    row("f16c", (1, 0, Ecx, 29), Host, V3),
    row("rdrand", (1, 0, Ecx, 30), Host, HostOnly),
    row("hypervisor", (1, 0, Ecx, 31), Engine, V2),
    row("arat", (6, 0, Eax, 2), Engine, V2),
    row("fsgsbase", (7, 0, Ebx, 0), Engine, V2),
    row("tsc_adjust", (7, 0, Ebx, 1), Engine, V2),
    row("bmi1", (7, 0, Ebx, 3), Host, V3),
    row("avx2", (7, 0, Ebx, 5), Host, V3),
    row("fdp_excptn_only", (7, 0, Ebx, 6), Quirk, V2),
    row("smep", (7, 0, Ebx, 7), Engine, V2),
    row("bmi2", (7, 0, Ebx, 8), Host, V3),
    row("erms", (7, 0, Ebx, 9), Engine, V2),
    row("invpcid", (7, 0, Ebx, 10), Engine, V2),
    row("zero_fcs_fds", (7, 0, Ebx, 13), Quirk, V2),
    row("avx512f", (7, 0, Ebx, 16), Host, Wide),
    row("avx512dq", (7, 0, Ebx, 17), Host, Wide),
    row("rdseed", (7, 0, Ebx, 18), Host, HostOnly),
    row("adx", (7, 0, Ebx, 19), Host, HostOnly),
    row("smap", (7, 0, Ebx, 20), Engine, V2),
    row("avx512ifma", (7, 0, Ebx, 21), Host, Wide),
    row("clflushopt", (7, 0, Ebx, 23), Engine, HostOnly),
    row("clwb", (7, 0, Ebx, 24), Engine, HostOnly),
    row("avx512cd", (7, 0, Ebx, 28), Host, Wide),
    row("sha_ni", (7, 0, Ebx, 29), Host, HostOnly),
    row("avx512bw", (7, 0, Ebx, 30), Host, Wide),
    row("avx512vl", (7, 0, Ebx, 31), Host, Wide),
    row("avx512vbmi", (7, 0, Ecx, 1), Host, Wide),
    row("umip", (7, 0, Ecx, 2), Engine, V2),
    row("avx512_vbmi2", (7, 0, Ecx, 6), Host, Wide),
    row("gfni", (7, 0, Ecx, 8), Host, HostOnly),
    row("vaes", (7, 0, Ecx, 9), Host, HostOnly),
    row("vpclmulqdq", (7, 0, Ecx, 10), Host, HostOnly),
    row("avx512_vnni", (7, 0, Ecx, 11), Host, Wide),
    row("avx512_bitalg", (7, 0, Ecx, 12), Host, Wide),
    row("avx512_vpopcntdq", (7, 0, Ecx, 14), Host, Wide),
    row("rdpid", (7, 0, Ecx, 22), Engine, HostOnly),
    row("fsrm", (7, 0, Edx, 4), Engine, V2),
    row("serialize", (7, 0, Edx, 14), Host, HostOnly),
    row("avx_vnni", (7, 1, Eax, 4), Host, HostOnly),
    row("avx512_bf16", (7, 1, Eax, 5), Host, Wide),
    row("avx_ifma", (7, 1, Eax, 23), Host, HostOnly),
    row("avx_vnni_int8", (7, 1, Edx, 4), Host, HostOnly),
    row("avx_ne_convert", (7, 1, Edx, 5), Host, HostOnly),
    row("xsaveopt", (0xd, 1, Eax, 0), Host, HostOnly),
    row("xsavec", (0xd, 1, Eax, 1), Host, HostOnly),
    row("xgetbv1", (0xd, 1, Eax, 2), Host, HostOnly),
    row("xsaves", (0xd, 1, Eax, 3), Host, HostOnly),
    row("lahf_lm", (0x8000_0001, 0, Ecx, 0), Engine, V2),
    row("abm", (0x8000_0001, 0, Ecx, 5), Host, V3),
    row("sse4a", (0x8000_0001, 0, Ecx, 6), Host, HostOnly),
    row("misalignsse", (0x8000_0001, 0, Ecx, 7), Host, HostOnly),
    row("3dnowprefetch", (0x8000_0001, 0, Ecx, 8), Engine, HostOnly),
    row("syscall", (0x8000_0001, 0, Edx, 11), Engine, V2),
    row("nx", (0x8000_0001, 0, Edx, 20), Engine, V2),
    row("mmxext", (0x8000_0001, 0, Edx, 22), Host, HostOnly),
    row("pdpe1gb", (0x8000_0001, 0, Edx, 26), Engine, V2),
    row("rdtscp", (0x8000_0001, 0, Edx, 27), Engine, V2),
    row("lm", (0x8000_0001, 0, Edx, 29), Engine, V2),
    row("nonstop_tsc", (0x8000_0007, 0, Edx, 8), Host, HostOnly),
    row("xsaveerptr", (0x8000_0008, 0, Ebx, 2), Quirk, V2),
];

/// Bits that say a weakness is absent or mended in hardware, so that a guest need not work around it. They hold for
/// every software engine: guest code never runs natively, so nothing is speculated across a boundary of the guest's.
pub(super) fn immunities(vendor: Vendor) -> &'static [Feature] {
    match vendor {
        Vendor::Intel => INTEL_IMMUNITIES,
        Vendor::Amd => AMD_IMMUNITIES,
    }
}

/// The bits themselves are in an MSR. IBRS_ALL (enhanced IBRS) there comes with the register that turns it on. That has a bit
/// against branch history injection too (BHI_DIS_S): Linux does not take BHI_NO for an answer, and without the bit clears the
/// history by a loop of a hundred instructions in every system call.
const INTEL_IMMUNITIES: &[Feature] = &[
    row("spec_ctrl", (7, 0, Edx, 26), Engine, V2),
    row("arch_capabilities", (7, 0, Edx, 29), Engine, V2),
    row("bhi_ctrl", (7, 2, Edx, 4), Engine, V2),
];

const AMD_IMMUNITIES: &[Feature] = &[
    row("amd_ssb_no", (0x8000_0008, 0, Ebx, 26), Engine, V2),
    row("btc_no", (0x8000_0008, 0, Ebx, 29), Engine, V2),
    row("autoibrs", (0x8000_0021, 0, Eax, 8), Engine, V2),
    row("srso_no", (0x8000_0021, 0, Eax, 29), Engine, V2),
    row("tsa_sq_no", (0x8000_0021, 0, Ecx, 1), Engine, V2),
    row("tsa_l1_no", (0x8000_0021, 0, Ecx, 2), Engine, V2),
];

/// Facts of the engine that only AMD's leaves can tell.
pub(super) const AMD_FACTS: &[Feature] = &[
    row("topoext", (0x8000_0001, 0, Ecx, 22), Engine, V2),
    row("lfence_rdtsc", (0x8000_0021, 0, Eax, 2), Engine, V2),
    row("null_sel_clr_base", (0x8000_0021, 0, Eax, 6), Engine, V2),
];

impl Feature {
    /// Whether a table announces it.
    pub fn is_in(&self, table: &CpuidTable) -> bool {
        table.bit(self.leaf, self.subleaf, self.register, self.bit)
    }

    /// Announces it.
    pub(super) fn set_in(&self, table: &mut CpuidTable) {
        let mut result = table.get(self.leaf, self.subleaf);
        *result.get_mut(self.register) |= 1 << self.bit;
        table.set(self.leaf, self.subleaf, result);
    }
}
