//! Hardware task switches.

use ringfence_x86::segment::system_type;
use ringfence_x86::{Cr0, Exception, Rflags, SegmentRegister, Vector};

use crate::interp::testing::{Lab, at, sel};

const SECOND: u64 = at::CODE + 0x400;
const SECOND_STACK: u32 = 0x6000;

/// Protected mode with a second task that waits at [`SECOND`].
fn lab() -> Lab {
    let mut lab = Lab::protected();
    let fields = [
        (0x20, SECOND as u32),
        (0x24, 0x246),
        (0x28, 0xaaaa),
        (0x38, SECOND_STACK),
        (0x44, 0x7777),
        (0x48, sel::DATA.into()),
        (0x4c, sel::CODE32.into()),
        (0x50, sel::DATA.into()),
        (0x54, sel::DATA.into()),
        (0x58, 0),
        (0x5c, 0),
        (0x60, sel::LDT.into()),
        (0x64, 0),
    ];
    for (offset, value) in fields {
        lab.put(at::TSS2 + offset, value);
    }
    lab
}

fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [s, t] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, s, t]
}

fn kind_of(lab: &Lab, selector: u16) -> u8 {
    lab.get::<u8>(at::GDT + u64::from(selector) + 5) & 0xf
}

#[test]
fn jump_saves_the_old_task_and_loads_the_new_one() {
    let mut lab = lab();
    lab.m.cpu.regs[1] = 0x1111;
    lab.step(&far(0xea, sel::TSS2)).unwrap();
    let cpu = &lab.m.cpu;
    assert_eq!(
        (cpu.rip(), cpu.regs[0], cpu.regs[4], cpu.regs[7]),
        (SECOND, 0xaaaa, SECOND_STACK.into(), 0x7777)
    );
    assert_eq!(cpu.tr.selector.0, sel::TSS2);
    assert!(cpu.cr0.contains(Cr0::TS));
    assert!(!cpu.flags.contains(Rflags::NT));
    // SDM 3A table 7-2: a jump frees the old task.
    assert_eq!((kind_of(&lab, sel::TSS), kind_of(&lab, sel::TSS2)), (9, 11));
    assert_eq!(lab.get::<u32>(at::TSS + 0x20), at::CODE as u32 + 7);
    assert_eq!(lab.get::<u32>(at::TSS + 0x2c), 0x1111);
    assert_eq!(lab.get::<u16>(at::TSS + 0x4c), sel::CODE32);
}

#[test]
fn call_nests_and_iret_returns() {
    let mut lab = lab();
    lab.step(&far(0x9a, sel::TSS2)).unwrap();
    assert!(lab.m.cpu.flags.contains(Rflags::NT));
    assert_eq!((kind_of(&lab, sel::TSS), kind_of(&lab, sel::TSS2)), (11, 11));
    assert_eq!(lab.get::<u16>(at::TSS2), sel::TSS);
    lab.step(&[0xcf]).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[4]), (at::CODE + 7, at::STACK));
    assert_eq!((kind_of(&lab, sel::TSS), kind_of(&lab, sel::TSS2)), (11, 9));
    assert_eq!(lab.get::<u32>(at::TSS2 + 0x24) & 1 << 14, 0, "NT is clear in the task that returned");
}

#[test]
fn task_gate_delivers_the_error_code_on_the_new_stack() {
    let mut lab = lab();
    lab.put(at::IDT + 8 * 13, u64::from(sel::TSS2) << 16 | (0x80 | u64::from(system_type::TASK_GATE)) << 40);
    lab.m.cpu.raise(Exception::gp(0x1234)).unwrap();
    assert_eq!(lab.m.cpu.rip(), SECOND);
    assert_eq!(lab.stack::<u32, 1>(), [0x1234]);
    // The interrupted instruction's address is in the old task's segment.
    assert_eq!(lab.get::<u32>(at::TSS + 0x20), at::CODE as u32);
    assert!(lab.m.cpu.flags.contains(Rflags::NT));
}

#[test]
fn busy_task_cannot_be_entered() {
    let mut lab = lab();
    assert_eq!(lab.step(&far(0xea, sel::TSS)), Err(Exception::gp(sel::TSS)));
    let raw = lab.get::<u64>(at::GDT + u64::from(sel::TSS2));
    lab.set_descriptor(sel::TSS2, raw & !(1 << 47));
    let fault = Exception::with_code(Vector::SegmentNotPresent, sel::TSS2);
    assert_eq!(lab.step(&far(0xea, sel::TSS2)), Err(fault));
    // One byte too short.
    lab.set_descriptor(sel::TSS2, raw - 1);
    assert_eq!(lab.step(&far(0xea, sel::TSS2)), Err(Exception::with_code(Vector::InvalidTss, sel::TSS2)));
}

#[test]
fn fault_after_the_switch_belongs_to_the_new_task() {
    let mut lab = lab();
    // The new task's SS is a code segment.
    lab.put(at::TSS2 + 0x50, u32::from(sel::CODE32));
    // Its #TS is delivered through a task gate back to a task that can take it.
    lab.gate(10, sel::CODE32, system_type::INTERRUPT_GATE, 0, 0);
    let result = lab.step(&far(0xea, sel::TSS2));
    assert_eq!(result, Ok(()), "the jump itself is done");
    assert_eq!(lab.m.cpu.tr.selector.0, sel::TSS2);
    // Without a stack, delivering #TS fails three times over.
    let fault = lab.m.cpu.take_shutdown().unwrap();
    assert!(fault.chain.starts_with("#TS(0x40), then #SS"), "{}", fault.chain);
    assert_eq!(fault.rip, SECOND);
}

#[test]
fn sixteen_bit_task_is_loaded_from_its_shorter_segment() {
    let mut lab = lab();
    let fields = [
        (0x0e, 0x8400),
        (0x10, 2),
        (0x12, 0xbbbb),
        (0x1a, 0x6000),
        (0x22, sel::DATA),
        (0x24, sel::CODE32),
        (0x26, sel::DATA),
        (0x28, sel::DATA),
        (0x2a, 0),
    ];
    for (offset, value) in fields {
        lab.put(at::TSS2 + offset, value);
    }
    lab.set_descriptor(sel::FREE, 0x2b | at::TSS2 << 16 | 0x81 << 40);
    lab.step(&far(0xea, sel::FREE)).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[0] & 0xffff), (0x8400, 0xbbbb));
    assert!(lab.m.cpu.segment(SegmentRegister::Fs).selector.is_null());
    assert_eq!(kind_of(&lab, sel::FREE), 3);
}

#[test]
fn trap_bit_of_the_new_task_raises_a_debug_exception() {
    let mut lab = lab();
    lab.put(at::TSS2 + 0x64, 1_u16);
    lab.deliver(&far(0xea, sel::TSS2)).unwrap();
    assert_eq!(lab.handler(), Some(1));
    assert_eq!(lab.m.cpu.dr6 & 0xe00f, 0x8000);
    assert_eq!(lab.stack::<u32, 1>(), [SECOND]);
}
