//! IRETQ.

use ringfence_x86::segment::Selector;
use ringfence_x86::{SegmentRegister, Vector};

use super::*;

/// IRETQ, for the kernel and for programs.
pub(super) const KERNEL_IRET: u64 = at::KERNEL_ONLY + 0xa00;
pub(super) const USER_IRET: u64 = at::USER_CODE + 0xa00;
/// Where the frame is.
pub(super) const FRAME: u64 = at::INNER_STACK - 0x100;
/// The kernel's stack behind it.
const KERNEL_STACK: u64 = at::STACK - 0x800;
/// More than a unit is long.
const LONG_RUN: u64 = 5000;

/// RIP, CS, RFLAGS, RSP, SS.
pub(super) type Frame = [u64; 5];
const TO_USER: Frame =
    [at::USER_CODE + 2, sel::USER_CODE as u64, 0x246, at::USER_STACK, sel::USER_DATA as u64];
const TO_KERNEL: Frame = [ENTRY, sel::CODE as u64, 0x246, KERNEL_STACK, sel::DATA as u64];
const TO_KERNEL_WITHOUT_STACK: Frame = [ENTRY, sel::CODE as u64, 0x246, KERNEL_STACK, 0];
pub(super) const ALL: [Frame; 3] = [TO_USER, TO_KERNEL, TO_KERNEL_WITHOUT_STACK];

pub(super) fn both(vendor: Vendor) -> Both {
    let mut both = super::both(vendor);
    both.limit = LONG_RUN;
    both.each(|cpu| {
        for code in [KERNEL_IRET, USER_IRET] {
            cpu.memory.write_bytes(GuestAddress(code), &[0x48, 0xcf]).unwrap();
        }
        cpu.memory.write(GuestAddress(KERNEL_STACK), 1_u64 << 63).unwrap();
    });
    both
}

/// Changes what is there before an IRETQ: the vCPU, or the frame.
type Change = fn(&mut Cpu, &mut Frame);

impl Both {
    pub(super) fn put_frame(&mut self, at: u64, frame: Frame) {
        self.each(|cpu| {
            for (i, value) in frame.into_iter().enumerate() {
                cpu.memory.write(GuestAddress(at + 8 * i as u64), value).unwrap();
            }
            cpu.regs[4] = at;
        });
    }

    /// IRETQ by such a frame, often enough to be known; the last time after `change`.
    fn interrupt_return(&mut self, what: &str, frame: Frame, change: Change) -> (bool, Option<Exception>) {
        let mut last = (false, None);
        for round in 0..6 {
            self.start(false, KERNEL_IRET);
            self.put_frame(FRAME, frame);
            self.each(|cpu| {
                cpu.set_rflags(0x897);
                (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
                if round == 5 {
                    let mut changed = frame;
                    change(cpu, &mut changed);
                    for (i, value) in changed.into_iter().enumerate() {
                        if value != frame[i] {
                            cpu.memory.write(GuestAddress(FRAME + 8 * i as u64), value).unwrap();
                        }
                    }
                }
            });
            last = self.go(what);
        }
        last
    }
}

fn fault(vector: Vector, code: u16) -> Option<Exception> {
    Some(Exception::with_code(vector, code))
}

fn gp(selector: u16) -> Option<Exception> {
    fault(Vector::GeneralProtection, selector & !3)
}

/// Where a selector's descriptor is.
fn descriptor(selector: u16) -> GuestAddress {
    GuestAddress(at::GDT + u64::from(selector & !7))
}

pub(super) fn flip(cpu: &Cpu, selector: u16, bits: u64) {
    let old: u64 = cpu.memory.read(descriptor(selector)).unwrap();
    cpu.memory.write(descriptor(selector), old ^ bits).unwrap();
}

/// Sets a descriptor's accessed bit.
pub(super) fn accessed(cpu: &Cpu, selector: u16) {
    let old: u64 = cpu.memory.read(descriptor(selector)).unwrap();
    cpu.memory.write(descriptor(selector), old | 1 << 40).unwrap();
}

pub(super) fn set_data_segment(cpu: &mut Cpu, register: SegmentRegister, selector: u16) {
    let raw = if selector & !3 == 0 { 0 } else { cpu.memory.read(descriptor(selector)).unwrap() };
    cpu.segments[register as usize] =
        ringfence_x86::segment::Segment::from_descriptor(Selector(selector), raw);
    cpu.update_mode();
}

#[test]
fn returns_from_interrupts_need_no_handler() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for frame in ALL {
            let mut both = both(vendor);
            assert_eq!(both.interrupt_return("return", frame, |_, _| ()), (false, NOWHERE));
            let cpu = &both.subject.m.cpu;
            assert_eq!(cpu.cpl, (frame[1] & 3) as u8);
            assert_eq!(u64::from(cpu.segments[2].selector.0), frame[4]);
        }
        // All are known at the same time.
        let mut both = both(vendor);
        for _ in 0..2 {
            for frame in ALL {
                assert_eq!(both.interrupt_return("in turn", frame, |_, _| ()), (false, NOWHERE));
            }
        }
        assert_eq!(both.handed(), 3);
    }
}

