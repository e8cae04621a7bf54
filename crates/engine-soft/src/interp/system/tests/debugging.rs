//! Single step, breakpoints and debug registers.

use ringfence_x86::{Cr4, Exception, Rflags};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const NOP: &[u8] = &[0x90];
const BS: u64 = 0x4000;

/// The causes in DR6.
fn causes(lab: &Lab) -> u64 {
    lab.m.cpu.dr6 & 0xe00f
}

fn arm(lab: &mut Lab, dr7: u64, address: u64) {
    lab.m.cpu.dr[0] = address;
    lab.m.cpu.dr7 = 0x400 | dr7;
    lab.m.cpu.update_class();
}

#[test]
fn single_step_traps_behind_the_instruction() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(TF | 2);
    assert!(lab.m.cpu.steps_singly());
    lab.deliver(NOP).unwrap();
    assert_eq!((lab.handler(), causes(&lab)), (Some(1), BS));
    let [rip, _, rflags] = lab.stack::<u64, 3>();
    assert_eq!((rip, rflags & TF, rflags & RF), (at::CODE + 1, TF, 0));
    assert!(!lab.m.cpu.flags.contains(Rflags::TF), "the handler runs freely");
}

#[test]
fn flag_set_by_popf_traps_after_the_next_instruction() {
    let mut lab = Lab::long();
    lab.put(at::STACK - 8, TF | 2);
    lab.m.cpu.regs[4] = at::STACK - 8;
    lab.deliver(&[0x9d]).unwrap();
    assert_eq!(lab.m.cpu.rip(), at::CODE + 1, "not after POPF itself");
    lab.deliver(NOP).unwrap();
    assert_eq!(lab.handler(), Some(1));
}

#[test]
fn single_step_does_not_enter_a_software_interrupts_handler() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(TF | 2);
    lab.deliver(&[0xcd, 0x33]).unwrap();
    assert_eq!(lab.handler(), Some(0x33));
}

#[test]
fn repeated_instruction_traps_after_each_element() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(TF | 2);
    (lab.m.cpu.regs[1], lab.m.cpu.regs[7]) = (3, at::DATA);
    // rep stosb
    lab.deliver(&[0xf3, 0xaa]).unwrap();
    assert_eq!((lab.handler(), causes(&lab), lab.m.cpu.regs[1]), (Some(1), BS, 2));
    assert_eq!(lab.stack::<u64, 1>(), [at::CODE]);
}

#[test]
fn fault_of_a_stepped_instruction_comes_without_the_trap() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(TF | 2);
    lab.deliver(&[0x0f, 0x0b]).unwrap();
    assert_eq!((lab.handler(), causes(&lab)), (Some(6), 0));
}

#[test]
fn mov_ss_swallows_its_own_step_and_delays_a_data_breakpoint() {
    let mut lab = Lab::long();
    arm(&mut lab, 1 | 3 << 16, at::DATA);
    lab.put(at::DATA, sel::DATA);
    lab.m.cpu.set_rflags(TF | 2);
    // mov ss, [DATA]
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    lab.deliver(&[0x8e, 0x14, 0x25, a, b, c, d]).unwrap();
    assert_eq!(lab.m.cpu.rip(), at::CODE + 7, "held off");
    lab.deliver(NOP).unwrap();
    assert_eq!((lab.handler(), causes(&lab)), (Some(1), BS | 1));
    assert_eq!(lab.stack::<u64, 1>(), [at::CODE + 8]);
}

#[test]
fn instruction_breakpoint_is_a_fault_that_rf_lets_pass() {
    let mut lab = Lab::long();
    arm(&mut lab, 1, at::CODE);
    assert!(lab.m.cpu.steps_singly());
    lab.deliver(NOP).unwrap();
    assert_eq!((lab.handler(), causes(&lab)), (Some(1), 1));
    assert_eq!(lab.stack::<u64, 1>(), [at::CODE]);
    // The handler returns with RF set.
    lab.put(at::INNER_STACK, 0_u64);
    lab.put(lab.m.cpu.regs[4] + 16, RF | 2);
    lab.step(&[0x48, 0xcf]).unwrap();
    assert!(lab.m.cpu.flags.contains(Rflags::RF));
    lab.deliver(NOP).unwrap();
    assert_eq!(lab.m.cpu.rip(), at::CODE + 1);
    assert!(!lab.m.cpu.flags.contains(Rflags::RF), "for one instruction only");
}

