//! INT n through a gate to a 64-bit kernel.

use ringfence_x86::{SegmentRegister, Vector, segment::system_type};

use super::interrupts::{flip, set_data_segment};
use super::*;

const NUMBER: u8 = 0x80;
/// INT 0x80, behind a push, so that the stack's page is known.
const CALL: u64 = at::USER_CODE + 0x200;
const HANDLER: u64 = at::HANDLERS + 16 * NUMBER as u64;
const GATE: u64 = at::IDT + 16 * NUMBER as u64;
/// mov rax,[rsi]; mov [rdi],rax; push rbx; pop rdx; pushfq; pop rbp; ud2
const LOOK_ON: &[u8] = &[0x48, 0x8b, 0x06, 0x48, 0x89, 0x07, 0x53, 0x5a, 0x9c, 0x5d, 0x0f, 0x0b];
const UD: Option<Exception> = Some(Exception::UD);

fn both(vendor: Vendor, kind: u8) -> Both {
    let mut both = super::both(vendor);
    both.limit = 5000;
    for lab in [&mut both.reference, &mut both.subject] {
        lab.gate(NUMBER, sel::CODE, kind, 3, 0);
    }
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        put(CALL, &[0x53, 0xcd, NUMBER]);
        put(HANDLER, LOOK_ON);
        // The kernel's own, as SMAP wants it.
        for page in [at::IDT, at::GDT, at::TSS, at::HANDLERS, at::INNER_STACK & !0xfff] {
            write(cpu, at::TABLES + 0x3000 + page / 0x1000 * 8, page | 3);
        }
        for register in [SegmentRegister::Ds, SegmentRegister::Es] {
            set_data_segment(cpu, register, sel::USER_DATA);
        }
    });
    both
}