#[test]
fn return_that_is_unusual_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [(&str, Change, bool, Option<Exception>); 18] = [
        ("NT", |cpu, _| cpu.flags.insert(Rflags::NT), true, Some(Exception::GP0)),
        ("NMI", |cpu, _| cpu.nmi_masked = true, true, NOWHERE),
        ("something waits", |cpu, _| post(cpu), true, NOWHERE),
        ("traced", |_, frame| frame[2] |= 0x100, true, step),
        ("NT behind it", |_, frame| frame[2] |= 0x4000, true, NOWHERE),
        ("VM behind it", |_, frame| frame[2] |= 0x2_0000, true, NOWHERE),
        ("other flags", |_, frame| frame[2] = !0x6_4100, false, NOWHERE),
        ("no flags", |_, frame| frame[2] = 0, false, NOWHERE),
        ("RF", |_, frame| frame[2] |= 0x1_0000, false, NOWHERE),
        ("not canonical", |_, frame| frame[0] = 1 << 47, true, Some(Exception::GP0)),
        ("CS null", |_, frame| frame[1] &= 3, true, Some(Exception::GP0)),
        ("CS more", |_, frame| frame[1] |= 0x7ff8_0000_0000_0000, false, NOWHERE),
        ("SS more", |_, frame| frame[4] |= 0xffff_0000, false, NOWHERE),
        ("not in the soft TLB", |cpu, _| cpu.tlb.flush(), true, NOWHERE),
        ("table not in the soft TLB", |cpu, _| cpu.tlb.flush_page(at::GDT), true, NOWHERE),
        ("frame elsewhere in its page", |cpu, _| cpu.regs[4] -= 0x101, false, NOWHERE),
        ("frame in two pages", |cpu, _| cpu.regs[4] = at::STACK - 16, true, NOWHERE),
        ("no frame", |cpu, _| cpu.regs[4] = at::ABSENT, true, Some(page_fault(0))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            for frame in ALL {
                let mut both = both(vendor);
                // Where the frame is in some cases.
                for at in [FRAME - 0x101, at::STACK - 16] {
                    both.put_frame(at, frame);
                }
                let got = both.interrupt_return(what, frame, change);
                assert_eq!(got, (handed, end), "{what} to {:#x}", frame[1]);
            }
        }
    }
}

