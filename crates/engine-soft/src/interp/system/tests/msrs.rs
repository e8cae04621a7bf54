//! Model-specific registers.

use std::sync::Arc;

use ringfence_x86::cpuid::Vendor;
use ringfence_x86::{Efer, Exception, msr};

use crate::interp::testing::Lab;

const GP: Exception = Exception::GP0;

/// `rdmsr` and `wrmsr` by machine code.
fn rdmsr(lab: &mut Lab, number: u32) -> Result<u64, Exception> {
    lab.m.cpu.regs[1] = number.into();
    lab.step(&[0x0f, 0x32])?;
    Ok(lab.m.cpu.regs[2] << 32 | lab.m.cpu.regs[0])
}

fn wrmsr(lab: &mut Lab, number: u32, value: u64) -> Result<(), Exception> {
    (lab.m.cpu.regs[1], lab.m.cpu.regs[0], lab.m.cpu.regs[2]) =
        (number.into(), value & 0xffff_ffff, value >> 32);
    lab.step(&[0x0f, 0x30])
}

#[test]
fn values_that_an_msr_cannot_hold_are_refused() {
    const NON_CANONICAL: u64 = 0x8000_0000_0000;
    let cases = [
        (msr::LSTAR, 0xffff_8000_0000_1234, true),
        (msr::LSTAR, NON_CANONICAL, false),
        (msr::FS_BASE, NON_CANONICAL, false),
        (msr::GS_BASE, NON_CANONICAL, false),
        (msr::KERNEL_GS_BASE, NON_CANONICAL, false),
        (msr::SYSENTER_EIP, NON_CANONICAL, false),
        (msr::FMASK, 1 << 32, false),
        (msr::TSC_AUX, 1 << 32, false),
        (msr::PAT, 0x0007_0406_0007_0406, true),
        (msr::PAT, 0x0007_0406_0007_0402, false),
        (msr::PAT, 0x0807_0406_0007_0406, false),
        (msr::MTRR_DEFAULT_TYPE, 0xc06, true),
        (msr::MTRR_DEFAULT_TYPE, 0xc07, false),
        (msr::MTRR_DEFAULT_TYPE, 0x1c06, false),
        (msr::MTRR_PHYS_BASE0, 0xc000_0000, true),
        (msr::MTRR_PHYS_BASE0, 0xc000_0002, false),
        (msr::MTRR_PHYS_BASE0, 1 << 40, false),
        (msr::MTRR_PHYS_BASE0 + 1, 0xff_c000_0800, true),
        (msr::MTRR_PHYS_BASE0 + 1, 0xff_c000_0400, false),
        (msr::MTRR_FIX64K_00000, 0x0606_0606_0606_0606, true),
        (msr::MTRR_FIX4K_C0000 + 7, 0x0606_0606_0606_0602, false),
        (msr::MTRR_CAPABILITY, 0, false),
        (msr::XSS, 1, false),
        (msr::EFER, Efer::SCE.bits() | Efer::LME.bits() | Efer::LMA.bits(), true),
        (msr::EFER, Efer::SCE.bits() | Efer::LMA.bits(), false),
        (msr::EFER, (Efer::LME | Efer::LMA | Efer::FFXSR).bits(), false),
        (msr::KVM_SYSTEM_TIME, 0x1003, false),
        (msr::KVM_PV_EOI_EN, 0x1003, false),
        (msr::KVM_ASYNC_PF_EN, 0, false),
        (msr::KVM_STEAL_TIME, 0, false),
        (0x1234_5678, 0, false),
    ];
    let mut lab = Lab::long();
    for (number, value, accepted) in cases {
        let before = lab.m.cpu.read_msr(number);
        let outcome = wrmsr(&mut lab, number, value);
        assert_eq!(outcome, if accepted { Ok(()) } else { Err(GP) }, "{number:#x} = {value:#x}");
        let after = lab.m.cpu.read_msr(number);
        assert_eq!(after, if accepted { Ok(value) } else { before }, "{number:#x} = {value:#x}");
    }
}

