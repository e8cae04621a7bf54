//! Control registers, translations, and instructions beside them.

use ringfence_x86::cpuid::Vendor;
use ringfence_x86::{Cr0, Cr4, Efer, Exception, SegmentRegister, Vector, msr};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

/// `mov crN, rax`.
pub(super) fn write(lab: &mut Lab, number: u8, value: u64) -> Result<(), Exception> {
    lab.m.cpu.regs[0] = value;
    lab.m.cpu.regs[RIP] = at::CODE;
    if number == 8 {
        return lab.step(&[0x44, 0x0f, 0x22, 0xc0]);
    }
    lab.step(&[0x0f, 0x22, 0xc0 | number << 3])
}

const GP: Result<(), Exception> = Err(Exception::GP0);

#[test]
fn cr0_refuses_combinations_that_do_not_exist() {
    let mut lab = Lab::long();
    let good = lab.m.cpu.cr0.bits();
    for bad in [
        good | 1 << 32,
        good & !Cr0::PE.bits(),
        good | Cr0::NW.bits(),
        // Paging cannot be turned off in 64-bit mode.
        good & !Cr0::PG.bits(),
    ] {
        assert_eq!(write(&mut lab, 0, bad), GP, "{bad:#x}");
    }
    write(&mut lab, 0, good | 1 << 28 & !Cr0::ET.bits()).unwrap();
    assert_eq!(lab.m.cpu.cr0.bits(), good, "bits that do not exist are dropped, ET stays");
}

#[test]
fn long_mode_is_entered_by_paging_and_left_from_compatibility_mode() {
    let mut lab = Lab::long();
    lab.m.cpu.efer.remove(Efer::LMA);
    lab.m.cpu.cr0.remove(Cr0::PG);
    lab.enter(sel::CODE32, sel::DATA, at::STACK);
    let on = (lab.m.cpu.cr0 | Cr0::PG).bits();
    // Without PAE there is no long mode (SDM 3A 9.8.5).
    lab.m.cpu.cr4.remove(Cr4::PAE);
    assert_eq!(write(&mut lab, 0, on), GP);
    lab.m.cpu.cr4.insert(Cr4::PAE);
    write(&mut lab, 0, on).unwrap();
    assert!(lab.m.cpu.long_mode() && !lab.m.cpu.is_64bit());
    // LME is locked while paging is on.
    assert_eq!(lab.m.cpu.write_msr(msr::EFER, 0), GP);
    assert_eq!(write(&mut lab, 4, 0), GP, "PAE cannot go in long mode");
    write(&mut lab, 0, on & !Cr0::PG.bits()).unwrap();
    assert!(!lab.m.cpu.long_mode());
}

#[test]
fn sixteen_bit_tss_or_64_bit_cs_keeps_long_mode_from_starting() {
    let mut lab = Lab::long();
    lab.m.cpu.efer.remove(Efer::LMA);
    lab.m.cpu.cr0.remove(Cr0::PG);
    lab.enter(sel::CODE32, sel::DATA, at::STACK);
    let on = (lab.m.cpu.cr0 | Cr0::PG).bits();
    let tr = lab.m.cpu.tr;
    lab.m.cpu.tr.attributes = 0x83;
    assert_eq!(write(&mut lab, 0, on), GP);
    lab.m.cpu.tr = tr;
    lab.enter(sel::CODE, sel::DATA, at::STACK);
    assert_eq!(write(&mut lab, 0, on), GP);
}

#[test]
fn cr3_refuses_bits_beyond_the_physical_address() {
    let mut lab = Lab::long();
    assert_eq!(write(&mut lab, 3, at::TABLES | 1 << 40), GP);
    assert_eq!(write(&mut lab, 3, at::TABLES | 1 << 63), GP, "bit 63 means something only with PCIDs");
    lab.m.cpu.cr4.insert(Cr4::PCIDE);
    write(&mut lab, 3, at::TABLES | 1 << 63).unwrap();
    assert_eq!(lab.m.cpu.cr3, at::TABLES);
}

#[test]
fn write_of_cr3_drops_translations() {
    let mut lab = Lab::long();
    // mov eax, [DATA], before and after its page is taken away
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    let load = [0x8b, 0x04, 0x25, a, b, c, d];
    lab.step(&load).unwrap();
    lab.put(at::TABLES + 0x3000 + 8 * (at::DATA >> 12), 0_u64);
    lab.step(&load).unwrap();
    write(&mut lab, 3, at::TABLES).unwrap();
    assert_eq!(lab.step(&load).map_err(|e| e.vector), Err(Vector::PageFault));
}

#[test]
fn invlpg_drops_one_translation() {
    let mut lab = Lab::long();
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    let load = [0x8b, 0x04, 0x25, a, b, c, d];
    lab.step(&load).unwrap();
    lab.put(at::TABLES + 0x3000 + 8 * (at::DATA >> 12), 0_u64);
    // invlpg [DATA]
    lab.step(&[0x0f, 0x01, 0x3c, 0x25, a, b, c, d]).unwrap();
    assert_eq!(lab.step(&load).map_err(|e| e.vector), Err(Vector::PageFault));
}

