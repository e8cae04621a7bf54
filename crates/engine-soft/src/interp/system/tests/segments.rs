//! Segment registers and descriptor tables.

use ringfence_x86::cpuid::Vendor;
use ringfence_x86::segment::attribute;
use ringfence_x86::{Cr4, Exception, SegmentRegister, Vector};

use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at, sel};

const DATA32: u64 = 0x00cf_9200_0000_ffff;

/// `mov ds, ax` with a selector.
fn mov_ds(lab: &mut Lab, selector: u16) -> Result<(), Exception> {
    lab.m.cpu.regs[0] = selector.into();
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.step(&[0x8e, 0xd8])
}

fn mov_ss(lab: &mut Lab, selector: u16) -> Result<(), Exception> {
    lab.m.cpu.regs[0] = selector.into();
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.step(&[0x8e, 0xd0])
}

fn not_present(selector: u16) -> Exception {
    Exception::with_code(Vector::SegmentNotPresent, selector)
}

#[test]
fn data_segment_load_checks_type_privilege_and_presence_in_order() {
    // (descriptor, selector, outcome); SDM 2B, MOV: loading DS.
    let cases = [
        (DATA32, sel::FREE, Ok(())),
        (DATA32, sel::FREE | 3, Err(Exception::gp(sel::FREE))),
        (DATA32 | 3 << 45, sel::FREE | 3, Ok(())),
        (DATA32 & !(1 << 47), sel::FREE, Err(not_present(sel::FREE))),
        // Execute-only code, readable code, conforming code for any RPL, a system descriptor.
        (0x00cf_9800_0000_ffff, sel::FREE, Err(Exception::gp(sel::FREE))),
        (0x00cf_9a00_0000_ffff, sel::FREE, Ok(())),
        (0x00cf_9e00_0000_ffff, sel::FREE | 3, Ok(())),
        (0x00cf_8200_0000_ffff, sel::FREE, Err(Exception::gp(sel::FREE))),
        // Privilege comes before presence.
        (DATA32 & !(1 << 47), sel::FREE | 3, Err(Exception::gp(sel::FREE))),
        // Outside the table.
        (DATA32, 0x100, Err(Exception::gp(0x100))),
    ];
    for (descriptor, selector, outcome) in cases {
        let mut lab = Lab::protected();
        lab.set_descriptor(sel::FREE, descriptor);
        assert_eq!(mov_ds(&mut lab, selector), outcome, "{descriptor:#x} {selector:#x}");
    }
}

#[test]
fn load_sets_the_accessed_bit_in_the_table() {
    let mut lab = Lab::protected();
    lab.set_descriptor(sel::FREE, DATA32);
    mov_ds(&mut lab, sel::FREE).unwrap();
    assert_eq!(lab.get::<u8>(at::GDT + u64::from(sel::FREE) + 5), 0x93);
    assert!(lab.m.cpu.segment(SegmentRegister::Ds).has(attribute::ACCESSED));
}

#[test]
fn descriptor_of_the_local_table_is_used_while_it_is_loaded() {
    let mut lab = Lab::protected();
    lab.put(at::LDT + 8, DATA32 | 0x1234 << 16);
    mov_ds(&mut lab, 0xc).unwrap();
    assert_eq!(lab.m.cpu.segment(SegmentRegister::Ds).base, 0x1234);
    // lldt ax with a null selector
    lab.m.cpu.regs[0] = 0;
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.step(&[0x0f, 0x00, 0xd0]).unwrap();
    assert_eq!(mov_ds(&mut lab, 0xc), Err(Exception::gp(0xc)));
}

#[test]
fn access_through_a_null_segment_faults() {
    let mut lab = Lab::protected();
    mov_ds(&mut lab, 3).unwrap();
    // mov eax, [0]
    assert_eq!(lab.step(&[0xa1, 0, 0, 0, 0]), Err(Exception::GP0));
}