impl Both {
    fn gate_from(&mut self, selector: u16) {
        self.start(selector != sel::CODE, CALL);
        for lab in [&mut self.reference, &mut self.subject] {
            lab.m.cpu.segments[1] = lab.descriptor(selector);
            lab.m.cpu.update_mode();
        }
        self.each(|cpu| {
            cpu.set_rflags(0xad7);
            cpu.regs[3] = 0x1234_5678_9abc_def0;
            (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
        });
    }

    /// INT 0x80 from such a code segment, often enough to be known; the last time after `change`.
    fn gate_call(&mut self, what: &str, selector: u16, change: fn(&mut Cpu)) -> (bool, Option<Exception>) {
        let mut last = (false, None);
        for round in 0..6 {
            self.gate_from(selector);
            if round == 5 {
                self.each(change);
            }
            last = self.go(what);
        }
        last
    }
}

fn write(cpu: &Cpu, at: u64, value: u64) {
    cpu.memory.write(GuestAddress(at), value).unwrap();
}

fn flip_at(cpu: &Cpu, at: u64, bits: u64) {
    let old: u64 = cpu.memory.read(GuestAddress(at)).unwrap();
    write(cpu, at, old ^ bits);
}

fn fault(vector: Vector, code: u16) -> Option<Exception> {
    Some(Exception::with_code(vector, code))
}

#[test]
fn interrupt_instruction_is_as_in_the_interpreter() {
    let gate_code = u16::from(NUMBER) << 3 | 2;
    let gp = |code| fault(Vector::GeneralProtection, code);
    let cases: [Case; 27] = [
        ("plain", |_| (), false, UD),
        ("another target", |cpu| flip_at(cpu, GATE, 4), true, None),
        ("a target above", |cpu| write(cpu, GATE + 8, 1), true, fault(Vector::PageFault, 16)),
        ("a target that is not canonical", |cpu| write(cpu, GATE + 8, 1 << 16), true, gp(0)),
        ("a gate of the kernel's", |cpu| flip_at(cpu, GATE, 3 << 45), true, gp(gate_code)),
        (
            "a gate not present",
            |cpu| flip_at(cpu, GATE, 1 << 47),
            true,
            fault(Vector::SegmentNotPresent, gate_code),
        ),
        ("no gate", |cpu| write(cpu, GATE, 0), true, gp(gate_code)),
        ("a stack of its own", |cpu| flip_at(cpu, GATE, 1 << 32), true, UD),
        ("the other kind", |cpu| flip_at(cpu, GATE, 1 << 40), true, UD),
        ("code of the program's", |cpu| flip(cpu, sel::CODE, 3 << 45), true, None),
        ("conforming code", |cpu| flip(cpu, sel::CODE, 1 << 42), true, None),
        (
            "code not present",
            |cpu| flip(cpu, sel::CODE, 1 << 47),
            true,
            fault(Vector::SegmentNotPresent, sel::CODE),
        ),
        ("32-bit code", |cpu| flip(cpu, sel::CODE, 3 << 53), true, gp(sel::CODE)),
        (
            "table of gates ends before",
            |cpu| cpu.idtr.limit = GATE as u16 - at::IDT as u16 + 14,
            true,
            gp(gate_code),
        ),
        ("table of gates elsewhere", |cpu| cpu.idtr.base += 16, true, None),
        ("descriptors end before", |cpu| cpu.gdtr.limit = 7, true, gp(sel::CODE)),
        ("descriptors elsewhere", |cpu| cpu.gdtr.base += 0x10, true, None),
        ("no stack in the TSS", |cpu| cpu.tr.limit = 10, true, fault(Vector::InvalidTss, sel::TSS)),
        ("TSS elsewhere", |cpu| cpu.tr.base += 0x20, true, None),
        ("another stack", |cpu| write(cpu, at::TSS + 4, at::INNER_STACK - 0x109), false, UD),
        ("stack not mapped", |cpu| write(cpu, at::TSS + 4, at::ABSENT + 0x800), true, Some(page_fault(2))),
        ("stack in two pages", |cpu| write(cpu, at::TSS + 4, at::STACK + 0x20), true, UD),
        ("stack not canonical", |cpu| write(cpu, at::TSS + 4, 1 << 63), true, fault(Vector::StackFault, 0)),
        ("something waits", post, true, UD),
        ("NT and IOPL", |cpu| cpu.set_rflags(0x7602), false, UD),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.set_rflags(0x4_0202);
            },
            true,
            UD,
        ),
        (
            "SMAP",
            |cpu| {
                cpu.cr4.insert(Cr4::SMAP);
                cpu.tlb.flush();
                cpu.update_mode();
            },
            true,
            Some(page_fault(1)),
        ),
    ];
    for (vendor, selector) in [(Vendor::Intel, sel::USER_CODE32), (Vendor::Amd, sel::USER_CODE)] {
        for kind in [system_type::INTERRUPT_GATE, system_type::TRAP_GATE] {
            for (what, change, handed, end) in cases {
                let got = both(vendor, kind).gate_call(what, selector, change);
                assert_eq!(got.0, handed, "{what}, {selector:#x}");
                if end.is_some() {
                    assert_eq!(got.1, end, "{what}, {selector:#x}");
                }
            }
        }
        let kernel = both(vendor, system_type::INTERRUPT_GATE).gate_call("in the kernel", sel::CODE, |_| ());
        assert_eq!(kernel, (true, UD));
    }
}

#[test]
fn interrupt_instruction_that_is_traced_or_under_smap_is_as_in_the_interpreter() {
    for selector in [sel::USER_CODE32, sel::USER_CODE] {
        let mut both = both(Vendor::Intel, system_type::INTERRUPT_GATE);
        both.gate_call("traced", selector, |cpu| cpu.flags.insert(Rflags::TF));
        both.gate_call("none", selector, |cpu| cpu.set_rflags(0x2));
        for (ac, end) in [(0, Some(page_fault(1))), (0x4_0000, UD)] {
            both.each(|cpu| {
                cpu.cr4.insert(Cr4::SMAP);
                cpu.tlb.flush();
            });
            let mut last = (true, None);
            for _ in 0..6 {
                both.gate_from(selector);
                both.each(|cpu| {
                    cpu.set_rflags(0x202 | ac);
                    cpu.update_mode();
                });
                last = both.go("under SMAP");
            }
            assert_eq!(last, (false, end));
        }
    }
}

