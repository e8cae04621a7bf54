//! Far jumps, calls and returns.

use ringfence_x86::{Exception, SegmentRegister, Vector};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

const CALL_GATE: u64 = 0x8c00;
const CALL_GATE16: u64 = 0x8400;

/// A call gate's descriptor.
fn gate(selector: u16, offset: u64, kind: u64, dpl: u64, parameters: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | (kind | dpl << 13 | parameters) << 32 | offset >> 16 << 48
}

/// `jmp` or `call selector:offset` in 32-bit code.
fn direct(opcode: u8, selector: u16, offset: u32) -> [u8; 7] {
    let ([a, b, c, d], [s, t]) = (offset.to_le_bytes(), selector.to_le_bytes());
    [opcode, a, b, c, d, s, t]
}

fn jmp(selector: u16, offset: u32) -> [u8; 7] {
    direct(0xea, selector, offset)
}

fn call(selector: u16, offset: u32) -> [u8; 7] {
    direct(0x9a, selector, offset)
}

/// Through a pointer at [`at::DATA`], with REX.W on Intel's processors.
fn indirect64(lab: &mut Lab, reg: u8, selector: u16, offset: u32) -> [u8; 7] {
    lab.put(at::DATA, offset);
    lab.put(at::DATA + 4, selector);
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    [0xff, 0x04 | reg << 3, 0x25, a, b, c, d]
}

#[test]
fn far_jump_checks_its_code_segment() {
    const CODE: u64 = 0x00cf_9b00_0000_ffff;
    let cases = [
        (CODE, sel::FREE, 0x100, Ok(())),
        // RPL above CPL; other DPL; data; not present; beyond the limit; null.
        (CODE, sel::FREE | 1, 0x100, Err(Exception::gp(sel::FREE))),
        (CODE | 3 << 45, sel::FREE, 0x100, Err(Exception::gp(sel::FREE))),
        (0x00cf_9300_0000_ffff, sel::FREE, 0x100, Err(Exception::gp(sel::FREE))),
        (CODE & !(1 << 47), sel::FREE, 0, Err(Exception::with_code(Vector::SegmentNotPresent, sel::FREE))),
        (CODE & !(0x80 << 48) & !0xf_0000_0000_0000, sel::FREE, 0x1_0000, Err(Exception::GP0)),
        (CODE, 0, 0x100, Err(Exception::GP0)),
        // Conforming code takes any RPL.
        (CODE | 4 << 40, sel::FREE | 3, 0x100, Ok(())),
    ];
    for (descriptor, selector, offset, outcome) in cases {
        let mut lab = Lab::protected();
        lab.set_descriptor(sel::FREE, descriptor);
        assert_eq!(lab.step(&jmp(selector, offset)), outcome, "{descriptor:#x} {selector:#x}");
        if outcome.is_ok() {
            assert_eq!(lab.m.cpu.rip(), u64::from(offset));
            assert_eq!(lab.m.cpu.segment(SegmentRegister::Cs).selector.0, selector & !3);
        }
    }
}

#[test]
fn far_jump_leaves_real_mode_and_comes_back() {
    let mut lab = Lab::protected();
    lab.m.cpu.cr0.remove(ringfence_x86::Cr0::PE);
    lab.enter(sel::CODE16, sel::DATA16, at::STACK);
    lab.step(&[0xea, 0x00, 0x01, 0x00, 0x09]).unwrap();
    assert_eq!((lab.m.cpu.fetch_address(), lab.m.cpu.rip()), (0x9100, 0x100));
    lab.m.cpu.cr0.insert(ringfence_x86::Cr0::PE);
    lab.m.cpu.update_mode();
    let [s, t] = sel::CODE32.to_le_bytes();
    lab.step(&[0xea, 0x00, 0x80, s, t]).unwrap();
    assert_eq!((lab.m.cpu.fetch_address(), lab.m.cpu.code_size.bits()), (0x8000, 32));
}

#[test]
fn indirect_far_jump_enters_compatibility_mode() {
    let mut lab = Lab::long();
    let bytes = indirect64(&mut lab, 5, sel::CODE32, 0x9000);
    lab.step(&bytes).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.is_64bit()), (0x9000, false));
}

#[test]
fn far_call_and_return_balance_the_stack() {
    let mut lab = Lab::protected();
    lab.step(&call(sel::CODE32, 0x9000)).unwrap();
    assert_eq!(lab.stack::<u32, 2>(), [at::CODE + 7, sel::CODE32.into()]);
    // retf 8
    lab.step(&[0xca, 8, 0]).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE + 7, at::STACK + 8));
}

#[test]
fn call_that_cannot_push_changes_nothing() {
    let mut lab = Lab::long();
    lab.m.cpu.regs[4] = at::ABSENT + 8;
    let bytes = indirect64(&mut lab, 3, sel::CODE, 0x9000);
    let fault = lab.step(&bytes).unwrap_err();
    assert_eq!((fault.vector, lab.m.cpu.fault_address), (Vector::PageFault, at::ABSENT + 4));
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE, at::ABSENT + 8));
}