#[test]
fn stack_segment_must_be_writable_data_of_the_very_privilege() {
    let cases = [
        (DATA32, sel::FREE, Ok(())),
        (DATA32, 0, Err(Exception::GP0)),
        (DATA32, sel::FREE | 1, Err(Exception::gp(sel::FREE))),
        (DATA32 & !(2 << 40), sel::FREE, Err(Exception::gp(sel::FREE))),
        (DATA32 | 3 << 45, sel::FREE, Err(Exception::gp(sel::FREE))),
        (DATA32 & !(1 << 47), sel::FREE, Err(Exception::with_code(Vector::StackFault, sel::FREE))),
    ];
    for (descriptor, selector, outcome) in cases {
        let mut lab = Lab::protected();
        lab.set_descriptor(sel::FREE, descriptor);
        assert_eq!(mov_ss(&mut lab, selector), outcome, "{descriptor:#x} {selector:#x}");
        assert_eq!(
            lab.m.cpu.interrupt_shadow,
            outcome.is_ok(),
            "only a load that succeeds holds off interrupts"
        );
    }
}

#[test]
fn null_stack_segment_is_allowed_in_64_bit_mode_below_cpl_3() {
    let mut lab = Lab::long();
    mov_ss(&mut lab, 0).unwrap();
    assert_eq!(mov_ss(&mut lab, 3), Err(Exception::GP0));
    lab.user();
    lab.m.cpu.regs[0] = 3;
    assert_eq!(lab.step(&[0x8e, 0xd0]), Err(Exception::GP0));
}

#[test]
fn loading_cs_is_undefined() {
    let mut lab = Lab::protected();
    assert_eq!(lab.step(&[0x8e, 0xc8]), Err(Exception::UD));
}

#[test]
fn selector_stores_16_bits_to_memory_and_extends_in_registers() {
    let mut lab = Lab::protected();
    lab.put(at::DATA, u32::MAX);
    lab.m.cpu.regs[0] = u64::MAX;
    // mov [DATA], ds; mov eax, ds; mov ax, ds
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    lab.step(&[0x8c, 0x1d, a, b, c, d]).unwrap();
    assert_eq!(lab.get::<u32>(at::DATA), 0xffff_0000 | u32::from(sel::DATA));
    lab.step(&[0x8c, 0xd8]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], u64::from(sel::DATA));
    lab.m.cpu.regs[0] = 0xffff_ffff;
    lab.step(&[0x66, 0x8c, 0xd8]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], 0xffff_0000 | u64::from(sel::DATA));
}

#[test]
fn push_of_a_selector_in_32_bits_writes_16_on_intel_and_the_whole_slot_on_amd() {
    for (vendor, expected) in [(Vendor::Intel, 0xffff_0000), (Vendor::Amd, 0)] {
        let mut lab = Lab::protected_of(vendor);
        lab.put(at::STACK - 4, u32::MAX);
        // push cs
        lab.step(&[0x0e]).unwrap();
        assert_eq!(lab.stack::<u32, 1>(), [expected | u64::from(sel::CODE32)], "{vendor:?}");
        let mut lab = Lab::long_of(vendor);
        lab.put(at::STACK - 8, u64::MAX);
        // push fs
        lab.step(&[0x0f, 0xa0]).unwrap();
        assert_eq!(lab.stack::<u64, 1>(), [0x10], "{vendor:?}");
    }
}

#[test]
fn pop_ss_moves_the_pointer_by_the_old_stacks_width() {
    let mut lab = Lab::protected();
    lab.put(at::STACK - 4, u32::from(sel::DATA16));
    lab.m.cpu.regs[4] = at::STACK - 4;
    // pop ss
    lab.step(&[0x17]).unwrap();
    assert_eq!(lab.m.cpu.regs[4], at::STACK);
    assert_eq!(lab.m.cpu.stack_mask, 0xffff);
}