#[test]
fn return_by_other_descriptors_is_as_in_the_interpreter() {
    const NP: Vector = Vector::SegmentNotPresent;
    let user: [(&str, Change, Option<Exception>); 12] = [
        ("CS of another RPL", |_, frame| frame[1] &= !3, gp(sel::USER_CODE)),
        ("SS of another RPL", |_, frame| frame[4] &= !3, gp(sel::USER_DATA)),
        ("SS null", |_, frame| frame[4] = 0, Some(Exception::GP0)),
        ("CS absent", |cpu, _| flip(cpu, sel::USER_CODE, 1 << 47), fault(NP, sel::USER_CODE & !3)),
        ("CS not accessed", |cpu, _| flip(cpu, sel::USER_CODE, 1 << 40), NOWHERE),
        ("CS with a base", |cpu, _| flip(cpu, sel::USER_CODE, 1 << 20), NOWHERE),
        ("SS not writable", |cpu, _| flip(cpu, sel::USER_DATA, 1 << 41), gp(sel::USER_DATA)),
        ("SS not accessed", |cpu, _| flip(cpu, sel::USER_DATA, 1 << 40), NOWHERE),
        ("SS with a base", |cpu, _| flip(cpu, sel::USER_DATA, 1 << 20), NOWHERE),
        (
            "table moved",
            |cpu, _| cpu.gdtr.base = at::LDT,
            Some(Exception::with_code(Vector::GeneralProtection, 0x28)),
        ),
        ("table cut", |cpu, _| cpu.gdtr.limit = 0x2e, gp(sel::USER_CODE)),
        ("table longer", |cpu, _| cpu.gdtr.limit = 0x10f, NOWHERE),
    ];
    for (what, change, end) in user {
        assert_eq!(both(Vendor::Intel).interrupt_return(what, TO_USER, change), (true, end), "{what}");
    }
}

#[test]
fn return_by_the_local_table_is_the_handlers() {
    let mut both = both(Vendor::Intel);
    both.each(|cpu| {
        // It has the same descriptors as the global one.
        let mut table = [0; 0x80];
        cpu.memory.read_bytes(GuestAddress(at::GDT), &mut table).unwrap();
        cpu.memory.write_bytes(GuestAddress(at::LDT), &table).unwrap();
    });
    let mut frame = TO_USER;
    (frame[1], frame[4]) = (frame[1] | 4, frame[4] | 4);
    assert_eq!(both.interrupt_return("local", frame, |_, _| ()), (true, NOWHERE));
    let got = both.interrupt_return("absent", frame, |cpu, _| {
        let at = GuestAddress(at::LDT + u64::from(sel::USER_CODE & !7));
        let old: u64 = cpu.memory.read(at).unwrap();
        cpu.memory.write(at, old & !(1 << 47)).unwrap();
    });
    assert_eq!(got, (true, fault(Vector::SegmentNotPresent, sel::USER_CODE & !3 | 4)));
}

#[test]
fn return_takes_away_segments_that_the_program_may_not_have() {
    let cases: [(&str, u16, bool, u16); 6] = [
        ("null", 0, false, 0),
        ("null of another RPL", 3, true, 0),
        ("the program's", sel::USER_DATA, false, sel::USER_DATA),
        ("the program's, of another RPL", sel::USER_DATA & !3, false, sel::USER_DATA & !3),
        ("the kernel's", sel::DATA, true, 0),
        ("the kernel's code", sel::CODE32, true, 0),
    ];
    use SegmentRegister::{Ds, Es, Fs, Gs};
    for (what, selector, handed, left) in cases {
        for register in [Es, Ds, Fs, Gs] {
            let mut both = both(Vendor::Intel);
            both.interrupt_return(what, TO_USER, |_, _| ());
            both.start(false, KERNEL_IRET);
            both.put_frame(FRAME, TO_USER);
            both.each(|cpu| set_data_segment(cpu, register, selector));
            assert_eq!(both.go(what), (handed, NOWHERE), "{what}");
            assert_eq!(both.subject.m.cpu.segments[register as usize].selector.0, left, "{what}");
        }
    }
    // Code at CPL 0 keeps all.
    let mut kernel = both(Vendor::Intel);
    let change = |cpu: &mut Cpu, _: &mut Frame| set_data_segment(cpu, Ds, sel::DATA);
    assert_eq!(kernel.interrupt_return("to the kernel", TO_KERNEL, change), (false, NOWHERE));
    assert_eq!(kernel.subject.m.cpu.segments[Ds as usize].selector.0, sel::DATA);
}

#[test]
fn return_with_alignment_checks_is_the_handlers() {
    for (frame, handed) in [(TO_USER, true), (TO_KERNEL, false)] {
        let got = both(Vendor::Intel).interrupt_return("AC", frame, |_, frame| frame[2] |= 0x4_0000);
        assert_eq!(got, (handed, NOWHERE));
    }
    let got = both(Vendor::Intel).interrupt_return("AC and AM", TO_USER, |cpu, frame| {
        cpu.cr0.insert(Cr0::AM);
        frame[2] |= 0x4_0000;
        cpu.regs[6] += 1;
    });
    assert_eq!(got, (true, fault(Vector::AlignmentCheck, 0)));
}

