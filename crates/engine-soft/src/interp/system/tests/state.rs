//! Saving, loading, reset and INIT.

use ringfence_engine::{Activity, CpuState};
use ringfence_x86::segment::{Selector, attribute};
use ringfence_x86::{Cr0, Cr4, Efer, Rflags, msr};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at};

#[test]
fn loaded_state_runs_on_as_the_saved_one() {
    let mut lab = Lab::long();
    lab.user();
    lab.m.cpu.write_msr(msr::LSTAR, 0x1234).unwrap();
    lab.m.cpu.regs[0] = 7;
    lab.m.cpu.nmi_masked = true;
    lab.code(&[0x48, 0xff, 0xc0]);
    let state = lab.m.cpu.save_state();
    let mut other = Lab::long();
    other.put(at::USER_CODE, lab.get::<u32>(at::USER_CODE));
    other.m.cpu.load_state(&state).unwrap();
    assert_eq!(other.m.cpu.save_state(), state);
    assert_eq!(other.m.cpu.cpl, 3);
    other.m.step().unwrap();
    assert_eq!(other.m.cpu.regs[0], 8);
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    type Spoil = fn(&mut CpuState);
    let cases: [(&str, Spoil); 17] = [
        ("RFLAGS", |s| s.rflags |= 1 << 15),
        ("RFLAGS", |s| s.rflags &= !2),
        ("CR0", |s| s.cr0 |= 1 << 32),
        ("paging without protection", |s| s.cr0 &= !Cr0::PE.bits()),
        ("NW without CD", |s| s.cr0 |= Cr0::NW.bits()),
        ("CR4", |s| s.cr4 |= Cr4::LA57.bits()),
        ("EFER", |s| s.efer |= 1 << 12),
        ("LMA", |s| s.efer &= !Efer::LMA.bits()),
        ("PAE", |s| s.cr4 &= !Cr4::PAE.bits()),
        ("CR3", |s| s.cr3 |= 1 << 50),
        ("VM", |s| s.rflags |= Rflags::VM.bits()),
        ("CS", |s| s.segments[1].attributes |= attribute::DB),
        ("RIP", |s| s.rip = 1 << 47),
        ("base", |s| s.segments[4].base = 1 << 47),
        ("DR6", |s| s.dr6 = 1 << 32),
        ("MSR", |s| *s.msrs.entry(msr::LSTAR).or_default() = 1 << 47),
        ("XCR0", |s| s.xcr0 = 0),
    ];
    let mut lab = Lab::long();
    let good = lab.m.cpu.save_state();
    lab.m.cpu.load_state(&good).unwrap();
    for (what, spoil) in cases {
        let mut state = good.clone();
        spoil(&mut state);
        let error = lab.m.cpu.load_state(&state).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert_eq!(lab.m.cpu.save_state(), good, "{what}");
    }
}

#[test]
fn unknown_msr_in_a_state_is_refused() {
    let mut lab = Lab::long();
    let mut state = lab.m.cpu.save_state();
    state.msrs.insert(0x1234_5678, 0);
    assert!(lab.m.cpu.load_state(&state).unwrap_err().to_string().contains("0x12345678"));
}

#[test]
fn reset_starts_at_the_reset_vector_with_the_signature_in_edx() {
    let mut lab = Lab::long();
    lab.m.cpu.write_msr(msr::LSTAR, 0x1234).unwrap();
    lab.m.cpu.reset();
    let cpu = &mut lab.m.cpu;
    assert_eq!((cpu.fetch_address(), cpu.cpl, cpu.code_size.bits()), (0xffff_fff0, 0, 16));
    assert_eq!(cpu.regs[2], u64::from(cpu.cpuid_result(1, 0).eax));
    assert_eq!(cpu.read_msr(msr::LSTAR), Ok(0));
    assert_eq!(cpu.cr0.bits(), 0x6000_0010);
    assert_eq!(cpu.activity, Activity::Active);
}

#[test]
fn init_keeps_msrs_and_cache_bits() {
    let mut lab = Lab::long();
    lab.m.cpu.write_msr(msr::MTRR_DEFAULT_TYPE, 0xc06).unwrap();
    lab.m.cpu.init();
    assert_eq!(lab.m.cpu.read_msr(msr::MTRR_DEFAULT_TYPE), Ok(0xc06));
    assert_eq!(lab.m.cpu.fetch_address(), 0xffff_fff0);
    assert!(lab.m.cpu.efer.is_empty());
}

#[test]
fn start_up_interrupt_begins_at_its_page() {
    let mut lab = Lab::real();
    lab.m.cpu.init();
    lab.m.cpu.activity = Activity::WaitForSipi;
    lab.m.cpu.start_up(0x9a);
    let cpu = &lab.m.cpu;
    assert_eq!((cpu.fetch_address(), cpu.regs[RIP]), (0x9_a000, 0));
    assert_eq!(cpu.segments[1].selector, Selector(0x9a00));
    assert_eq!(cpu.activity, Activity::Active);
}