#[test]
fn real_mode_load_keeps_the_limit_of_protected_mode() {
    let mut lab = Lab::protected();
    mov_ds(&mut lab, sel::DATA).unwrap();
    lab.m.cpu.cr0.remove(ringfence_x86::Cr0::PE);
    lab.m.cpu.update_mode();
    mov_ds(&mut lab, 0x1234).unwrap();
    let ds = lab.m.cpu.segment(SegmentRegister::Ds);
    assert_eq!((ds.base, ds.limit), (0x12340, u32::MAX));
}

#[test]
fn les_loads_nothing_if_the_segment_is_bad() {
    let mut lab = Lab::protected();
    lab.put(at::DATA, 0x1111_2222_u32);
    lab.put(at::DATA + 4, 0xf8_u16);
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    // les eax, [DATA]
    lab.m.cpu.regs[0] = 7;
    assert_eq!(lab.step(&[0xc4, 0x05, a, b, c, d]), Err(Exception::gp(0xf8)));
    assert_eq!(lab.m.cpu.regs[0], 7);
    lab.put(at::DATA + 4, sel::DATA);
    lab.step(&[0xc4, 0x05, a, b, c, d]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], 0x1111_2222);
}

#[test]
fn lar_and_lsl_give_rights_and_limit_of_visible_segments_only() {
    let mut lab = Lab::protected();
    lab.user();
    let zf = |lab: &Lab| lab.m.cpu.status.zf();
    // lar eax, ecx; lsl eax, ecx
    let (lar, lsl) = ([0x0f, 0x02, 0xc1], [0x0f, 0x03, 0xc1]);
    for (selector, rights, limit) in [
        (sel::USER_DATA, Some(0xcf_f300), Some(0xffff_ffff)),
        (sel::DATA, None, None),
        (0, None, None),
        (0x1000, None, None),
    ] {
        lab.m.cpu.regs[1] = selector.into();
        lab.m.cpu.regs[0] = 0x55;
        lab.step(&lar).unwrap();
        let expected = rights.unwrap_or(0x55);
        assert_eq!(zf(&lab), rights.is_some(), "{selector:#x}");
        assert_eq!(lab.m.cpu.regs[0], expected, "{selector:#x}");
        lab.m.cpu.regs[0] = 0x55;
        lab.step(&lsl).unwrap();
        assert_eq!((zf(&lab), lab.m.cpu.regs[0]), (limit.is_some(), limit.unwrap_or(0x55)), "{selector:#x}");
    }
}

#[test]
fn lar_in_long_mode_does_not_know_16_bit_system_types() {
    for (long, known) in [(false, true), (true, false)] {
        let mut lab = if long { Lab::long() } else { Lab::protected() };
        // An available 16-bit TSS.
        lab.set_descriptor(sel::FREE, 0x0000_8100_0000_002b);
        lab.m.cpu.regs[1] = sel::FREE.into();
        lab.step(&[0x0f, 0x02, 0xc1]).unwrap();
        assert_eq!(lab.m.cpu.status.zf(), known, "long mode {long}");
    }
}

#[test]
fn verr_and_verw_look_at_type_and_privilege() {
    let mut lab = Lab::long();
    lab.user();
    // verr ax; verw ax
    for (selector, readable, writable) in [
        (sel::USER_DATA, true, true),
        (sel::USER_CODE, true, false),
        (sel::DATA, false, false),
        (0, false, false),
    ] {
        lab.m.cpu.regs[0] = selector.into();
        lab.step(&[0x0f, 0x00, 0xe0]).unwrap();
        assert_eq!(lab.m.cpu.status.zf(), readable, "verr {selector:#x}");
        lab.step(&[0x0f, 0x00, 0xe8]).unwrap();
        assert_eq!(lab.m.cpu.status.zf(), writable, "verw {selector:#x}");
    }
}

