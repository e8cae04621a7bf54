//! Tests of the CPU models.

use super::Output::{Eax, Ebx, Ecx, Edx};
use super::features::{FEATURES, Level, Provider};
use super::*;

fn host(vendor: Vendor) -> CpuidTable {
    let mut table = CpuidTable::default();
    for (leaf, subleaf) in
        [(1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0), (0x8000_0007, 0), (0x8000_0008, 0)]
    {
        table.set(leaf, subleaf, CpuidResult::new(!0, !0, !0, !0));
    }
    let name = match vendor {
        Vendor::Intel => CpuidResult::new(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        Vendor::Amd => CpuidResult::new(0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
    };
    table.set(0, 0, name);
    table.set(0xd, 0, CpuidResult::new(0x2e7, 0, 0xb00, 0));
    table.set(0xd, 2, CpuidResult::new(256, 576, 0, 0));
    table.set(0xd, 5, CpuidResult::new(64, 832, 0, 0));
    table.set(0xd, 6, CpuidResult::new(512, 896, 0, 0));
    table.set(0xd, 7, CpuidResult::new(1024, 1408, 0, 0));
    table
}

fn platform() -> Platform {
    Platform {
        cpus: 3,
        tsc_khz: 2_600_000,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::NotNeeded,
    }
}

#[test]
fn host_with_everything_offers_only_what_is_listed() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let table = Model::Host.table(&host(vendor), &platform()).unwrap();
        assert_eq!(table.vendor(), vendor);
        let hidden = [
            (1, 0, Ecx, 3, "monitor"),
            (1, 0, Ecx, 5, "vmx"),
            (1, 0, Ecx, 27, "osxsave"),
            (1, 0, Edx, 1, "vme"),
            (7, 0, Ebx, 4, "hle"),
            (7, 0, Ebx, 11, "rtm"),
            (7, 0, Ecx, 3, "pku"),
            (7, 0, Ecx, 7, "shstk"),
            (7, 0, Ecx, 16, "la57"),
            (7, 0, Edx, 20, "ibt"),
            (7, 0, Edx, 24, "amx"),
            (0x8000_0001, 0, Ecx, 2, "svm"),
            (0x8000_0008, 0, Ebx, 12, "ibpb"),
        ];
        for (leaf, subleaf, register, bit, name) in hidden {
            assert!(!table.bit(leaf, subleaf, register, bit), "{vendor:?} {name}");
        }
        assert_eq!(table.get(0xd, 0), CpuidResult::new(0xe7, 2432, 2432, 0));
    }
}

#[test]
fn no_bit_is_listed_twice() {
    for (i, a) in FEATURES.iter().enumerate() {
        for b in &FEATURES[i + 1..] {
            let same = (a.leaf, a.subleaf, a.register, a.bit) == (b.leaf, b.subleaf, b.register, b.bit);
            assert!(!same, "{} and {}", a.name, b.name);
        }
    }
}

#[test]
fn named_model_is_the_same_on_richer_hosts() {
    let rich = host(Vendor::Amd);
    let mut poor = CpuidTable::default();
    poor.set(0, 0, rich.get(0, 0));
    for feature in FEATURES.iter().filter(|f| f.level <= Level::V3 && f.provider != Provider::Engine) {
        feature.set_in(&mut poor);
    }
    for leaf in [0, 2, 5, 6, 7] {
        poor.set(0xd, leaf, rich.get(0xd, leaf));
    }
    for model in [Model::V2, Model::V3] {
        assert_eq!(model.table(&rich, &platform()), model.table(&poor, &platform()));
    }
}

#[test]
fn model_that_the_host_cannot_execute_is_refused_by_name() {
    let mut weak = host(Vendor::Intel);
    weak.set(7, 0, CpuidResult::default());
    let error = Model::V3.table(&weak, &platform()).unwrap_err();
    assert_eq!(error.features, ["bmi1", "avx2", "bmi2"]);
    assert!(error.to_string().contains("x86-64-v3"));
    assert!(Model::V2.table(&weak, &platform()).is_ok());
}