#[test]
fn cr4_refuses_what_the_model_lacks() {
    let mut lab = Lab::long();
    let good = lab.m.cpu.cr4.bits();
    for bit in [Cr4::VME, Cr4::PVI, Cr4::LA57, Cr4::from_bits_retain(1 << 13), Cr4::from_bits_retain(1 << 22)]
    {
        assert_eq!(write(&mut lab, 4, good | bit.bits()), GP, "{bit:?}");
    }
    write(&mut lab, 4, good | (Cr4::SMEP | Cr4::SMAP | Cr4::UMIP | Cr4::PGE).bits()).unwrap();
}

#[test]
fn pcids_need_long_mode_and_a_zero_pcid_at_first() {
    let mut lab = Lab::long();
    let with = (lab.m.cpu.cr4 | Cr4::PCIDE).bits();
    lab.m.cpu.cr3 = at::TABLES | 5;
    assert_eq!(write(&mut lab, 4, with), GP);
    lab.m.cpu.cr3 = at::TABLES;
    write(&mut lab, 4, with).unwrap();
    let mut lab = Lab::protected();
    assert_eq!(write(&mut lab, 4, Cr4::PCIDE.bits()), GP);
}

#[test]
fn pae_paging_loads_its_directory_pointers_when_it_starts() {
    let mut lab = Lab::protected();
    lab.m.cpu.cr4 = Cr4::PAE;
    lab.m.cpu.cr3 = at::TABLES + 0x20;
    lab.put(at::TABLES + 0x20, 0x1_1001_u64);
    // A reserved bit in the third one.
    lab.put(at::TABLES + 0x30, 0x1_2003_u64);
    let on = (lab.m.cpu.cr0 | Cr0::PG).bits();
    assert_eq!(write(&mut lab, 0, on), GP);
    assert!(!lab.m.cpu.cr0.contains(Cr0::PG));
    lab.put(at::TABLES + 0x30, 0_u64);
    // A 2 MiB page for everything here.
    lab.put(0x1_1000, 0x83_u64);
    write(&mut lab, 0, on).unwrap();
    assert_eq!(lab.m.cpu.pdpte, [0x1_1001, 0, 0, 0]);
    lab.step(&[0x90]).unwrap();
}

#[test]
fn control_registers_are_for_cpl_0_and_few_numbers() {
    let mut lab = Lab::long();
    assert_eq!(lab.step(&[0x0f, 0x20, 0xc8]), Err(Exception::UD), "CR1");
    lab.user();
    assert_eq!(lab.step(&[0x0f, 0x20, 0xc0]), GP);
    assert_eq!(lab.step(&[0x0f, 0x06]), GP, "CLTS");
    assert_eq!(lab.step(&[0x0f, 0x09]), GP, "WBINVD");
    assert_eq!(lab.step(&[0x0f, 0x01, 0x3b]), GP, "INVLPG");
    assert_eq!(lab.step(&[0x0f, 0x01, 0xf8]), GP, "SWAPGS");
}

#[test]
fn cr8_takes_four_bits() {
    let mut lab = Lab::long();
    assert_eq!(write(&mut lab, 8, 0x10), GP);
    write(&mut lab, 8, 0xf).unwrap();
}

#[test]
fn lmsw_sets_but_never_clears_protection() {
    let mut lab = Lab::protected();
    // lmsw ax
    lab.m.cpu.regs[0] = 0xa;
    lab.step(&[0x0f, 0x01, 0xf0]).unwrap();
    assert!(lab.m.cpu.cr0.contains(Cr0::PE | Cr0::TS | Cr0::MP));
    // clts
    lab.step(&[0x0f, 0x06]).unwrap();
    assert!(!lab.m.cpu.cr0.contains(Cr0::TS));
    // smsw eax
    lab.step(&[0x0f, 0x01, 0xe0]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], lab.m.cpu.cr0.bits());
}

#[test]
fn invpcid_checks_its_descriptor() {
    let mut lab = Lab::long();
    // invpcid rax, [rcx]
    let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x01];
    lab.m.cpu.regs[1] = at::DATA;
    for (kind, low, high, outcome) in [
        (0, 0_u64, at::DATA, Ok(())),
        (0, 0, 0x8000_0000_0000, GP),
        (0, 5, 0, GP),
        (1, 0x1000, 0, GP),
        (2, !0, !0, Ok(())),
        (3, 0, 0, Ok(())),
        (4, 0, 0, GP),
    ] {
        lab.m.cpu.regs[0] = kind;
        lab.put(at::DATA, low);
        lab.put(at::DATA + 8, high);
        assert_eq!(lab.step(&invpcid), outcome, "kind {kind}, {low:#x}, {high:#x}");
    }
}

