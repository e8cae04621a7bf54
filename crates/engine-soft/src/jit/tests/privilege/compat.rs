//! SYSENTER, SYSRET and IRETQ between 32-bit programs and a 64-bit kernel.

use ringfence_x86::SegmentRegister;

use super::interrupts::{FRAME, Frame, KERNEL_IRET, flip, set_data_segment};
use super::*;

/// SYSENTER, at CPL 3.
const ENTER: u64 = at::USER_CODE + 0x200;
/// SYSRET to 32-bit code, at CPL 0.
const BACK_NARROW: u64 = at::KERNEL_ONLY + 0xc00;
/// What 32-bit code goes on with.
const BEHIND: u64 = at::USER_CODE + 0x300;
/// mov eax,[esi]; mov eax,cs:[edi]; mov [edi],eax; push ebx; pop edx; pushfd; pop ebp; ud2
const LOOK_NARROW: &[u8] = &[0x8b, 0x06, 0x2e, 0x8b, 0x07, 0x89, 0x07, 0x53, 0x5a, 0x9c, 0x5d, 0x0f, 0x0b];
const UD: Option<Exception> = Some(Exception::UD);
const TO_NARROW: Frame = [BEHIND, sel::USER_CODE32 as u64, 0x246, at::USER_STACK, sel::USER_DATA as u64];

fn both(vendor: Vendor) -> Both {
    let mut both = super::interrupts::both(vendor);
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        put(ENTER, &[0x0f, 0x34]);
        put(BACK_NARROW, &[0x0f, 0x07]);
        put(BEHIND, LOOK_NARROW);
        for register in [SegmentRegister::Ds, SegmentRegister::Es, SegmentRegister::Fs, SegmentRegister::Gs] {
            set_data_segment(cpu, register, sel::USER_DATA);
        }
        set_msrs(cpu);
    });
    both
}

fn set_msrs(cpu: &mut Cpu) {
    set_msr(cpu, msr::SYSENTER_CS, sel::CODE.into());
    set_msr(cpu, msr::SYSENTER_EIP, ENTRY);
    set_msr(cpu, msr::SYSENTER_ESP, at::STACK);
}

/// From where an instruction is executed.
#[derive(Clone, Copy, PartialEq, Debug)]
enum From {
    Narrow,
    Wide,
    Kernel,
}

impl Both {
    fn begin(&mut self, from: From, rip: u64) {
        self.start(from != From::Kernel, rip);
        if from == From::Narrow {
            for lab in [&mut self.reference, &mut self.subject] {
                let code = lab.descriptor(sel::USER_CODE32);
                lab.m.cpu.segments[1] = code;
                lab.m.cpu.update_mode();
            }
        }
    }