#[test]
fn v3_has_avx_state_and_no_avx512() {
    let table = Model::V3.table(&host(Vendor::Amd), &platform()).unwrap();
    assert!(table.bit(7, 0, Ebx, 5) && !table.bit(7, 0, Ebx, 16));
    assert_eq!(table.get(0xd, 0), CpuidResult::new(7, 832, 832, 0));
    let brand: Vec<u8> = (2..5)
        .map(|leaf| table.get(0x8000_0000 | leaf, 0))
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    assert!(brand.starts_with(b"Ringfence x86-64-v3\0"));
    assert_eq!(brand.len(), 48);
}

#[test]
fn topology_names_every_cpu() {
    let table = Model::V2.table(&host(Vendor::Intel), &platform()).unwrap();
    assert_eq!(table.get(0xb, 1), CpuidResult::new(2, 3, 0x201, 0));
    assert_eq!(table.get(1, 0).ebx >> 16 & 0xff, 3);
    assert!(table.bit(1, 0, Edx, 28));
    // The third-level cache is shared by ids 0 to 3, the others belong to one.
    assert_eq!(table.get(4, 3).eax >> 14 & 0xfff, 3);
    assert_eq!(table.get(4, 0).eax >> 14 & 0xfff, 0);
    assert_eq!(table.get(4, 4).eax & 0x1f, 0);
}

#[test]
fn frequency_leaf_gives_the_tsc_exactly() {
    let table = Model::V2.table(&host(Vendor::Intel), &platform()).unwrap();
    let r = table.get(0x15, 0);
    assert_eq!(u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax), 2_600_000_000);
    assert_eq!(table.get(0x4000_0010, 0), CpuidResult::new(2_600_000, 1_000_000, 0, 0));
}

#[test]
fn immunity_is_announced_the_vendors_way() {
    let intel = Model::V2.table(&host(Vendor::Intel), &platform()).unwrap();
    assert!(intel.bit(7, 0, Edx, 29) && intel.bit(7, 0, Edx, 26));
    // Subleaf 2 is the last one.
    assert_eq!((intel.bit(7, 2, Edx, 4), intel.get(7, 0).eax), (true, 2));
    let amd = Model::V2.table(&host(Vendor::Amd), &platform()).unwrap();
    assert!(!amd.bit(7, 0, Edx, 29) && amd.bit(0x8000_0021, 0, Eax, 8) && amd.bit(0x8000_0008, 0, Ebx, 29));
    let silent = Platform { mitigations: Mitigations::Unspecified, ..platform() };
    let amd = Model::V2.table(&host(Vendor::Amd), &silent).unwrap();
    assert!(!amd.bit(0x8000_0021, 0, Eax, 8));
}

#[test]
fn kvm_leaves_are_the_fixed_list() {
    let table = Model::Host.table(&host(Vendor::Amd), &platform()).unwrap();
    assert_eq!(table.get(0x4000_0001, 0).eax, 0x0100_0048);
    let r = table.get(0x4000_0000, 0);
    let name: Vec<u8> = [r.ebx, r.ecx, r.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(name, b"KVMKVMKVM\0\0\0");
}

#[test]
fn auto_is_the_host_and_has_avx512_if_its_masks_have_64_bits() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for masks in [true, false] {
            let mut host = host(vendor);
            if !masks {
                let mut leaf = host.get(7, 0);
                leaf.ebx &= !(1 << 30);
                host.set(7, 0, leaf);
            }
            let [auto, all] = [Model::Auto, Model::Host].map(|m| m.table(&host, &platform()).unwrap());
            for feature in FEATURES {
                let bit = |table: &CpuidTable| {
                    table.bit(feature.leaf, feature.subleaf, feature.register, feature.bit)
                };
                assert_eq!(bit(&all), masks || feature.name != "avx512bw", "{}", feature.name);
                assert_eq!(bit(&auto), masks || !feature.name.starts_with("avx512"), "{}", feature.name);
            }
            // State of AVX-512 to save: mask registers and upper halves.
            assert_eq!(auto.get(0xd, 0).eax, if masks { 0xe7 } else { 7 });
            assert_eq!(auto.get(1, 0).eax, all.get(1, 0).eax);
        }
    }
}

#[test]
fn auto_runs_on_any_host() {
    let mut weak = host(Vendor::Intel);
    for leaf in [1, 7] {
        weak.set(leaf, 0, CpuidResult::default());
    }
    assert!(Model::Auto.table(&weak, &platform()).is_ok());
}