#[test]
fn swapgs_exchanges_the_bases() {
    let mut lab = Lab::long();
    lab.m.cpu.write_msr(msr::GS_BASE, 0x1000).unwrap();
    lab.m.cpu.write_msr(msr::KERNEL_GS_BASE, 0xffff_8000_0000_0000).unwrap();
    lab.step(&[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!(lab.m.cpu.segment(SegmentRegister::Gs).base, 0xffff_8000_0000_0000);
    assert_eq!(lab.m.cpu.read_msr(msr::KERNEL_GS_BASE), Ok(0x1000));
}

#[test]
fn fsgsbase_instructions_need_their_bit_and_canonical_addresses() {
    let mut lab = Lab::long();
    // wrfsbase rax; rdfsbase rcx; wrgsbase eax
    lab.m.cpu.regs[0] = 0xffff_8000_1234_5678;
    lab.step(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]).unwrap();
    lab.step(&[0xf3, 0x48, 0x0f, 0xae, 0xc1]).unwrap();
    assert_eq!(lab.m.cpu.regs[1], 0xffff_8000_1234_5678);
    lab.step(&[0xf3, 0x0f, 0xae, 0xd8]).unwrap();
    assert_eq!(lab.m.cpu.segment(SegmentRegister::Gs).base, 0x1234_5678);
    lab.m.cpu.regs[0] = 0x8000_0000_0000;
    assert_eq!(lab.step(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), GP);
    lab.m.cpu.cr4.remove(Cr4::FSGSBASE);
    assert_eq!(lab.step(&[0xf3, 0x48, 0x0f, 0xae, 0xc1]), Err(Exception::UD));
}

#[test]
fn cpuid_shows_state_and_the_vendors_way_with_unknown_leaves() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut lab = Lab::long_of(vendor);
        lab.m.cpu.cr4.insert(Cr4::OSXSAVE);
        lab.m.cpu.regs[0] = 0xffff_ffff_0000_0001;
        lab.step(&[0x0f, 0xa2]).unwrap();
        assert_eq!(lab.m.cpu.regs[1] >> 27 & 1, 1, "OSXSAVE");
        assert!(lab.m.cpu.regs[..4].iter().all(|r| r >> 32 == 0));
        let beyond = lab.m.cpu.cpuid_result(0x1234, 0);
        let last = lab.m.cpu.cpuid_result(lab.m.cpu.cpuid_result(0, 0).eax, 0);
        assert_eq!(beyond == last, vendor == Vendor::Intel, "{vendor:?}");
        assert_eq!(lab.m.cpu.cpuid_result(0x4000_0001, 0).eax, 0x0100_0048);
    }
}

#[test]
fn cpuid_size_of_the_xsave_area_follows_xcr0() {
    let mut lab = Lab::long();
    if lab.m.cpu.cpuid_result(0xd, 0).eax & 4 == 0 {
        return;
    }
    assert_eq!(lab.m.cpu.cpuid_result(0xd, 0).ebx, 576);
    lab.m.cpu.cr4.insert(Cr4::OSXSAVE);
    lab.m.cpu.update_mode();
    (lab.m.cpu.regs[0], lab.m.cpu.regs[1], lab.m.cpu.regs[2]) = (7, 0, 0);
    lab.step(&[0x0f, 0x01, 0xd1]).unwrap();
    assert_eq!(lab.m.cpu.cpuid_result(0xd, 0).ebx, 832);
}

#[test]
fn prefixed_no_operations_and_hidden_instructions() {
    let mut lab = Lab::long();
    // endbr64; nop [rax]; prefetchw [rax]; rdsspq rax; pause; lfence
    let cases: [&[u8]; 6] = [
        &[0xf3, 0x0f, 0x1e, 0xfa],
        &[0x0f, 0x1f, 0x00],
        &[0x0f, 0x0d, 0x08],
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],
        &[0xf3, 0x90],
        &[0x0f, 0xae, 0xe8],
    ];
    lab.m.cpu.regs[0] = at::ABSENT;
    for bytes in cases {
        lab.step(bytes).unwrap();
    }
    assert_eq!(lab.m.cpu.regs[0], at::ABSENT);
    // clflush [rax] faults like a load; monitor, mwait, vmrun, rsm and rdpkru are not offered
    assert_eq!(lab.step(&[0x0f, 0xae, 0x38]).map_err(|e| e.vector), Err(Vector::PageFault));
    let cases: [&[u8]; 5] =
        [&[0x0f, 0x01, 0xc8], &[0x0f, 0x01, 0xc9], &[0x0f, 0x01, 0xd8], &[0x0f, 0xaa], &[0x0f, 0x01, 0xee]];
    for bytes in cases {
        assert_eq!(lab.step(bytes), Err(Exception::UD), "{bytes:x?}");
    }
}

#[test]
fn rdrand_repeats_in_counted_mode() {
    let values = [(); 2].map(|()| {
        let mut lab = Lab::long();
        if !lab.m.cpu.features.contains(iced_x86::CpuidFeature::RDRAND) {
            return [1, 2];
        }
        [(); 2].map(|()| {
            lab.step(&[0x48, 0x0f, 0xc7, 0xf0]).unwrap();
            assert!(lab.m.cpu.status.cf());
            lab.m.cpu.regs[0]
        })
    });
    assert_eq!(values[0], values[1]);
    assert_ne!(values[0][0], values[0][1]);
}
