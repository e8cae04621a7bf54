//! KVM's clock, end of interrupt and hypercalls.

use ringfence_engine::VirtualTime;
use ringfence_x86::msr;

use crate::interp::system::kvm::tsc_scale;
use crate::interp::testing::{Lab, at};

/// What a guest computes from a clock page (Linux `arch/x86/kernel/pvclock.c` says how).
fn guest_time(lab: &Lab, page: u64, tsc: u64) -> u64 {
    let delta = tsc.wrapping_sub(lab.get::<u64>(page + 8));
    let shift = lab.get::<u8>(page + 28) as i8;
    let shifted = if shift < 0 { delta >> -shift } else { delta << shift };
    let scaled = (u128::from(shifted) * u128::from(lab.get::<u32>(page + 24))) >> 32;
    lab.get::<u64>(page + 16) + scaled as u64
}

#[test]
fn scale_has_31_bits_and_more() {
    for khz in [1, 999_999, 1_000_000, 1_000_001, 2_596_143, 5_000_000, u32::MAX] {
        let (multiplier, shift) = tsc_scale(khz);
        assert!(multiplier >= 1 << 31, "{khz}");
        let day = 86_400_000 * u128::from(khz);
        let shifted = if shift < 0 { day >> -shift } else { day << shift };
        let ns = (shifted * u128::from(multiplier)) >> 32;
        let error = 86_400_000_000_000_u128.abs_diff(ns);
        assert!(error < 86_400_000_000_000 >> 30, "{khz} kHz: {error} ns a day");
    }
}

#[test]
fn clock_page_agrees_with_the_virtual_clock() {
    let mut lab = Lab::long();
    let clock = lab.m.cpu.clock.clone();
    clock.advance_to(VirtualTime(123_456));
    lab.put(at::DATA, 6_u32);
    lab.m.cpu.write_msr(msr::KVM_SYSTEM_TIME, at::DATA | 1).unwrap();
    assert_eq!(lab.get::<u32>(at::DATA), 8, "an even version, and another one");
    assert_eq!(lab.get::<u8>(at::DATA + 29), 1, "TSC_STABLE");
    for time in [123_456, 999_999_999, 3_600_000_000_000] {
        clock.advance_to(VirtualTime(time));
        assert_eq!(guest_time(&lab, at::DATA, lab.m.cpu.guest_tsc()), time);
    }
    // A guest that sets its TSC keeps its time.
    lab.m.cpu.write_msr(msr::TSC, 42).unwrap();
    assert_eq!(guest_time(&lab, at::DATA, lab.m.cpu.guest_tsc()), 3_600_000_000_000);
    assert_eq!(lab.get::<u32>(at::DATA), 10);
}

#[test]
fn disabled_clock_writes_nothing() {
    let mut lab = Lab::long();
    lab.m.cpu.write_msr(msr::KVM_SYSTEM_TIME_OLD, at::DATA).unwrap();
    assert_eq!(lab.get::<u64>(at::DATA), 0);
    // Far outside memory.
    lab.m.cpu.write_msr(msr::KVM_SYSTEM_TIME, 0xffff_ffff_ffff_fffd).unwrap();
    lab.m.cpu.write_msr(msr::KVM_WALL_CLOCK, 0xffff_ffff_ffff_fffc).unwrap();
}

#[test]
fn wall_clock_is_a_constant_in_counted_mode() {
    let mut lab = Lab::long();
    lab.m.cpu.clock.advance_to(VirtualTime(5_000_000_000));
    lab.m.cpu.write_msr(msr::KVM_WALL_CLOCK, at::DATA).unwrap();
    assert_eq!(lab.get::<u32>(at::DATA) % 2, 0);
    assert_eq!((lab.get::<u32>(at::DATA + 4), lab.get::<u32>(at::DATA + 8)), (1_767_225_600, 0));
}

#[test]
fn hypercalls_do_not_exist_and_users_may_not_ask() {
    for bytes in [[0x0f, 0x01, 0xc1], [0x0f, 0x01, 0xd9]] {
        let mut lab = Lab::long();
        lab.m.cpu.regs[0] = 0x55;
        lab.step(&bytes).unwrap();
        assert_eq!(lab.m.cpu.regs[0] as i64, -1000);
        lab.user();
        lab.step(&bytes).unwrap();
        assert_eq!(lab.m.cpu.regs[0] as i64, -1);
    }
    let mut lab = Lab::protected();
    lab.step(&[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], 0xffff_fc18);
}