#[test]
fn ltr_marks_the_descriptor_busy_and_refuses_a_busy_one() {
    let mut lab = Lab::protected();
    // ltr ax
    lab.m.cpu.regs[0] = sel::TSS2.into();
    lab.step(&[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!((lab.m.cpu.tr.base, lab.m.cpu.tr.kind()), (at::TSS2, 11));
    assert_eq!(lab.get::<u8>(at::GDT + u64::from(sel::TSS2) + 5), 0x8b);
    assert_eq!(lab.step(&[0x0f, 0x00, 0xd8]), Err(Exception::gp(sel::TSS2)));
    lab.m.cpu.regs[0] = 0;
    assert_eq!(lab.step(&[0x0f, 0x00, 0xd8]), Err(Exception::GP0));
}

#[test]
fn system_descriptors_of_long_mode_have_16_bytes() {
    let mut lab = Lab::long();
    lab.put(at::GDT + u64::from(sel::TSS2) + 8, 0xffff_8000_u64);
    lab.m.cpu.regs[0] = sel::TSS2.into();
    lab.step(&[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!(lab.m.cpu.tr.base, 0xffff_8000_0000_0000 | at::TSS2);
    // A type in the upper half.
    let mut lab = Lab::long();
    lab.put(at::GDT + u64::from(sel::TSS2) + 8, 0x0100_0000_0000_u64);
    lab.m.cpu.regs[0] = sel::TSS2.into();
    assert_eq!(lab.step(&[0x0f, 0x00, 0xd8]), Err(Exception::gp(sel::TSS2)));
}

#[test]
fn table_registers_are_for_cpl_0_and_canonical_bases() {
    let mut lab = Lab::long();
    lab.put(at::DATA, 0x55_u16);
    lab.put(at::DATA + 2, 0xffff_8000_1234_5678_u64);
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    // lgdt [DATA]; sgdt [DATA]
    let (lgdt, sgdt) = ([0x0f, 0x01, 0x14, 0x25, a, b, c, d], [0x0f, 0x01, 0x04, 0x25, a, b, c, d]);
    lab.step(&lgdt).unwrap();
    assert_eq!((lab.m.cpu.gdtr.base, lab.m.cpu.gdtr.limit), (0xffff_8000_1234_5678, 0x55));
    lab.put(at::DATA + 2, 0x8000_0000_0000_u64);
    assert_eq!(lab.step(&lgdt), Err(Exception::GP0));
    lab.step(&sgdt).unwrap();
    assert_eq!(lab.get::<u64>(at::DATA + 2), 0xffff_8000_1234_5678);
    lab.m.cpu.gdtr.base = at::GDT;
    lab.user();
    assert_eq!(lab.step(&lgdt), Err(Exception::GP0));
    lab.step(&sgdt).unwrap();
    // User-mode instruction prevention.
    lab.m.cpu.cr4 |= Cr4::UMIP;
    assert_eq!(lab.step(&sgdt), Err(Exception::GP0));
    // sldt eax; str eax; smsw eax
    for bytes in [[0x0f, 0x00, 0xc0], [0x0f, 0x00, 0xc8], [0x0f, 0x01, 0xe0]] {
        assert_eq!(lab.step(&bytes), Err(Exception::GP0));
    }
}

#[test]
fn lgdt_with_16_bit_operands_takes_24_bits_of_base() {
    let mut lab = Lab::protected();
    lab.put(at::DATA, 0x55_u16);
    lab.put(at::DATA + 2, 0x1234_5678_u32);
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    lab.step(&[0x66, 0x0f, 0x01, 0x15, a, b, c, d]).unwrap();
    assert_eq!(lab.m.cpu.gdtr.base, 0x34_5678);
}

#[test]
fn segment_instructions_of_protected_mode_are_undefined_in_real_mode() {
    let mut lab = Lab::real();
    // lar ax, cx; verr ax; arpl ax, cx; sldt ax; ltr ax
    let cases: [&[u8]; 5] =
        [&[0x0f, 0x02, 0xc1], &[0x0f, 0x00, 0xe0], &[0x63, 0xc8], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xd8]];
    for bytes in cases {
        lab.m.cpu.regs[RIP] = at::CODE;
        assert_eq!(lab.step(bytes), Err(Exception::UD), "{bytes:x?}");
    }
}