    /// Executes what is at `rip`, often enough to be translated and linked; the last time after `change`.
    fn compat(
        &mut self,
        what: &str,
        from: From,
        rip: u64,
        change: fn(&mut Cpu),
    ) -> (bool, Option<Exception>) {
        let mut last = (false, None);
        for round in 0..6 {
            self.begin(from, rip);
            if from == From::Kernel {
                self.put_frame(FRAME, TO_NARROW);
            }
            self.each(|cpu| {
                cpu.set_rflags(0x8d7 | 0x200);
                (cpu.regs[1], cpu.regs[3], cpu.regs[11]) = (BEHIND, 0x1234_5678_9abc_def0, 0x246);
                (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
                if from == From::Kernel && rip != KERNEL_IRET {
                    cpu.regs[4] = at::USER_STACK;
                }
                if round == 5 {
                    change(cpu);
                }
            });
            last = self.go(what);
        }
        last
    }
}

#[test]
fn system_enter_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 18] = [
        ("plain", |_| (), false, NOWHERE),
        ("no CS", |cpu| set_msr(cpu, msr::SYSENTER_CS, 0), true, Some(Exception::GP0)),
        ("null CS", |cpu| set_msr(cpu, msr::SYSENTER_CS, 3), true, Some(Exception::GP0)),
        ("null CS with more", |cpu| set_msr(cpu, msr::SYSENTER_CS, 0x1_0002), true, Some(Exception::GP0)),
        ("another CS", |cpu| set_msr(cpu, msr::SYSENTER_CS, 0x1_0073), false, NOWHERE),
        ("another entry", |cpu| set_msr(cpu, msr::SYSENTER_EIP, ENTRY + 3), false, NOWHERE),
        ("entry not mapped", |cpu| set_msr(cpu, msr::SYSENTER_EIP, at::ABSENT), false, Some(fetch_fault(0))),
        ("another stack", |cpu| set_msr(cpu, msr::SYSENTER_ESP, at::STACK - 0x800), false, NOWHERE),
        (
            "stack not mapped",
            |cpu| set_msr(cpu, msr::SYSENTER_ESP, at::ABSENT + 8),
            false,
            Some(page_fault(2)),
        ),
        ("traced", |cpu| cpu.flags.insert(Rflags::TF), false, step),
        ("NT and IOPL", |cpu| cpu.set_rflags(0x7602), false, NOWHERE),
        ("DF and no IF", |cpu| cpu.set_rflags(0x402), false, NOWHERE),
        ("RF", |cpu| cpu.flags.insert(Rflags::RF), false, NOWHERE),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.set_rflags(0x4_0202);
            },
            true,
            NOWHERE,
        ),
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), false, NOWHERE),
        ("something waits", post, true, NOWHERE),
        (
            "SMAP",
            |cpu| {
                cpu.cr4.insert(Cr4::SMAP);
                cpu.tlb.flush();
                cpu.update_mode();
            },
            false,
            Some(page_fault(1)),
        ),
        (
            "SMAP and AC",
            |cpu| {
                cpu.cr4.insert(Cr4::SMAP);
                cpu.tlb.flush();
                cpu.set_rflags(0x4_0202);
                cpu.update_mode();
            },
            false,
            NOWHERE,
        ),
    ];
    for (what, change, handed, end) in cases {
        let got = both(Vendor::Intel).compat(what, From::Narrow, ENTER, change);
        assert_eq!(got, (handed, end), "{what}");
    }
    let of_amd = both(Vendor::Amd).compat("of the other make", From::Narrow, ENTER, |_| ());
    assert_eq!(of_amd, (true, UD));
    for (from, end) in [(From::Wide, NOWHERE), (From::Kernel, NOWHERE)] {
        assert_eq!(both(Vendor::Intel).compat("64-bit code", from, ENTER, |_| ()), (true, end));
    }
}

#[test]
fn system_return_to_32_bit_code_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let null_data: fn(&mut Cpu) = |cpu| set_data_segment(cpu, SegmentRegister::Ds, 0);
    let cases: [Case; 16] = [
        ("plain", |_| (), false, UD),
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), true, UD),
        ("another STAR", |cpu| set_msr(cpu, msr::STAR, STAR ^ 0x48 << 48), false, UD),
        ("trap behind it", |cpu| cpu.regs[11] |= 0x100, true, step),
        ("AC", |cpu| cpu.regs[11] |= 0x4_0000, true, UD),
        ("NT and IOPL", |cpu| cpu.regs[11] |= 0x7000, false, UD),
        ("flags that are none", |cpu| cpu.regs[11] = !0x4_0100, false, UD),
        ("no flags", |cpu| cpu.regs[11] = 0, false, UD),
        ("something waits", post, true, UD),
        ("no DS", null_data, true, Some(Exception::GP0)),
        ("no ES", |cpu| set_data_segment(cpu, SegmentRegister::Es, 0), true, UD),
        ("no SS", |cpu| set_data_segment(cpu, SegmentRegister::Ss, 0), false, UD),
        ("stack beyond", |cpu| cpu.regs[4] |= 1 << 32, true, UD),
        ("target beyond", |cpu| cpu.regs[1] |= 1 << 63, false, UD),
        ("target not mapped", |cpu| cpu.regs[1] = at::ABSENT, false, Some(fetch_fault(4))),
        ("target of the kernel's", |cpu| cpu.regs[1] = ENTRY, false, Some(fetch_fault(5))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let got = both(vendor).compat(what, From::Kernel, BACK_NARROW, change);
            assert_eq!(got, (handed, end), "{what}");
        }
        let mut program = both(vendor);
        program.each(|cpu| cpu.memory.write_bytes(GuestAddress(ENTER), &[0x0f, 0x07]).unwrap());
        assert_eq!(program.compat("at CPL 3", From::Wide, ENTER, |_| ()), (true, Some(Exception::GP0)));
        let end = if vendor == Vendor::Intel { UD } else { Some(Exception::GP0) };
        assert_eq!(program.compat("in 32-bit code", From::Narrow, ENTER, |_| ()), (true, end));
    }
}

fn in_frame<const PLACE: u64>(cpu: &Cpu, change: fn(u64) -> u64) {
    let at = GuestAddress(FRAME + 8 * PLACE);
    let old: u64 = cpu.memory.read(at).unwrap();
    cpu.memory.write(at, change(old)).unwrap();
}

