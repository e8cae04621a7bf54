//! IRET in all modes.

use ringfence_memory::Scalar;
use ringfence_x86::{Exception, Rflags, SegmentRegister};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

const IF: u64 = 1 << 9;
const VM: u64 = 1 << 17;
const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];

/// Puts values on the stack, first on top.
fn frame<T: Scalar>(lab: &mut Lab, values: &[u64]) {
    let top = at::STACK - (T::SIZE * values.len()) as u64;
    for (i, &value) in values.iter().enumerate() {
        lab.put(top + (T::SIZE * i) as u64, T::truncate(value));
    }
    lab.m.cpu.regs[4] = top;
}

#[test]
fn iretq_to_user_code_loads_stack_and_flags() {
    let mut lab = Lab::long();
    let flags = 0x3000 | IF | 0x10_0000 | 0x8d7;
    frame::<u64>(&mut lab, &[at::USER_CODE, sel::USER_CODE.into(), flags, 0x1234, sel::USER_DATA.into()]);
    lab.step(IRETQ).unwrap();
    let cpu = &lab.m.cpu;
    assert_eq!((cpu.cpl, cpu.rip(), cpu.regs[4]), (3, at::USER_CODE, 0x1234));
    assert_eq!(cpu.flags.iopl(), 3);
    assert_eq!(cpu.rflags() & 0x8d5, 0x8d5);
    // DS and ES held CPL 0 segments, which the outer level may not keep.
    assert_eq!(cpu.segment(SegmentRegister::Ds).selector.0, 0);
}

#[test]
fn iretq_at_the_same_privilege_pops_the_stack_pointer_and_takes_null_ss() {
    let mut lab = Lab::long();
    frame::<u64>(&mut lab, &[at::CODE + 0x10, sel::CODE.into(), 2, at::STACK + 0x18, 0]);
    lab.step(IRETQ).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE + 0x10, at::STACK + 0x18));
}

#[test]
fn iretq_with_a_bad_frame_changes_nothing() {
    let good = [at::USER_CODE, u64::from(sel::USER_CODE), 2, 0x1234, u64::from(sel::USER_DATA)];
    // (slot, value, fault); SDM 2A, IRET.
    let cases = [
        (0, 0x8000_0000_0000, Exception::GP0),
        (1, 0, Exception::GP0),
        (1, sel::DATA.into(), Exception::gp(sel::DATA)),
        (1, u64::from(sel::USER_CODE & !3 | 1), Exception::gp(sel::USER_CODE & !3)),
        (4, 0, Exception::GP0),
        (4, sel::DATA.into(), Exception::gp(sel::DATA)),
        (4, sel::USER_CODE.into(), Exception::gp(sel::USER_CODE & !3)),
    ];
    for (slot, value, fault) in cases {
        let mut lab = Lab::long();
        let mut values = good;
        values[slot] = value;
        frame::<u64>(&mut lab, &values);
        let before = lab.m.cpu.save_state();
        assert_eq!(lab.step(IRETQ), Err(fault), "slot {slot} = {value:#x}");
        assert_eq!(lab.m.cpu.save_state(), before, "slot {slot} = {value:#x}");
    }
}

#[test]
fn iretq_to_compatibility_mode_masks_the_stack_pointer() {
    let mut lab = Lab::long();
    let values = [at::USER_CODE, sel::USER_CODE32.into(), 2, 0xffff_ffff_0000_1234, sel::USER_DATA.into()];
    frame::<u64>(&mut lab, &values);
    lab.step(IRETQ).unwrap();
    assert!(!lab.m.cpu.is_64bit());
    assert_eq!(lab.m.cpu.regs[4], 0x1234);
}

#[test]
fn iret_with_nested_task_is_a_fault_in_long_mode() {
    let mut lab = Lab::long();
    lab.m.cpu.flags |= Rflags::NT;
    assert_eq!(lab.step(IRETQ), Err(Exception::GP0));
}