#[test]
fn random_interrupt_instructions_run_as_in_the_interpreter() {
    let mut both = both(Vendor::Intel, system_type::INTERRUPT_GATE);
    let (mut direct, seed) = (0, seed(27));
    for round in 0..count(3000) {
        let mut random = Random::new(seed << 32 | round);
        let random = &mut random;
        both.gate_from(random.pick(&[sel::USER_CODE32, sel::USER_CODE, sel::USER_CODE32, sel::CODE]));
        both.limit = if random.chance(70) { 5000 } else { 40 };
        let place = random.pick(&[GATE, GATE + 8, at::GDT + u64::from(sel::CODE)]);
        let bit = if random.chance(8) { 1 << random.below(64) } else { 0 };
        let stack = match random.below(8) {
            0 => at::ABSENT,
            1 => at::STACK + random.below(0x30),
            2 => random.bits(),
            _ => at::INNER_STACK - random.below(0x400),
        };
        let flags = random.bits() & Rflags::WRITABLE.bits() & !0x3_0000;
        let flags = if random.chance(80) { flags & !0x4_0100 } else { flags };
        let (features, flush, changes) = (random.bits(), random.chance(5), random.chance(5));
        both.each(|cpu| {
            flip_at(cpu, place, bit);
            write(cpu, at::TSS + 4, stack);
            if changes {
                cpu.cr4.set(Cr4::SMAP, features & 1 != 0);
                cpu.cr0.set(Cr0::AM, features & 2 != 0);
            }
            if flush || changes {
                cpu.tlb.flush();
            }
            cpu.set_rflags(flags);
            cpu.update_mode();
        });
        direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
        both.each(|cpu| {
            flip_at(cpu, place, bit);
            super::interrupts::accessed(cpu, sel::CODE);
        });
    }
    assert!(direct > count(3000) / 5, "{direct}");
}

#[test]
fn interrupt_instruction_by_unusual_gates_is_the_handlers() {
    let put_gate = |both: &mut Both, dpl: u8, ist: u8| {
        for lab in [&mut both.reference, &mut both.subject] {
            lab.gate(NUMBER, sel::CODE, system_type::INTERRUPT_GATE, dpl, ist);
        }
    };
    let mut own_stack = both(Vendor::Intel, system_type::INTERRUPT_GATE);
    put_gate(&mut own_stack, 3, 1);
    assert_eq!(own_stack.gate_call("a stack of its own", sel::USER_CODE32, |_| ()), (true, UD));

    // What the kernel may go through, a program may not, when all pages are known.
    let mut kernels = both(Vendor::Intel, system_type::INTERRUPT_GATE);
    assert_eq!(kernels.gate_call("a gate of the program's", sel::USER_CODE32, |_| ()), (false, UD));
    put_gate(&mut kernels, 0, 0);
    for selector in [sel::CODE, sel::CODE, sel::CODE, sel::USER_CODE32, sel::USER_CODE32, sel::USER_CODE32] {
        kernels.gate_from(selector);
        let user = selector != sel::CODE;
        kernels.each(|cpu| {
            if !user {
                set_data_segment(cpu, SegmentRegister::Ss, 0);
            }
        });
        let refused = fault(Vector::GeneralProtection, u16::from(NUMBER) << 3 | 2);
        assert_eq!(kernels.go("a gate of the kernel's"), (true, if user { refused } else { UD }));
    }

    // The lower of the two pages is known.
    let mut two_pages = both(Vendor::Intel, system_type::INTERRUPT_GATE);
    two_pages.each(|cpu| write(cpu, at::TSS + 4, at::STACK - 0x800));
    assert_eq!(two_pages.gate_call("a stack below", sel::USER_CODE32, |_| ()), (false, UD));
    let over_both: fn(&mut Cpu) = |cpu| write(cpu, at::TSS + 4, at::STACK + 0x10);
    assert_eq!(two_pages.gate_call("a stack over both", sel::USER_CODE32, over_both), (true, UD));
}
