//! CPU models: tables made from the host's.

use super::features::{AMD_FACTS, FEATURES, Feature, Level, Provider, immunities};
use super::{CpuidResult, CpuidTable, Vendor, cache};

/// A CPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// The x86-64-v2 level of the psABI.
    V2,
    /// The x86-64-v3 level.
    V3,
    /// Those of the host's features that every engine runs at speed. Where AVX-512 lacks AVX512BW that is all but AVX-512: without
    /// mask registers of 64 bits the translator executes each of its instructions by a handler, and libraries choose
    /// them for all their copying and searching where they find them.
    Auto,
    /// All of the host's features that the engine has.
    Host,
}

/// Whether the guest is told that its CPU needs no mitigations of speculative execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mitigations {
    /// The CPU says that it is immune (AutoIBRS, enhanced IBRS and the `*_NO` bits), so a stock kernel uses neither
    /// retpolines nor barriers on context switches.
    #[default]
    NotNeeded,
    /// The CPU says nothing about it; the kernel decides by family and model.
    Unspecified,
}

/// What a table depends on besides model and host.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// How many vCPUs, from 1.
    pub cpus: u32,
    /// Frequency of the time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// Frequency of the local APIC's timer in kHz.
    pub apic_khz: u32,
    /// Bits in a physical address, 36 to 46.
    pub physical_bits: u8,
    /// What is said of mitigations.
    pub mitigations: Mitigations,
}

/// The host lacks features of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingFeatures {
    /// The model.
    pub model: Model,
    /// Which ones.
    pub features: Vec<&'static str>,
}

impl std::fmt::Display for MissingFeatures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "this host cannot execute the CPU model {}: it lacks {}; choose a lower model",
            self.model.name(),
            self.features.join(", ")
        )
    }
}

impl std::error::Error for MissingFeatures {}

/// IA32_ARCH_CAPABILITIES of a CPU that needs no mitigations: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO,
/// IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO
/// (SDM 4 table 2-2).
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// "KVMKVMKVM": guests know KVM's interfaces under this name, whichever engine provides them.
const KVM_SIGNATURE: CpuidResult = CpuidResult::new(0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d);
/// CLOCKSOURCE2, PV_EOI, CLOCKSOURCE_STABLE; the same on every engine.
const KVM_FEATURES: u32 = 1 << 3 | 1 << 6 | 1 << 24;
/// State components with an entry in leaf 0xD.
const COMPONENTS: [u32; 4] = [2, 5, 6, 7];