#[test]
fn call_gate_to_an_inner_level_copies_parameters() {
    let mut lab = Lab::protected();
    lab.set_descriptor(sel::FREE, gate(sel::CODE32, 0x9800, CALL_GATE, 3, 2));
    lab.user();
    lab.put(at::USER_STACK - 8, 0x1111_u32);
    lab.put(at::USER_STACK - 4, 0x2222_u32);
    lab.m.cpu.regs[4] = at::USER_STACK - 8;
    lab.step(&call(sel::FREE | 3, 0xdead)).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip()), (0, 0x9800));
    let expected = [
        at::USER_CODE + 7,
        sel::USER_CODE32.into(),
        0x1111,
        0x2222,
        at::USER_STACK - 8,
        sel::USER_DATA.into(),
    ];
    assert_eq!(lab.stack::<u32, 6>(), expected);
    // retf 8 releases the parameters on both stacks.
    lab.step(&[0xca, 8, 0]).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip()), (3, at::USER_CODE + 7));
    assert_eq!(lab.m.cpu.regs[4], at::USER_STACK);
}

#[test]
fn sixteen_bit_call_gate_pushes_words() {
    let mut lab = Lab::protected();
    lab.set_descriptor(sel::FREE, gate(sel::CODE32, 0x9800, CALL_GATE16, 0, 0));
    lab.step(&call(sel::FREE, 0)).unwrap();
    assert_eq!(lab.m.cpu.regs[4], at::STACK - 4);
    assert_eq!(lab.stack::<u16, 2>(), [at::CODE + 7, sel::CODE32.into()]);
}

#[test]
fn call_gate_checks_its_own_privilege_first() {
    let mut lab = Lab::protected();
    lab.set_descriptor(sel::FREE, gate(sel::CODE32, 0x9800, CALL_GATE, 0, 0));
    lab.user();
    assert_eq!(lab.step(&call(sel::FREE | 3, 0)), Err(Exception::gp(sel::FREE)));
    // A jump cannot change the privilege level.
    lab.set_descriptor(sel::FREE, gate(sel::CODE32, 0x9800, CALL_GATE, 3, 0));
    assert_eq!(lab.step(&jmp(sel::FREE | 3, 0)), Err(Exception::gp(sel::CODE32)));
}

#[test]
fn call_gate_of_long_mode_pushes_quadwords_on_the_tss_stack() {
    let mut lab = Lab::long();
    lab.set_descriptor(sel::FREE, gate(sel::CODE, 0x9800, CALL_GATE, 3, 0));
    lab.set_descriptor(sel::FREE + 8, 0);
    lab.user();
    let bytes = indirect64(&mut lab, 3, sel::FREE | 3, 0);
    lab.step(&bytes).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip()), (0, 0x9800));
    let expected = [at::USER_CODE + 7, sel::USER_CODE.into(), at::USER_STACK, sel::USER_DATA.into()];
    assert_eq!(lab.stack::<u64, 4>(), expected);
    assert!(lab.m.cpu.segment(SegmentRegister::Ss).selector.is_null());
    // To 32-bit code there is no gate in long mode.
    lab.set_descriptor(sel::FREE, gate(sel::CODE32, 0x9800, CALL_GATE, 3, 0));
    lab.user();
    let bytes = indirect64(&mut lab, 3, sel::FREE | 3, 0);
    assert_eq!(lab.step(&bytes), Err(Exception::gp(sel::CODE32)));
}

#[test]
fn far_return_to_outer_level_checks_the_stack_segment() {
    let mut lab = Lab::protected();
    for (i, value) in
        [at::USER_CODE as u32, sel::USER_CODE32.into(), 0x5000, sel::DATA.into()].into_iter().enumerate()
    {
        lab.put(at::STACK - 16 + 4 * i as u64, value);
    }
    lab.m.cpu.regs[4] = at::STACK - 16;
    assert_eq!(lab.step(&[0xcb]), Err(Exception::gp(sel::DATA)));
    lab.put(at::STACK - 4, u32::from(sel::USER_DATA));
    lab.step(&[0xcb]).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.regs[4]), (3, 0x5000));
}

#[test]
fn far_return_inwards_is_refused() {
    let mut lab = Lab::protected();
    lab.user();
    lab.put(at::USER_STACK - 8, at::CODE as u32);
    lab.put(at::USER_STACK - 4, u32::from(sel::CODE32));
    lab.m.cpu.regs[4] = at::USER_STACK - 8;
    assert_eq!(lab.step(&[0xcb]), Err(Exception::gp(sel::CODE32)));
}

#[test]
fn real_mode_far_call_wraps_to_its_segment() {
    let mut lab = Lab::real();
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.step(&[0x9a, 0x10, 0x00, 0x00, 0x09]).unwrap();
    assert_eq!(lab.m.cpu.fetch_address(), 0x9010);
    lab.step(&[0xcb]).unwrap();
    assert_eq!(lab.m.cpu.fetch_address(), at::CODE + 5);
}
