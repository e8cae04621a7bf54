//! Delivery of events: gates, stacks, frames, error codes, double and triple faults.

use ringfence_engine::Activity;
use ringfence_x86::segment::system_type;
use ringfence_x86::{Exception, Rflags, SegmentRegister, Vector};

use crate::interp::event::Source;
use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

const IF: u64 = 1 << 9;
const RF: u64 = 1 << 16;
const UD2: &[u8] = &[0x0f, 0x0b];

fn flags(lab: &Lab) -> Rflags {
    lab.m.cpu.flags
}

fn selector(lab: &Lab, register: SegmentRegister) -> u16 {
    lab.m.cpu.segment(register).selector.0
}

#[test]
fn fault_in_64_bit_mode_pushes_aligned_frame_with_rf() {
    let mut lab = Lab::long();
    lab.m.cpu.regs[4] = at::STACK - 5;
    lab.m.cpu.set_rflags(IF | 0x8d7);
    lab.deliver(UD2).unwrap();
    assert_eq!(lab.handler(), Some(6));
    // SDM 3A 6.14.2: aligned to 16 bytes, SS:RSP always pushed.
    assert_eq!(lab.m.cpu.regs[4], ((at::STACK - 5) & !0xf) - 40);
    let frame = [at::CODE, sel::CODE.into(), IF | 0x8d7 | RF, at::STACK - 5, sel::DATA.into()];
    assert_eq!(lab.stack::<u64, 5>(), frame);
    assert!(!flags(&lab).contains(Rflags::IF));
}

#[test]
fn trap_gate_keeps_interrupts_enabled() {
    let mut lab = Lab::long();
    lab.gate(6, sel::CODE, system_type::TRAP_GATE, 0, 0);
    lab.m.cpu.set_rflags(IF | 2);
    lab.deliver(UD2).unwrap();
    assert!(flags(&lab).contains(Rflags::IF));
}

#[test]
fn fault_from_user_code_switches_to_the_tss_stack_with_null_ss() {
    let mut lab = Lab::long();
    lab.user();
    lab.deliver(UD2).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.regs[4]), (0, at::INNER_STACK - 40));
    assert_eq!(selector(&lab, SegmentRegister::Ss), 0);
    let [rip, cs, _, rsp, ss] = lab.stack::<u64, 5>();
    assert_eq!((rip, cs), (at::USER_CODE, sel::USER_CODE.into()));
    assert_eq!((rsp, ss), (at::USER_STACK, sel::USER_DATA.into()));
}

#[test]
fn interrupt_stack_is_used_at_the_same_privilege_too() {
    let mut lab = Lab::long();
    lab.gate(6, sel::CODE, system_type::INTERRUPT_GATE, 0, 1);
    lab.deliver(UD2).unwrap();
    assert_eq!(lab.m.cpu.regs[4], at::IST1 - 40);
    // Without a change of privilege SS stays (SDM 3A 6.14.4).
    assert_eq!(selector(&lab, SegmentRegister::Ss), sel::DATA);
}

#[test]
fn page_fault_pushes_error_code_and_loads_cr2() {
    // mov eax, [address]; mov [address], eax
    for (opcode, address, user, code) in [
        (0x8b, at::ABSENT, false, 0),
        (0x89, at::ABSENT, false, 2),
        (0x8b, at::ABSENT, true, 4),
        (0x89, at::KERNEL_ONLY, true, 7),
        (0x8b, at::KERNEL_ONLY, true, 5),
    ] {
        let mut lab = Lab::long();
        if user {
            lab.user();
        }
        let [a, b, c, d] = (address as u32 + 0x123).to_le_bytes();
        lab.deliver(&[opcode, 0x04, 0x25, a, b, c, d]).unwrap();
        assert_eq!(lab.handler(), Some(14));
        assert_eq!(lab.m.cpu.cr2, address + 0x123);
        assert_eq!(lab.stack::<u64, 1>(), [code], "{opcode:#x} at {address:#x}, user {user}");
    }
}

#[test]
fn software_interrupt_obeys_the_gates_privilege() {
    let mut lab = Lab::long();
    lab.user();
    // SDM 3A 6.12.1.2: error code is vector * 8 + 2, EXT clear.
    assert_eq!(lab.step(&[0xcd, 0x80]), Err(Exception::gp(0x80 * 8 + 2)));
    lab.gate(0x80, sel::CODE, system_type::INTERRUPT_GATE, 3, 0);
    lab.step(&[0xcd, 0x80]).unwrap();
    assert_eq!(lab.handler(), Some(0x80));
    let [rip, _, rflags] = lab.stack::<u64, 3>();
    assert_eq!((rip, rflags & RF), (at::USER_CODE + 2, 0));
}