#[test]
fn iretd_at_the_same_privilege_keeps_ss() {
    let mut lab = Lab::protected();
    frame::<u32>(&mut lab, &[at::CODE + 0x20, sel::CODE32.into(), IF | 2]);
    lab.step(IRETD).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE + 0x20, at::STACK));
    assert!(lab.m.cpu.flags.contains(Rflags::IF));
}

#[test]
fn iretd_beyond_the_segments_limit_faults() {
    let mut lab = Lab::protected();
    frame::<u32>(&mut lab, &[0x1_0000, sel::CODE16.into(), 2]);
    assert_eq!(lab.step(IRETD), Err(Exception::GP0));
}

#[test]
fn user_code_cannot_raise_iopl_or_change_if() {
    let mut lab = Lab::protected();
    lab.user();
    lab.put(at::USER_STACK - 12, at::USER_CODE as u32 + 8);
    lab.put(at::USER_STACK - 8, u32::from(sel::USER_CODE32));
    lab.put(at::USER_STACK - 4, 0x3202_u32);
    lab.m.cpu.regs[4] = at::USER_STACK - 12;
    lab.step(IRETD).unwrap();
    assert_eq!(lab.m.cpu.flags.iopl(), 0);
    assert!(!lab.m.cpu.flags.contains(Rflags::IF));
}

#[test]
fn iretd_enters_virtual_8086_mode_and_an_interrupt_leaves_it() {
    let mut lab = Lab::protected();
    // EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS
    frame::<u32>(&mut lab, &[0x10, 0x0900, VM | IF | 2, 0x100, 0x0b00, 0x11, 0x22, 0x33, 0x44]);
    lab.step(IRETD).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.m.cpu.rip()), (3, 0x10));
    assert_eq!(lab.m.cpu.fetch_address(), 0x9010);
    let bases = lab.m.cpu.segments.map(|s| s.base);
    assert_eq!(bases, [0x110, 0x9000, 0xb000, 0x220, 0x330, 0x440]);

    lab.deliver(&[0x0f, 0x0b]).unwrap();
    assert_eq!((lab.m.cpu.cpl, lab.handler()), (0, Some(6)));
    let [eip, cs, eflags, esp, ss, es, ds, fs, gs] = lab.stack::<u32, 9>();
    assert_eq!((eip, cs, esp, ss), (0x10, 0x900, 0x100, 0xb00));
    assert_eq!([es, ds, fs, gs], [0x11, 0x22, 0x33, 0x44]);
    assert_ne!(eflags & VM, 0);
    // The data segments are null in the handler (SDM 3A 20.3.1).
    assert!(lab.m.cpu.segment(SegmentRegister::Ds).selector.is_null());

    lab.step(IRETD).unwrap();
    assert_eq!(lab.m.cpu.fetch_address(), 0x9010);
    assert_eq!(lab.m.cpu.segments.map(|s| s.base), bases);
}

#[test]
fn virtual_8086_mode_below_iopl_3_traps_sensitive_instructions() {
    for (iopl, outcome) in [(0, Err(Exception::GP0)), (3, Ok(()))] {
        // cli; pushf; popf; iret; int 0x21 has no gate for CPL 3 here, so it faults either way
        for bytes in [&[0xfa_u8][..], &[0x9c], &[0x9d], &[0xcf]] {
            let mut lab = Lab::protected();
            frame::<u32>(&mut lab, &[0x10, 0x0900, VM | iopl << 12 | 2, 0x100, 0x0b00, 0, 0, 0, 0]);
            lab.step(IRETD).unwrap();
            assert_eq!(lab.step(bytes), outcome, "{bytes:x?} at IOPL {iopl}");
        }
    }
}

#[test]
fn real_mode_iret_with_32_bit_operands_loads_the_upper_flags() {
    let mut lab = Lab::real();
    lab.m.cpu.regs[RIP] = at::CODE;
    frame::<u32>(&mut lab, &[0x8100, 0, 0x24_0002]);
    lab.step(&[0x66, 0xcf]).unwrap();
    assert_eq!(lab.m.cpu.rip(), 0x8100);
    assert!(lab.m.cpu.flags.contains(Rflags::ID | Rflags::AC));
}