#[test]
fn data_breakpoint_traps_after_the_access() {
    // (DR7 condition and length, writes it, is hit)
    for (kind, write, hit) in [(1, true, true), (1, false, false), (3, false, true), (3, true, true)] {
        let mut lab = Lab::long();
        arm(&mut lab, 2 | kind << 16 | 3 << 18, at::DATA + 4);
        // mov [DATA + 2], eax or mov eax, [DATA + 2]: overlaps the four bytes watched
        let [a, b, c, d] = (at::DATA as u32 + 2).to_le_bytes();
        lab.deliver(&[if write { 0x89 } else { 0x8b }, 0x04, 0x25, a, b, c, d]).unwrap();
        assert_eq!(lab.handler(), hit.then_some(1), "condition {kind}, write {write}");
        assert_eq!(causes(&lab), u64::from(hit));
    }
}

#[test]
fn io_breakpoint_needs_debugging_extensions() {
    for (de, hit) in [(false, false), (true, true)] {
        let mut lab = Lab::long();
        lab.m.cpu.cr4.set(Cr4::DE, de);
        arm(&mut lab, 1 | 2 << 16, 0x81);
        // out 0x80, ax
        lab.deliver(&[0x66, 0xe7, 0x80]).unwrap();
        assert_eq!(lab.handler(), hit.then_some(1));
    }
}

#[test]
fn general_detect_faults_on_access_and_clears_itself() {
    let mut lab = Lab::long();
    lab.m.cpu.dr7 = 0x2400;
    // mov rax, dr6
    lab.deliver(&[0x0f, 0x21, 0xf0]).unwrap();
    assert_eq!((lab.handler(), causes(&lab)), (Some(1), 0x2000));
    assert_eq!(lab.m.cpu.dr7 & 0x2000, 0);
    let [rip, _, rflags] = lab.stack::<u64, 3>();
    assert_eq!((rip, rflags & RF), (at::CODE, RF));
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    let mut lab = Lab::long();
    // mov dr6, rax; mov dr7, rax; mov rcx, dr4 and dr5
    lab.m.cpu.regs[0] = 0xffff_ffff;
    lab.step(&[0x0f, 0x23, 0xf0]).unwrap();
    assert_eq!(lab.m.cpu.dr6, 0xffff_efff);
    lab.m.cpu.regs[0] = 0;
    lab.step(&[0x0f, 0x23, 0xf8]).unwrap();
    assert_eq!(lab.m.cpu.dr7, 0x400);
    lab.m.cpu.regs[0] = 1 << 32;
    assert_eq!(lab.step(&[0x0f, 0x23, 0xf8]), Err(Exception::GP0));
    lab.step(&[0x0f, 0x21, 0xe1]).unwrap();
    assert_eq!(lab.m.cpu.regs[1], 0xffff_efff, "DR4 is DR6");
    lab.m.cpu.cr4.insert(Cr4::DE);
    assert_eq!(lab.step(&[0x0f, 0x21, 0xe1]), Err(Exception::UD));
    lab.user();
    assert_eq!(lab.step(&[0x0f, 0x21, 0xc0]), Err(Exception::GP0));
}

#[test]
fn syscall_traps_by_the_flags_it_leaves() {
    for (mask, trapped) in [(TF, None), (0, Some(1))] {
        let mut lab = Lab::long();
        lab.m.cpu.write_msr(ringfence_x86::msr::STAR, u64::from(sel::CODE) << 32).unwrap();
        lab.m.cpu.write_msr(ringfence_x86::msr::LSTAR, at::CODE).unwrap();
        lab.m.cpu.write_msr(ringfence_x86::msr::FMASK, mask).unwrap();
        lab.user();
        lab.m.cpu.set_rflags(TF | 2);
        lab.deliver(&[0x0f, 0x05]).unwrap();
        assert_eq!(lab.handler(), trapped, "mask {mask:#x}");
    }
}

#[test]
fn nothing_is_stepped_when_nothing_is_armed() {
    let mut lab = Lab::long();
    assert!(!lab.m.cpu.steps_singly());
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.deliver(NOP).unwrap();
    assert_eq!(lab.m.cpu.rip(), at::CODE + 1);
}