#[test]
fn int1_ignores_the_gates_privilege() {
    let mut lab = Lab::long();
    lab.user();
    lab.step(&[0xf1]).unwrap();
    assert_eq!(lab.handler(), Some(1));
}

#[test]
fn external_interrupt_through_absent_gate_becomes_not_present_with_ext() {
    let mut lab = Lab::long();
    let gate: u64 = lab.get(at::IDT + 16 * 0x30);
    lab.put(at::IDT + 16 * 0x30, gate & !(1 << 47));
    lab.m.cpu.interrupt(0x30, Source::External).unwrap();
    assert_eq!(lab.handler(), Some(11));
    assert_eq!(lab.stack::<u64, 1>(), [0x30 * 8 + 3]);
}

#[test]
fn interrupt_wakes_a_halted_cpu() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(IF | 2);
    lab.step(&[0xf4]).unwrap();
    assert_eq!(lab.m.cpu.activity, Activity::Halted);
    lab.m.cpu.interrupt(0x30, Source::External).unwrap();
    assert_eq!(lab.m.cpu.activity, Activity::Active);
    assert_eq!(lab.stack::<u64, 1>(), [at::CODE + 1]);
}

#[test]
fn nmi_masks_further_nmis_until_iret() {
    let mut lab = Lab::long();
    lab.m.cpu.interrupt(2, Source::Nmi).unwrap();
    assert!(lab.m.cpu.nmi_masked);
    lab.step(&[0x48, 0xcf]).unwrap();
    assert!(!lab.m.cpu.nmi_masked);
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE, at::STACK));
}

#[test]
fn non_canonical_inner_stack_is_a_double_fault_for_a_contributory_exception() {
    let mut lab = Lab::long();
    lab.user();
    lab.put(at::TSS + 4, 0x8000_0000_0000_u64);
    lab.gate(8, sel::CODE, system_type::INTERRUPT_GATE, 0, 1);
    // #GP, whose delivery raises #SS: both contributory (SDM 3A table 6-5).
    lab.m.cpu.raise(Exception::gp(0x18)).unwrap();
    assert_eq!(lab.handler(), Some(8));
    assert_eq!(lab.stack::<u64, 2>(), [0, at::USER_CODE]);
}

#[test]
fn page_fault_while_delivering_a_benign_exception_is_delivered_itself() {
    let mut lab = Lab::long();
    lab.user();
    lab.put(at::TSS + 4, at::ABSENT + 0x800);
    lab.gate(14, sel::CODE, system_type::INTERRUPT_GATE, 0, 1);
    lab.m.cpu.raise(Exception::UD).unwrap();
    assert_eq!(lab.handler(), Some(14));
    assert_eq!(lab.m.cpu.cr2, at::ABSENT + 0x7f8);
    // A supervisor write to an absent page; the frame is that of the interrupted program.
    let [code, rip, cs] = lab.stack::<u64, 3>();
    assert_eq!((code, rip, cs), (2, at::USER_CODE, sel::USER_CODE.into()));
}

#[test]
fn fault_while_delivering_a_double_fault_shuts_down() {
    let mut lab = Lab::long();
    lab.m.cpu.idtr.limit = 0;
    let fault = lab.m.cpu.raise(Exception::with_code(Vector::PageFault, 2)).unwrap_err();
    assert_eq!(fault.chain, "#PF(0x2), then #GP(0x73), then #GP(0x43)");
    assert_eq!(fault.rip, at::CODE);
    assert_eq!(lab.m.cpu.rip(), at::CODE, "the state is that before the delivery");
}

#[test]
fn protected_mode_frame_at_the_same_privilege_is_three_words() {
    let mut lab = Lab::protected();
    lab.deliver(UD2).unwrap();
    assert_eq!(lab.handler(), Some(6));
    let [eip, cs, eflags] = lab.stack::<u32, 3>();
    assert_eq!((eip, cs, eflags & RF), (at::CODE, sel::CODE32.into(), RF));
    assert_eq!(lab.m.cpu.regs[4], at::STACK - 12);
}

