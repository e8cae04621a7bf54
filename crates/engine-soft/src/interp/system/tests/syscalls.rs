//! SYSCALL, SYSRET, SYSENTER and SYSEXIT.

use ringfence_x86::cpuid::Vendor;
use ringfence_x86::{Efer, Exception, Rflags, SegmentRegister, msr};

use crate::interp::testing::{Lab, at, sel};

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSRETD: &[u8] = &[0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXITD: &[u8] = &[0x0f, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];
const ENTRY: u64 = at::CODE + 0x800;
const ENTRY32: u64 = at::CODE + 0x900;

fn lab(vendor: Vendor) -> Lab {
    let mut lab = Lab::long_of(vendor);
    let cpu = &mut lab.m.cpu;
    let star = u64::from(sel::CODE) << 32 | u64::from(sel::USER_CODE32) << 48;
    for (number, value) in [
        (msr::STAR, star),
        (msr::LSTAR, ENTRY),
        (msr::CSTAR, ENTRY32),
        (msr::FMASK, 0x4_7700),
        (msr::SYSENTER_CS, sel::CODE.into()),
        (msr::SYSENTER_ESP, at::INNER_STACK),
        (msr::SYSENTER_EIP, ENTRY),
    ] {
        cpu.write_msr(number, value).unwrap();
    }
    lab
}

fn selectors(lab: &Lab) -> (u16, u16) {
    let selector = |register| lab.m.cpu.segment(register).selector.0;
    (selector(SegmentRegister::Cs), selector(SegmentRegister::Ss))
}

#[test]
fn syscall_and_sysret_go_there_and_back() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut lab = lab(vendor);
        lab.user();
        lab.m.cpu.set_rflags(0x4_0ad7);
        lab.step(SYSCALL).unwrap();
        let cpu = &lab.m.cpu;
        assert_eq!((cpu.cpl, cpu.rip(), cpu.regs[4]), (0, ENTRY, at::USER_STACK));
        assert_eq!((cpu.regs[1], cpu.regs[11]), (at::USER_CODE + 2, 0x4_0ad7));
        assert_eq!(cpu.rflags(), 0x4_0ad7 & !0x4_7700);
        assert_eq!(selectors(&lab), (sel::CODE, sel::DATA));
        lab.step(SYSRETQ).unwrap();
        assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip(), lab.m.cpu.is_64bit()), (3, at::USER_CODE + 2, true));
        assert_eq!(selectors(&lab), (sel::USER_CODE, sel::USER_DATA));
        assert_eq!(lab.m.cpu.rflags(), 0x4_0ad7);
    }
}

#[test]
fn sysret_to_compatibility_mode_loads_the_base_selector() {
    let mut lab = lab(Vendor::Amd);
    lab.m.cpu.regs[1] = 0xffff_0000_0000_9000;
    lab.m.cpu.regs[11] = 2;
    lab.step(SYSRETD).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.is_64bit()), (0x9000, false));
    assert_eq!(selectors(&lab), (sel::USER_CODE32, sel::USER_DATA));
}

#[test]
fn sysret_to_non_canonical_address_faults_at_once_on_intel_and_on_fetch_on_amd() {
    let target = 0x8000_0000_0000;
    let mut intel = lab(Vendor::Intel);
    intel.m.cpu.regs[1] = target;
    assert_eq!(intel.step(SYSRETQ), Err(Exception::GP0));
    assert_eq!(intel.m.cpu.cpl, 0);
    let mut amd = lab(Vendor::Amd);
    amd.m.cpu.regs[1] = target;
    amd.step(SYSRETQ).unwrap();
    assert_eq!((amd.m.cpu.cpl, amd.m.cpu.rip()), (3, target));
    assert_eq!(amd.m.step(), Err(Exception::GP0));
}

#[test]
fn syscall_is_undefined_without_sce_and_sysret_protected_from_users() {
    let mut lab = lab(Vendor::Amd);
    lab.m.cpu.efer.remove(Efer::SCE);
    assert_eq!(lab.step(SYSCALL), Err(Exception::UD));
    assert_eq!(lab.step(SYSRETQ), Err(Exception::UD));
    lab.m.cpu.efer.insert(Efer::SCE);
    lab.user();
    assert_eq!(lab.step(SYSRETQ), Err(Exception::GP0));
}

#[test]
fn syscall_from_compatibility_mode_is_amds_and_sysenter_intels() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut lab = lab(vendor);
        lab.enter(sel::USER_CODE32, sel::USER_DATA, at::USER_STACK);
        let outcome = lab.step(SYSCALL);
        if vendor == Vendor::Amd {
            assert_eq!((outcome, lab.m.cpu.rip()), (Ok(()), ENTRY32));
            assert!(lab.m.cpu.is_64bit());
        } else {
            assert_eq!(outcome, Err(Exception::UD));
        }
        lab.enter(sel::USER_CODE32, sel::USER_DATA, at::USER_STACK);
        let outcome = lab.step(SYSENTER);
        if vendor == Vendor::Amd {
            assert_eq!(outcome, Err(Exception::UD));
        } else {
            assert_eq!((outcome, lab.m.cpu.rip(), lab.m.cpu.regs[4]), (Ok(()), ENTRY, at::INNER_STACK));
            assert!(lab.m.cpu.is_64bit());
        }
    }
}

#[test]
fn sysexit_returns_to_the_selectors_behind_sysenters() {
    let mut lab = lab(Vendor::Intel);
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2]) = (0x1234, at::USER_CODE);
    lab.step(SYSEXITQ).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip(), lab.m.cpu.regs[4]), (3, at::USER_CODE, 0x1234));
    assert_eq!(selectors(&lab), ((sel::CODE + 32) | 3, (sel::CODE + 40) | 3));
    let mut lab = self::lab(Vendor::Intel);
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2]) = (0x1234, at::USER_CODE);
    lab.step(SYSEXITD).unwrap();
    assert_eq!(selectors(&lab), ((sel::CODE + 16) | 3, (sel::CODE + 24) | 3));
    assert!(!lab.m.cpu.is_64bit());
    assert_eq!(lab.step(SYSEXITD), Err(Exception::GP0));
}

#[test]
fn sysenter_without_a_code_segment_faults() {
    let mut lab = lab(Vendor::Intel);
    lab.m.cpu.write_msr(msr::SYSENTER_CS, 3).unwrap();
    assert_eq!(lab.step(SYSENTER), Err(Exception::GP0));
}

#[test]
fn syscall_masks_interrupts_by_fmask() {
    let mut lab = lab(Vendor::Amd);
    lab.user();
    lab.m.cpu.set_rflags(0x202);
    lab.step(SYSCALL).unwrap();
    assert!(!lab.m.cpu.flags.contains(Rflags::IF));
}