#[test]
fn resume_flag_is_gone_only_where_the_next_instruction_is_executed() {
    for (limit, handed) in [(LONG_RUN, false), (40, true)] {
        let mut both = both(Vendor::Intel);
        both.interrupt_return("known", TO_USER, |_, _| ());
        both.limit = limit;
        let got = both.interrupt_return("RF", TO_USER, |_, frame| frame[2] |= 0x1_0000);
        assert_eq!(got, (handed, NOWHERE), "{limit}");
        // A fault of the instruction has it in its frame all the same.
        let got = both.interrupt_return("RF, absent", TO_USER, |_, frame| {
            (frame[0], frame[2]) = (at::ABSENT, 0x1_0246);
        });
        assert_eq!(got, (handed, Some(fetch_fault(4))), "{limit}");
    }
    // A run that ends behind the return leaves it there.
    let mut both = both(Vendor::Intel);
    both.interrupt_return("known", TO_USER, |_, _| ());
    both.limit = 1;
    let got = both.interrupt_return("RF, the last", TO_USER, |_, frame| frame[2] |= 0x1_0000);
    assert_eq!(got, (true, NOWHERE));
    // The handler lets it go likewise.
    let mut first = super::interrupts::both(Vendor::Intel);
    let frame = [TO_USER[0], TO_USER[1], 0x1_0246, TO_USER[3], TO_USER[4]];
    first.start(false, KERNEL_IRET);
    first.put_frame(FRAME, frame);
    assert_eq!(first.go("first").1, NOWHERE);
}

#[test]
fn return_in_a_program_is_the_handlers() {
    let mut both = both(Vendor::Intel);
    for _ in 0..6 {
        both.start(true, USER_IRET);
        both.put_frame(FRAME, TO_USER);
        both.each(|cpu| (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8));
        let handed = both.handed();
        assert_eq!(both.go("at CPL 3").1, NOWHERE);
        // The interpreter runs it until it is translated.
        assert!(handed == 0 || both.handed() > handed);
    }
    assert!(both.handed() > 3);
}

/// Makes pages the kernel's.
fn keep_for_kernel(cpu: &mut Cpu, pages: &[u64]) {
    for page in pages {
        let entry = GuestAddress(at::TABLES + 0x3000 + 8 * (page >> 12));
        let old: u64 = cpu.memory.read(entry).unwrap();
        cpu.memory.write(entry, old & !4).unwrap();
    }
    cpu.tlb.flush();
}

#[test]
fn return_under_smap_may_access_what_ac_allows() {
    for (what, flags, end) in [("AC", 0x4_0202, NOWHERE), ("no AC", 0x202, Some(page_fault(1)))] {
        let mut both = both(Vendor::Intel);
        both.each(|cpu| {
            keep_for_kernel(cpu, &[at::GDT, FRAME & !0xfff, KERNEL_STACK & !0xfff]);
            cpu.cr4.insert(Cr4::SMAP);
            cpu.update_mode();
        });
        let frame = [TO_KERNEL[0], TO_KERNEL[1], flags, TO_KERNEL[3], TO_KERNEL[4]];
        assert_eq!(both.interrupt_return(what, frame, |_, _| ()), (false, end), "{what}");
    }
    // AC opens no table that the processor looks at by itself.
    let mut both = both(Vendor::Intel);
    let got = both.interrupt_return("table of the program's", TO_KERNEL, |cpu, _| {
        cpu.cr4.insert(Cr4::SMAP);
        cpu.flags.insert(Rflags::AC);
        cpu.tlb.flush();
        cpu.update_mode();
        for page in [at::GDT, FRAME] {
            cpu.probe(SegmentRegister::Ds as u8, page, 8, false).unwrap();
        }
    });
    assert_eq!(got, (true, Some(page_fault(1))));
}