#[test]
fn return_from_interrupt_to_32_bit_code_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 15] = [
        ("plain", |_| (), false, UD),
        ("RIP beyond", |cpu| in_frame::<0>(cpu, |rip| rip | 1 << 32), true, Some(Exception::GP0)),
        ("RSP beyond", |cpu| in_frame::<3>(cpu, |rsp| rsp | 1 << 32), true, UD),
        ("trap behind", |cpu| in_frame::<2>(cpu, |flags| flags | 0x100), true, step),
        ("AC", |cpu| in_frame::<2>(cpu, |flags| flags | 0x4_0000), true, UD),
        ("other flags", |cpu| in_frame::<2>(cpu, |_| 0x3cd7), false, UD),
        ("RF", |cpu| in_frame::<2>(cpu, |flags| flags | 0x1_0000), false, UD),
        ("64-bit code", |cpu| in_frame::<1>(cpu, |_| sel::USER_CODE.into()), true, None),
        ("no DS", |cpu| set_data_segment(cpu, SegmentRegister::Ds, 0), true, Some(Exception::GP0)),
        ("no SS", |cpu| set_data_segment(cpu, SegmentRegister::Ss, 0), false, UD),
        ("ES of the kernel's", |cpu| set_data_segment(cpu, SegmentRegister::Es, sel::DATA), true, UD),
        ("a limit", |cpu| flip(cpu, sel::USER_CODE32, 1), true, UD),
        ("something waits", post, true, UD),
        ("not present", |cpu| flip(cpu, sel::USER_CODE32, 1 << 47), true, None),
        ("not mapped", |cpu| in_frame::<0>(cpu, |_| at::ABSENT), false, Some(fetch_fault(4))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let got = both(vendor).compat(what, From::Kernel, KERNEL_IRET, change);
            assert_eq!(got.0, handed, "{what}");
            if end.is_some() {
                assert_eq!(got.1, end, "{what}");
            }
        }
    }
}

#[test]
fn modes_take_turns_by_fixed_code_alone() {
    let mut both = both(Vendor::Intel);
    both.limit = 5000;
    for round in 0..40 {
        let (from, rip, end) = match round % 5 {
            0 => (From::Narrow, ENTER, NOWHERE),
            1 => (From::Kernel, BACK_NARROW, UD),
            2 => (From::Wide, at::USER_CODE, NOWHERE),
            3 => (From::Kernel, KERNEL_IRET, UD),
            _ => (From::Kernel, BACK, NOWHERE),
        };
        let handed = round < 5;
        both.begin(from, rip);
        if rip == KERNEL_IRET {
            both.put_frame(FRAME, TO_NARROW);
        }
        both.each(|cpu| {
            cpu.set_rflags(0x246);
            cpu.regs[1] = if rip == BACK { at::USER_CODE + 2 } else { BEHIND };
            cpu.regs[11] = 0x246;
            (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
            if rip == BACK_NARROW {
                cpu.regs[4] = at::USER_STACK;
            }
        });
        let got = both.go("turns");
        assert_eq!((got.0 && !handed, got.1), (false, end), "round {round}");
    }
}

#[test]
fn whole_calls_go_from_32_bit_code_to_the_kernel_and_back() {
    let mut both = both(Vendor::Intel);
    both.limit = 5000;
    let entry = ENTRY + 0x400;
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        // push ebx; push edi; sysenter
        put(ENTER, &[0x53, 0x57, 0x0f, 0x34]);
        // pop rax; push rax; mov esp,ebp; mov ecx,edx; sysretd
        put(entry, &[0x58, 0x50, 0x89, 0xec, 0x89, 0xd1, 0x0f, 0x07]);
        // pop edi; pop ebx; mov eax,cs:[esi]; dec ebx; jnz ENTER; ud2
        let back = BEHIND + 8;
        let distance = (ENTER.wrapping_sub(back + 12)) as u32;
        let mut code = vec![0x5f, 0x5b, 0x2e, 0x8b, 0x06, 0x4b, 0x0f, 0x85];
        code.extend(distance.to_le_bytes());
        code.extend([0x0f, 0x0b]);
        put(back, &code);
        set_msr(cpu, msr::SYSENTER_EIP, entry);
    });
    for count in [3, 10, 50] {
        both.begin(From::Narrow, ENTER);
        both.each(|cpu| {
            cpu.set_rflags(0x246);
            (cpu.regs[3], cpu.regs[2], cpu.regs[11]) = (count, BEHIND + 8, 0x246);
            (cpu.regs[5], cpu.regs[6], cpu.regs[7]) = (cpu.regs[4] - 8, at::DATA, 7);
        });
        let got = both.go("whole calls");
        assert_eq!(got, (false, UD));
    }
}