#[test]
fn protected_mode_fault_from_user_code_loads_ss_from_the_tss() {
    let mut lab = Lab::protected();
    lab.user();
    lab.m.cpu.raise(Exception::gp(0x50)).unwrap();
    assert_eq!((lab.m.cpu.cpl, selector(&lab, SegmentRegister::Ss)), (0, sel::DATA));
    let [code, eip, cs, _, esp, ss] = lab.stack::<u32, 6>();
    assert_eq!((code, eip, cs), (0x50, at::USER_CODE, sel::USER_CODE32.into()));
    assert_eq!((esp, ss), (at::USER_STACK, sel::USER_DATA.into()));
}

#[test]
fn sixteen_bit_gate_pushes_words() {
    let mut lab = Lab::protected();
    lab.gate(6, sel::CODE32, system_type::INTERRUPT_GATE16, 0, 0);
    lab.deliver(UD2).unwrap();
    assert_eq!(lab.m.cpu.regs[4], at::STACK - 6);
    let [ip, cs, _] = lab.stack::<u16, 3>();
    assert_eq!((ip, cs), (at::CODE, sel::CODE32.into()));
}

#[test]
fn bad_inner_stack_selector_is_an_invalid_tss_fault_with_ext() {
    let mut lab = Lab::protected();
    lab.user();
    // A code segment for a stack (SDM 2A, INT n: #TS(NewSS)).
    lab.put(at::TSS + 8, sel::CODE32);
    lab.gate(10, sel::CODE32, system_type::INTERRUPT_GATE, 0, 0);
    let before = lab.m.cpu.segments;
    let fault = lab.m.cpu.raise(Exception::UD).unwrap_err();
    assert_eq!(fault.chain, "#UD, then #TS(0x41), then #TS(0x41), then #TS(0x41)");
    assert_eq!(lab.m.cpu.segments, before);
    assert_eq!(lab.m.cpu.cpl, 3);
}

#[test]
fn gate_to_a_less_privileged_segment_is_a_general_protection_fault() {
    let mut lab = Lab::protected();
    lab.gate(0x40, sel::USER_CODE32, system_type::INTERRUPT_GATE, 0, 0);
    assert_eq!(lab.step(&[0xcd, 0x40]), Err(Exception::gp(sel::USER_CODE32 & !3)));
}

#[test]
fn real_mode_interrupt_pushes_flags_cs_ip() {
    let mut lab = Lab::real();
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.m.cpu.set_rflags(IF | 0x2);
    lab.step(&[0xcd, 0x21]).unwrap();
    assert_eq!(lab.handler(), Some(0x21));
    assert_eq!(lab.stack::<u16, 3>(), [at::CODE + 2, 0, IF | 2]);
    assert!(!flags(&lab).contains(Rflags::IF));
    // iret
    lab.step(&[0xcf]).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE + 2, at::STACK));
    assert!(flags(&lab).contains(Rflags::IF));
}

#[test]
fn divide_error_in_real_mode_goes_to_vector_zero() {
    let mut lab = Lab::real();
    lab.m.cpu.regs[RIP] = at::CODE;
    // div cl
    lab.deliver(&[0xf6, 0xf1]).unwrap();
    assert_eq!(lab.handler(), Some(0));
    assert_eq!(lab.stack::<u16, 1>(), [at::CODE]);
}

#[test]
fn bound_outside_its_limits_raises_bound_range() {
    let mut lab = Lab::protected();
    lab.put(at::DATA, -5_i32 as u32);
    lab.put(at::DATA + 4, 5_u32);
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    // bound eax, [DATA]
    for (value, outcome) in [(-5_i32, Ok(())), (5, Ok(())), (6, Err(())), (-6, Err(()))] {
        lab.m.cpu.regs[0] = u64::from(value as u32);
        lab.m.cpu.regs[RIP] = at::CODE;
        let expected = outcome.map_err(|()| Exception::new(Vector::BoundRange));
        assert_eq!(lab.step(&[0x62, 0x05, a, b, c, d]), expected, "{value}");
    }
}

#[test]
fn into_traps_only_on_overflow() {
    let mut lab = Lab::protected();
    lab.step(&[0xce]).unwrap();
    assert_eq!(lab.m.cpu.rip(), at::CODE + 1);
    lab.m.cpu.set_rflags(0x802);
    lab.step(&[0xce]).unwrap();
    assert_eq!(lab.handler(), Some(4));
    assert_eq!(lab.stack::<u32, 1>(), [at::CODE + 2]);
}