impl Model {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Model::V2 => "x86-64-v2",
            Model::V3 => "x86-64-v3",
            Model::Auto => "auto",
            Model::Host => "host",
        }
    }

    fn level(self, host: &CpuidTable) -> Level {
        // AVX512BW.
        let masks = host.get(7, 0).ebx >> 30 & 1 != 0;
        match self {
            Model::V2 => Level::V2,
            Model::V3 => Level::V3,
            Model::Auto if !masks => Level::Host,
            Model::Auto | Model::Host => Level::Wide,
        }
    }

    /// Whether it is what the host is, so that it promises no feature.
    const fn follows_host(self) -> bool {
        matches!(self, Model::Auto | Model::Host)
    }

    /// Leaf 1 EAX: family, model and stepping. The named models have some that guests know to be of that level.
    const fn signature(self, vendor: Vendor, host: u32) -> u32 {
        match (self, vendor) {
            (Model::Auto | Model::Host, _) => host,
            // Family 6: model 0x2c stepping 2, model 0x3c stepping 4.
            (Model::V2, Vendor::Intel) => 0x0002_06c2,
            (Model::V3, Vendor::Intel) => 0x0003_06c4,
            // Family 0x17, model 0x31, stepping 0.
            (_, Vendor::Amd) => 0x0083_0f10,
        }
    }

    fn brand(self, host: &CpuidTable) -> [CpuidResult; 3] {
        let name: &[u8] = match self {
            Model::V2 => b"Ringfence x86-64-v2",
            Model::V3 => b"Ringfence x86-64-v3",
            Model::Auto | Model::Host => return [2, 3, 4].map(|leaf| host.get(0x8000_0000 | leaf, 0)),
        };
        let word =
            |i: usize| u32::from_le_bytes(std::array::from_fn(|k| name.get(4 * i + k).copied().unwrap_or(0)));
        std::array::from_fn(|i| {
            CpuidResult::new(word(4 * i), word(4 * i + 1), word(4 * i + 2), word(4 * i + 3))
        })
    }

    /// The features of this model on `host`.
    ///
    /// # Errors
    /// [`MissingFeatures`] if the host lacks some that a named model promises.
    fn features(self, host: &CpuidTable) -> Result<Vec<&'static Feature>, MissingFeatures> {
        let in_model = FEATURES.iter().filter(|f| f.level <= self.level(host));
        let (mut offered, mut missing) = (Vec::new(), Vec::new());
        for feature in in_model {
            if feature.provider == Provider::Engine || feature.is_in(host) {
                offered.push(feature);
            } else if feature.provider == Provider::Host && !self.follows_host() {
                missing.push(feature.name);
            }
        }
        if missing.is_empty() { Ok(offered) } else { Err(MissingFeatures { model: self, features: missing }) }
    }

    /// What CPUID says on this model.
    ///
    /// # Errors
    /// [`MissingFeatures`] if the host cannot execute it.
    pub fn table(self, host: &CpuidTable, platform: &Platform) -> Result<CpuidTable, MissingFeatures> {
        let vendor = host.vendor();
        let intel = vendor == Vendor::Intel;
        let mut table = CpuidTable::default();
        for feature in self.features(host)? {
            feature.set_in(&mut table);
        }
        if platform.mitigations == Mitigations::NotNeeded {
            immunities(vendor).iter().for_each(|f| f.set_in(&mut table));
        }
        if !intel {
            AMD_FACTS.iter().for_each(|f| f.set_in(&mut table));
        }

        let name = host.get(0, 0);
        table.set(0, 0, CpuidResult { eax: if intel { 0x16 } else { 0xd }, ..name });
        self.identify(&mut table, host, platform);
        cache::describe(&mut table, vendor, platform.cpus);
        topology(&mut table, platform.cpus);
        extended_state(&mut table, host);
        frequencies(&mut table, platform);

        let extended = if intel { 0x8000_0008 } else { 0x8000_0021 };
        let names = if intel { CpuidResult::default() } else { name };
        table.set(0x8000_0000, 0, CpuidResult { eax: extended, ..names });
        for (leaf, result) in (0x8000_0002..).zip(self.brand(host)) {
            table.set(leaf, 0, result);
        }
        table.set(0x4000_0000, 0, KVM_SIGNATURE);
        table.set(0x4000_0001, 0, CpuidResult { eax: KVM_FEATURES, ..CpuidResult::default() });
        Ok(table)
    }

    /// Leaves 1, 7, 0x8000_0001 and 0x8000_0008 apart from features.
    fn identify(self, table: &mut CpuidTable, host: &CpuidTable, platform: &Platform) {
        let vendor = host.vendor();
        let cpus = platform.cpus.max(1);
        let mut basic = table.get(1, 0);
        basic.eax = self.signature(vendor, host.get(1, 0).eax);
        // CLFLUSH lines of 64 bytes; logical processors.
        basic.ebx = 8 << 8 | cpus.min(255) << 16;
        if cpus > 1 {
            basic.edx |= 1 << 28;
        }
        table.set(1, 0, basic);
        let mut structured = table.get(7, 0);
        structured.eax = (1..=2).rfind(|&leaf| table.get(7, leaf) != CpuidResult::default()).unwrap_or(0);
        table.set(7, 0, structured);

        let mut extended = table.get(0x8000_0001, 0);
        let mut sizes = table.get(0x8000_0008, 0);
        sizes.eax = 48 << 8 | u32::from(platform.physical_bits);
        if vendor == Vendor::Amd {
            extended.eax = basic.eax;
            // AMD repeats leaf 1's bits (APM 3 E.4.2).
            extended.edx |= basic.edx & 0x0183_f3ff;
            let id_bits = cpus.next_power_of_two().trailing_zeros();
            sizes.ecx = id_bits << 12 | (cpus - 1).min(255);
            if cpus > 1 {
                // The CPUs are cores, not threads of one (CmpLegacy).
                extended.ecx |= 1 << 1;
            }
        }
        table.set(0x8000_0001, 0, extended);
        table.set(0x8000_0008, 0, sizes);
    }
}

/// Leaf 0xB: one thread a core, all cores in one package.
fn topology(table: &mut CpuidTable, cpus: u32) {
    let cpus = cpus.max(1);
    let bits = cpus.next_power_of_two().trailing_zeros();
    table.set(0xb, 0, CpuidResult::new(0, 1, 1 << 8, 0));
    table.set(0xb, 1, CpuidResult::new(bits, cpus, 2 << 8 | 1, 0));
    table.set(0xb, 2, CpuidResult::new(0, 0, 2, 0));
}

/// Leaf 0xD: the host's sizes and offsets for the components of the features on offer.
fn extended_state(table: &mut CpuidTable, host: &CpuidTable) {
    use super::Output::{Ebx, Ecx};
    if !table.bit(1, 0, Ecx, 26) {
        return;
    }
    let mut mask = 3;
    if table.bit(1, 0, Ecx, 28) {
        mask |= 1 << 2;
    }
    if table.bit(7, 0, Ebx, 16) {
        mask |= 7 << 5;
    }
    mask &= host.get(0xd, 0).eax;
    // The legacy area and the header.
    let mut size = 576;
    for i in COMPONENTS.into_iter().filter(|i| mask >> i & 1 != 0) {
        let component = host.get(0xd, i);
        size = size.max(component.eax + component.ebx);
        table.set(0xd, i, component);
    }
    table.set(0xd, 0, CpuidResult::new(mask, size, size, 0));
}

/// Frequencies: leaf 0x15 (Intel), and the hypervisor's.
fn frequencies(table: &mut CpuidTable, platform: &Platform) {
    let (tsc, apic) = (platform.tsc_khz.max(1), platform.apic_khz.max(1));
    if table.get(0, 0).eax >= 0x15 {
        let divisor = gcd(tsc, apic);
        let crystal = apic.saturating_mul(1000);
        table.set(0x15, 0, CpuidResult::new(apic / divisor, tsc / divisor, crystal, 0));
        table.set(0x16, 0, CpuidResult::new(tsc / 1000, tsc / 1000, 100, 0));
    }
    table.set(0x4000_0010, 0, CpuidResult::new(tsc, apic, 0, 0));
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