#[test]
fn random_calls_of_32_bit_programs_run_as_in_the_interpreter() {
    for (vendor, seed) in [(Vendor::Intel, seed(25)), (Vendor::Amd, seed(26))] {
        let mut both = both(vendor);
        let mut direct = 0;
        for round in 0..count(3000) {
            let mut random = Random::new(seed << 32 | round);
            let random = &mut random;
            let (from, rip) = random.pick(&[
                (From::Narrow, ENTER),
                (From::Narrow, ENTER),
                (From::Kernel, BACK_NARROW),
                (From::Kernel, BACK_NARROW),
                (From::Kernel, KERNEL_IRET),
                (From::Kernel, BACK),
                (From::Wide, at::USER_CODE),
                (From::Wide, ENTER),
                (From::Kernel, ENTER),
            ]);
            both.limit = if random.chance(60) { 5000 } else { 40 };
            both.begin(from, rip);
            let mut frame = TO_NARROW;
            if random.chance(10) {
                let wild = random.bits();
                frame[0] = random.pick(&[at::ABSENT, 1 << 32 | BEHIND, ENTRY, wild, 0xffff_fffe]);
            }
            if random.chance(10) {
                frame[3] = random.bits();
            }
            let flags = random.bits() & !0x6_4100;
            frame[2] = if random.chance(90) { flags } else { random.bits() & !0x2_0000 };
            if random.chance(10) {
                frame[1] = random.pick(&[sel::USER_CODE, sel::CODE, 0, sel::USER_DATA]).into();
            }
            if random.chance(10) {
                frame[4] = random.pick(&[sel::USER_CODE, sel::DATA, 0, 3]).into();
            }
            if rip == KERNEL_IRET {
                both.put_frame(FRAME, frame);
            }
            let wild =
                |random: &mut Random, usual: u64| if random.chance(12) { random.bits() } else { usual };
            let now = random.bits() & Rflags::WRITABLE.bits() & !0x2_0000;
            let now = if random.chance(90) { now & !0x5_4100 } else { now & !0x1_0000 };
            let registers =
                [wild(random, BEHIND), random.bits(), wild(random, flags), wild(random, at::USER_STACK)];
            let from = random.pick(&[at::DATA, at::DATA, at::KERNEL_ONLY]);
            let (data, register) = (
                if random.chance(85) {
                    sel::USER_DATA
                } else {
                    random.pick(&[0, 1, sel::DATA, sel::CODE, sel::DATA16])
                },
                random.pick(&[SegmentRegister::Es, SegmentRegister::Ds, SegmentRegister::Fs]),
            );
            let cs = if random.chance(85) {
                sel::CODE.into()
            } else {
                random.pick(&[0, 2, 0x1_0000, 0x70, 0xfff8])
            };
            let star = if random.chance(85) { STAR } else { random.bits() };
            let entry = random.pick(&[ENTRY, ENTRY, ENTRY + 3, at::ABSENT]);
            let stack = random.pick(&[at::STACK, at::STACK, FRAME, at::ABSENT]);
            let features = random.bits();
            let changes = random.chance(5);
            both.each(|cpu| {
                set_data_segment(cpu, register, data);
                set_msr(cpu, msr::SYSENTER_CS, cs);
                set_msr(cpu, msr::SYSENTER_EIP, entry);
                set_msr(cpu, msr::SYSENTER_ESP, stack);
                set_msr(cpu, msr::STAR, star);
                if changes {
                    cpu.cr0.set(Cr0::AM, features & 1 != 0);
                    cpu.cr4.set(Cr4::SMAP, features & 2 != 0);
                    cpu.cr4.set(Cr4::SMEP, features & 4 != 0);
                    cpu.efer.set(Efer::SCE, features & 0x38 != 0);
                    cpu.tlb.flush();
                }
                cpu.set_rflags(now);
                (cpu.regs[1], cpu.regs[3], cpu.regs[11]) = (registers[0], registers[1], registers[2]);
                (cpu.regs[6], cpu.regs[7]) = (from, at::DATA + 8);
                if rip == BACK_NARROW {
                    cpu.regs[4] = registers[3];
                }
                cpu.update_mode();
            });
            direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
        }
        assert!(direct > count(3000) / 4, "{direct}");
    }
}
