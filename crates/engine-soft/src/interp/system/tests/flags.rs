//! Flags, interrupt shadow and HLT.

use ringfence_engine::Activity;
use ringfence_x86::{Cr4, Exception, Rflags};

use crate::interp::testing::{Lab, at, sel};

const IF: u64 = 1 << 9;

#[test]
fn sti_opens_a_shadow_only_if_interrupts_were_off() {
    let mut lab = Lab::long();
    lab.step(&[0xfb]).unwrap();
    assert!(lab.m.cpu.interrupt_shadow && lab.m.cpu.flags.contains(Rflags::IF));
    assert!(lab.m.cpu.steps_singly(), "the shadow ends after one instruction");
    lab.code(&[0x90]);
    lab.m.single_step().unwrap();
    assert!(!lab.m.cpu.interrupt_shadow);
    assert!(lab.m.cpu.leave_block, "so that the run loop looks at interrupts");
    lab.code(&[0xfb]);
    lab.m.single_step().unwrap();
    assert!(!lab.m.cpu.interrupt_shadow);
}

#[test]
fn cli_and_sti_obey_iopl() {
    for (iopl, outcome) in [(0, Err(Exception::GP0)), (3, Ok(()))] {
        for opcode in [0xfa, 0xfb] {
            let mut lab = Lab::long();
            lab.user();
            lab.m.cpu.set_rflags(iopl << 12 | 2);
            assert_eq!(lab.step(&[opcode]), outcome);
        }
    }
}

#[test]
fn popf_changes_what_the_privilege_allows() {
    let all = !0_u64;
    // (CPL 3, IOPL, RFLAGS afterwards)
    for (user, iopl, expected) in [(false, 0, 0x24_7fd7), (true, 0, 0x24_4dd7), (true, 3, 0x24_7fd7)] {
        let mut lab = Lab::long();
        if user {
            lab.user();
        }
        lab.m.cpu.set_rflags(iopl << 12 | 2);
        let stack = lab.m.cpu.regs[4];
        lab.put(stack - 8, all);
        lab.m.cpu.regs[4] = stack - 8;
        lab.step(&[0x9d]).unwrap();
        assert_eq!(lab.m.cpu.rflags(), expected, "user {user}, IOPL {iopl}");
    }
}

#[test]
fn sixteen_bit_popf_keeps_the_upper_flags() {
    let mut lab = Lab::protected();
    lab.m.cpu.set_rflags(0x20_0002);
    lab.put(at::STACK - 2, 0_u16);
    lab.m.cpu.regs[4] = at::STACK - 2;
    lab.step(&[0x66, 0x9d]).unwrap();
    assert_eq!(lab.m.cpu.rflags(), 0x20_0002);
}

#[test]
fn pushf_hides_vm_and_rf() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(0x1_0000 | IF | 0x8d7);
    lab.step(&[0x9c]).unwrap();
    assert_eq!(lab.stack::<u64, 1>(), [IF | 0x8d7]);
}

#[test]
fn hlt_is_for_cpl_0() {
    let mut lab = Lab::long();
    lab.step(&[0xf4]).unwrap();
    assert_eq!((lab.m.cpu.activity, lab.m.cpu.rip()), (Activity::Halted, at::CODE + 1));
    let mut lab = Lab::long();
    lab.user();
    assert_eq!(lab.step(&[0xf4]), Err(Exception::GP0));
    assert_eq!(lab.m.cpu.activity, Activity::Active);
}

#[test]
fn stac_opens_user_pages_that_smap_closes() {
    let mut lab = Lab::long();
    lab.m.cpu.cr4.insert(Cr4::SMAP);
    lab.m.cpu.update_mode();
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    let load = [0x8b, 0x04, 0x25, a, b, c, d];
    assert_eq!(lab.step(&load).map_err(|e| e.error_code), Err(1));
    lab.step(&[0x0f, 0x01, 0xcb]).unwrap();
    lab.step(&load).unwrap();
    lab.step(&[0x0f, 0x01, 0xca]).unwrap();
    assert_eq!(lab.step(&load).map_err(|e| e.error_code), Err(1));
    lab.user();
    assert_eq!(lab.step(&[0x0f, 0x01, 0xcb]), Err(Exception::UD));
}

#[test]
fn rdtsc_obeys_tsd() {
    let mut lab = Lab::long();
    lab.m.cpu.cr4.insert(Cr4::TSD);
    lab.step(&[0x0f, 0x31]).unwrap();
    lab.user();
    assert_eq!(lab.step(&[0x0f, 0x31]), Err(Exception::GP0));
    assert_eq!(lab.step(&[0x0f, 0x01, 0xf9]), Err(Exception::GP0));
    lab.m.cpu.cr4.remove(Cr4::TSD);
    lab.m.cpu.write_msr(ringfence_x86::msr::TSC_AUX, 0x55).unwrap();
    lab.step(&[0x0f, 0x01, 0xf9]).unwrap();
    assert_eq!(lab.m.cpu.regs[1], 0x55);
    // rdpmc: there are no counters
    assert_eq!(lab.step(&[0x0f, 0x33]), Err(Exception::GP0));
    assert_eq!(lab.m.cpu.segments[1].selector.0, sel::USER_CODE);
}