#[test]
fn unknown_msr_and_user_access_fault() {
    let mut lab = Lab::long();
    assert_eq!(rdmsr(&mut lab, 0x1234_5678), Err(GP));
    assert_eq!(rdmsr(&mut lab, msr::KVM_STEAL_TIME), Err(GP));
    assert!(rdmsr(&mut lab, msr::EFER).is_ok());
    lab.user();
    assert_eq!(rdmsr(&mut lab, msr::EFER), Err(GP));
    assert_eq!(wrmsr(&mut lab, msr::TSC, 0), Err(GP));
}

#[test]
fn vendors_have_their_own() {
    for (number, intel, amd) in [
        (msr::MISC_ENABLE, true, false),
        (msr::FEATURE_CONTROL, true, false),
        (msr::ARCH_CAPABILITIES, true, false),
        (msr::SPEC_CTRL, true, false),
        (msr::AMD_HWCR, false, true),
        (msr::AMD_DE_CFG, false, true),
        (msr::AMD_SYSCFG, false, true),
        (msr::MCG_CAP, true, true),
        (msr::BIOS_UPDATE_SIGNATURE, true, true),
        (msr::MTRR_CAPABILITY, true, true),
    ] {
        for (vendor, exists) in [(Vendor::Intel, intel), (Vendor::Amd, amd)] {
            let mut lab = Lab::long_of(vendor);
            assert_eq!(rdmsr(&mut lab, number).is_ok(), exists, "{number:#x} on {vendor:?}");
        }
    }
}

#[test]
fn branch_history_injection_is_prevented_by_a_bit() {
    let mut lab = Lab::long_of(Vendor::Intel);
    let (ibrs, bhi_dis_s) = (1, 1 << 10);
    wrmsr(&mut lab, msr::SPEC_CTRL, ibrs | bhi_dis_s).unwrap();
    assert_eq!(rdmsr(&mut lab, msr::SPEC_CTRL), Ok(ibrs | bhi_dis_s));
    assert_eq!(wrmsr(&mut lab, msr::SPEC_CTRL, 1 << 11), Err(GP));
    // A processor that does not say that it has the bit has it not.
    let cpuid = Arc::make_mut(&mut lab.m.cpu.cpuid);
    let mut leaf = cpuid.get(7, 2);
    leaf.edx &= !(1 << 4);
    cpuid.set(7, 2, leaf);
    assert_eq!(wrmsr(&mut lab, msr::SPEC_CTRL, bhi_dis_s), Err(GP));
    assert_eq!(wrmsr(&mut lab, msr::SPEC_CTRL, ibrs), Ok(()));
}

#[test]
fn writing_back_what_was_read_always_works() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut lab = Lab::long_of(vendor);
        for number in (0..0x1000).chain(0xc000_0080..0xc000_0104).chain(0xc001_0000..0xc001_1100) {
            let Ok(value) = lab.m.cpu.read_msr(number) else { continue };
            let read_only = matches!(number, msr::ARCH_CAPABILITIES);
            assert_eq!(lab.m.cpu.write_msr(number, value).is_ok(), !read_only, "{number:#x} on {vendor:?}");
        }
    }
}

#[test]
fn tsc_writes_show_in_tsc_adjust() {
    let mut lab = Lab::long();
    let clock = lab.m.cpu.clock.clone();
    clock.advance_to(ringfence_engine::VirtualTime(1000));
    assert_eq!(rdmsr(&mut lab, msr::TSC), Ok(1000));
    wrmsr(&mut lab, msr::TSC, 5000).unwrap();
    assert_eq!(rdmsr(&mut lab, msr::TSC_ADJUST), Ok(4000));
    wrmsr(&mut lab, msr::TSC_ADJUST, 100_u64.wrapping_neg()).unwrap();
    clock.advance_to(ringfence_engine::VirtualTime(1234));
    // rdtsc
    lab.step(&[0x0f, 0x31]).unwrap();
    assert_eq!(lab.m.cpu.regs[2] << 32 | lab.m.cpu.regs[0], 1134);
}

#[test]
fn enabling_no_execute_takes_effect_at_once() {
    let mut lab = Lab::long();
    lab.m.cpu.write_msr(msr::EFER, (Efer::LME | Efer::SCE).bits()).unwrap();
    assert!(lab.m.cpu.efer.contains(Efer::LMA), "LMA is not software's to write");
    assert!(!lab.m.cpu.efer.contains(Efer::NXE));
}
