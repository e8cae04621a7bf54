//! Changes of privilege: SYSCALL and SYSRET, translated and interpreted.

use std::sync::atomic::Ordering;

use ringfence_irqchip::{IrqChip, IrqChipConfig};
use ringfence_memory::GuestAddress;
use ringfence_x86::cpuid::Vendor;
use ringfence_x86::{Rflags, msr};

use super::*;
use crate::interp::testing::{Lab, at, sel};

/// Where SYSCALL leads: a page that is not the programs'.
const ENTRY: u64 = at::KERNEL_ONLY + 0x100;
/// SYSRET in that page.
const BACK: u64 = at::KERNEL_ONLY + 0x800;
/// A SYSCALL behind a push, so that the stack's page is known.
const PUSHING: u64 = at::USER_CODE + 0x600;
/// A SYSCALL that lies in two pages.
const CROSSING: u64 = at::USER_CODE + 0xfff;
const STAR: u64 = (sel::CODE as u64) << 32 | (sel::USER_CODE32 as u64) << 48;

/// mov rax,[rsi]; mov [rdi],rax; push rbx; pop rdx; pushfq; pop rbp; ret: what was not allowed before, or is not any more.
const LOOK: &[u8] = &[0x48, 0x8b, 0x06, 0x48, 0x89, 0x07, 0x53, 0x5a, 0x9c, 0x5d, 0xc3];

fn lab(vendor: Vendor) -> Lab {
    let mut lab = Lab::long_of(vendor);
    let put = |lab: &Lab, at: u64, code: &[u8]| lab.memory.write_bytes(GuestAddress(at), code).unwrap();
    // syscall, and what follows where it comes back
    put(&lab, at::USER_CODE, &[&[0x0f, 0x05], LOOK].concat());
    put(&lab, CROSSING, &[&[0x0f, 0x05], LOOK].concat());
    put(&lab, PUSHING, &[0x53, 0x5a, 0x0f, 0x05]);
    put(&lab, ENTRY, LOOK);
    put(&lab, BACK, &[0x48, 0x0f, 0x07]);
    put(&lab, at::USER_CODE + 0x800, &[0x48, 0x0f, 0x07]);
    let cpu = &mut lab.m.cpu;
    for (number, value) in [(msr::STAR, STAR), (msr::LSTAR, ENTRY), (msr::FMASK, 0x4_7700)] {
        cpu.write_msr(number, value).unwrap();
    }
    lab
}

/// The interpreter's vCPU and the translator's, which have the same memory contents.
struct Both {
    reference: Lab,
    subject: Lab,
    jit: Jit,
}

/// Executes up to `limit` instructions, one at least.
fn run(m: &mut Interpreter, jit: Option<&mut Jit>, limit: u64) -> Result<(), Exception> {
    match jit {
        _ if m.cpu.steps_singly() => m.single_step(),
        Some(jit) => jit.run(m, limit),
        None => m.run_block(limit as usize),
    }
}

impl Both {
    fn new(vendor: Vendor) -> Self {
        let (reference, subject) = (lab(vendor), lab(vendor));
        let options =
            Options { threshold: 1, exact_flags: true, code_size: 1 << 20, profile: true, ..OPTIONS };
        let jit = Jit::new(options, &subject.m.cpu.code).unwrap();
        Self { reference, subject, jit }
    }

    fn each(&mut self, mut change: impl FnMut(&mut Cpu)) {
        for lab in [&mut self.reference, &mut self.subject] {
            change(&mut lab.m.cpu);
        }
    }

    /// Goes to an address with CS and SS of a privilege level. The soft TLB stays as it is.
    fn start(&mut self, user: bool, rip: u64) {
        let (code, data, stack) = if user {
            (sel::USER_CODE, sel::USER_DATA, at::USER_STACK)
        } else {
            (sel::CODE, sel::DATA, at::STACK)
        };
        for lab in [&mut self.reference, &mut self.subject] {
            let segments = [lab.descriptor(code), lab.descriptor(data)];
            let cpu = &mut lab.m.cpu;
            cpu.segments[1..3].copy_from_slice(&segments);
            cpu.cpl = if user { 3 } else { 0 };
            (cpu.regs[RIP], cpu.regs[4]) = (rip, stack);
            cpu.update_mode();
        }
    }

    /// How often translated code has left a system call, or the return from one, to its handler.
    fn handed(&self) -> u64 {
        let forms = super::super::handed(&self.subject.m.cpu);
        forms.iter().filter(|(form, _)| form.starts_with("Sys")).map(|(_, count)| count).sum()
    }

    /// Executes an instruction and what it leads to, until an exception; whether translated code called its handler, and
    /// the exception. Both vCPUs must be in the same state wherever the translator stops.
    fn go(&mut self, what: &str) -> (bool, Option<Exception>) {
        let handed = self.handed();
        let mut end = None;
        for _ in 0..20 {
            let before = self.subject.m.cpu.retired;
            let outcome = run(&mut self.subject.m, Some(&mut self.jit), 40);
            let count = self.subject.m.cpu.retired - before;
            let start = self.reference.m.cpu.retired;
            let mut expected = Ok(());
            loop {
                let done = self.reference.m.cpu.retired - start;
                if expected.is_err() || done > count || done == count && outcome.is_ok() {
                    break;
                }
                expected = run(&mut self.reference.m, None, (count - done).max(1));
            }
            assert_eq!(outcome, expected, "{what}");
            let (a, b) = (&self.reference.m.cpu, &self.subject.m.cpu);
            assert_eq!(a.save_state(), b.save_state(), "{what}");
            assert_eq!((a.cpl, a.class, a.flat), (b.cpl, b.class, b.flat), "{what}");
            assert_eq!((a.retired, a.bases), (b.retired, b.bases), "{what}");
            if let Err(exception) = outcome {
                assert_eq!(a.fault_address, b.fault_address, "{what}");
                end = Some(exception);
                break;
            }
        }
        for page in [at::USER_STACK - 0x1000, at::DATA, at::KERNEL_ONLY, at::STACK - 0x1000] {
            let mut bytes = [[0; 0x1000]; 2];
            for (lab, bytes) in [&self.reference, &self.subject].into_iter().zip(&mut bytes) {
                lab.memory.read_bytes(GuestAddress(page), bytes).unwrap();
            }
            assert!(bytes[0] == bytes[1], "{what}: memory at {page:#x}");
        }
        (self.handed() != handed, end)
    }

    /// SYSCALL at an address, often enough to be translated and linked; the last time after `change`.
    fn call(&mut self, what: &str, rip: u64, change: fn(&mut Cpu)) -> (bool, Option<Exception>) {
        self.repeat(what, true, rip, change)
    }

    /// SYSRET to where SYSCALL is, likewise.
    fn back(&mut self, what: &str, change: fn(&mut Cpu)) -> (bool, Option<Exception>) {
        self.repeat(what, false, BACK, change)
    }

    fn repeat(
        &mut self,
        what: &str,
        user: bool,
        rip: u64,
        change: fn(&mut Cpu),
    ) -> (bool, Option<Exception>) {
        let mut last = (false, None);
        for round in 0..6 {
            self.start(user, rip);
            self.each(|cpu| {
                cpu.set_rflags(0xad7);
                cpu.regs[1] = at::USER_CODE + 2;
                cpu.regs[11] = 0x246;
                (cpu.regs[6], cpu.regs[7]) = (at::DATA, at::DATA + 8);
                if round == 5 {
                    change(cpu);
                }
            });
            last = self.go(what);
        }
        last
    }
}

/// What the look behind SYSCALL or SYSRET ends with, where all went well: a return to where nothing is mapped.
const NOWHERE: Option<Exception> = Some(Exception::GP0);

fn both(vendor: Vendor) -> Both {
    let mut both = Both::new(vendor);
    // The look's RET goes to an address that is not canonical.
    both.each(|cpu| {
        for stack in [at::USER_STACK, at::STACK] {
            cpu.memory.write(GuestAddress(stack), 1_u64 << 63).unwrap();
        }
    });
    both
}

#[test]
fn system_calls_and_returns_need_no_handler() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mut both = both(vendor);
        for rip in [at::USER_CODE, CROSSING] {
            assert_eq!(both.call("call", rip, |_| ()), (false, NOWHERE));
            assert_eq!((both.subject.m.cpu.cpl, both.subject.m.cpu.regs[1]), (0, rip + 2));
        }
        assert_eq!(both.back("return", |_| ()), (false, NOWHERE));
        assert_eq!(both.subject.m.cpu.cpl, 3);
    }
}

/// What is changed before an instruction, whether its handler is called then, and how it ends.
type Case = (&'static str, fn(&mut Cpu), bool, Option<Exception>);

fn set_msr(cpu: &mut Cpu, number: u32, value: u64) {
    cpu.write_msr(number, value).unwrap();
}

/// Lets something wait for the vCPU.
fn post(cpu: &mut Cpu) {
    let config = IrqChipConfig { cpus: 1, physical_bits: 40, x2apic: true, tsc_deadline: true };
    let apic = IrqChip::new(config).add_local_apic(0, Arc::clone(&cpu.clock)).unwrap();
    apic.inbox().pending_word().store(1, Ordering::Relaxed);
    cpu.connect_apic(apic);
}

#[test]
fn system_call_that_is_unusual_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 12] = [
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), true, Some(Exception::UD)),
        ("another STAR", |cpu| set_msr(cpu, msr::STAR, STAR ^ 0x48 << 32), false, NOWHERE),
        ("another entry", |cpu| set_msr(cpu, msr::LSTAR, ENTRY + 3), false, NOWHERE),
        ("all flags kept", |cpu| set_msr(cpu, msr::FMASK, 0), false, NOWHERE),
        ("no flag kept", |cpu| set_msr(cpu, msr::FMASK, 0xffff_ffff), false, NOWHERE),
        ("traced", |cpu| cpu.flags.insert(Rflags::TF), false, NOWHERE),
        (
            "traced on",
            |cpu| {
                set_msr(cpu, msr::FMASK, 0);
                cpu.flags.insert(Rflags::TF);
            },
            false,
            step,
        ),
        ("AC", |cpu| cpu.set_rflags(0x4_0202), false, NOWHERE),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.set_rflags(0x4_0202);
            },
            true,
            NOWHERE,
        ),
        ("something waits", post, true, NOWHERE),
        ("breakpoint on data", |cpu| cpu.dr7 = 0x3_0001, false, NOWHERE),
        ("entry not mapped", |cpu| set_msr(cpu, msr::LSTAR, at::ABSENT), false, Some(fetch_fault(0))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let got = both(vendor).call(what, at::USER_CODE, change);
            assert_eq!(got, (handed, end), "{what}");
        }
    }
}

#[test]
fn system_call_below_cpl_3_is_as_in_the_interpreter() {
    let mut both = both(Vendor::Amd);
    let got = both.repeat("at CPL 0", false, at::USER_CODE, |_| ());
    assert_eq!((got, both.subject.m.cpu.cpl), ((true, NOWHERE), 0));
}

#[test]
fn system_return_that_is_unusual_is_as_in_the_interpreter() {
    let step = Some(Exception::debug(Exception::DEBUG_SINGLE_STEP));
    let cases: [Case; 13] = [
        ("SCE off", |cpu| cpu.efer.remove(Efer::SCE), true, Some(Exception::UD)),
        ("another STAR", |cpu| set_msr(cpu, msr::STAR, STAR ^ 0x48 << 48), false, NOWHERE),
        ("trap behind it", |cpu| cpu.regs[11] |= 0x100, true, step),
        ("AC", |cpu| cpu.regs[11] |= 0x4_0000, true, NOWHERE),
        (
            "alignment checked",
            |cpu| {
                cpu.cr0.insert(Cr0::AM);
                cpu.regs[11] |= 0x4_0000;
                cpu.regs[6] += 1;
            },
            true,
            Some(Exception::with_code(ringfence_x86::Vector::AlignmentCheck, 0)),
        ),
        ("NT and IOPL", |cpu| cpu.regs[11] |= 0x7000, false, NOWHERE),
        ("flags that are none", |cpu| cpu.regs[11] = !0x4_0100, false, NOWHERE),
        ("no flags", |cpu| cpu.regs[11] = 0, false, NOWHERE),
        ("something waits", post, true, NOWHERE),
        ("target not mapped", |cpu| cpu.regs[1] = at::ABSENT, false, Some(fetch_fault(4))),
        ("target of the kernel's", |cpu| cpu.regs[1] = ENTRY, false, Some(fetch_fault(5))),
        ("data of the kernel's", |cpu| cpu.regs[6] = at::KERNEL_ONLY, false, Some(page_fault(5))),
        ("just canonical", |cpu| cpu.regs[1] = (1 << 47) - 2, false, Some(fetch_fault(4))),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for (what, change, handed, end) in cases {
            let mut both = both(vendor);
            // The kernel's code is known, to the kernel.
            assert_eq!(both.call("call", at::USER_CODE, |_| ()), (false, NOWHERE));
            assert_eq!(both.back(what, change), (handed, end), "{what}");
        }
        let got = both(vendor).back("not canonical", |cpu| cpu.regs[1] = 1 << 47);
        assert_eq!(got, (true, Some(Exception::GP0)));
        let mut at_user = both(vendor);
        assert_eq!(
            at_user.repeat("at CPL 3", true, at::USER_CODE + 0x800, |_| ()),
            (true, Some(Exception::GP0))
        );
    }
}

fn page_fault(code: u16) -> Exception {
    Exception::with_code(ringfence_x86::Vector::PageFault, code)
}

/// With NX, a fetch says so.
fn fetch_fault(code: u16) -> Exception {
    page_fault(code | 16)
}

#[test]
fn system_call_under_smap_may_access_what_ac_allows() {
    // The kernel's stack is the program's here.
    for (what, fmask, flags, end) in [
        ("masked", 0x4_7700, 0x4_0202, Some(page_fault(3))),
        ("not set", 0x700, 0x202, Some(page_fault(3))),
        ("kept", 0x700, 0x4_0202, NOWHERE),
    ] {
        let mut both = both(Vendor::Amd);
        both.each(|cpu| {
            cpu.cr4.insert(Cr4::SMAP);
            cpu.tlb.flush();
            set_msr(cpu, msr::FMASK, fmask);
            // The look's push comes first: a handler's call would look for the stack anew.
            set_msr(cpu, msr::LSTAR, ENTRY + 6);
        });
        for _ in 0..6 {
            both.start(true, PUSHING);
            both.each(|cpu| {
                cpu.set_rflags(flags);
            });
            assert_eq!(both.go(what).1, end, "{what}");
        }
        assert_eq!(both.handed(), 0, "{what}");
    }
}

#[test]
fn return_behind_a_change_of_privilege_asks_what_may_be_fetched() {
    // A call of the kernel's is not returned from; the program behind SYSRET returns to where it was made.
    let mut both = both(Vendor::Amd);
    let call = ENTRY + 0x300;
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        put(call, &[0xe8, 0, 0, 0, 0, 0x48, 0x0f, 0x07]); // call to the next; sysretq
        put(at::USER_CODE + 0x400, &[0xc3]);
    });
    for _ in 0..6 {
        both.start(false, call);
        both.each(|cpu| (cpu.regs[1], cpu.regs[11]) = (at::USER_CODE + 0x400, 2));
        assert_eq!(both.go("return to the kernel's"), (false, Some(fetch_fault(5))));
        assert_eq!(both.subject.m.cpu.rip(), call + 5);
    }
}

#[test]
fn random_system_calls_and_returns_run_as_in_the_interpreter() {
    for (vendor, seed) in [(Vendor::Intel, seed(21)), (Vendor::Amd, seed(22))] {
        let mut both = both(vendor);
        let (mut direct, mut features) = (0, 0xff);
        for round in 0..count(2000) {
            let mut random = Random::new(seed << 32 | round);
            let random = &mut random;
            let user = random.chance(60);
            let at = if random.chance(80) == user { at::USER_CODE } else { BACK };
            let at = if random.chance(10) { CROSSING } else { at };
            both.start(user, at);
            let flags = random.bits() & Rflags::WRITABLE.bits() & !Rflags::VM.bits();
            let flags = if random.chance(80) { flags & !0x5_0100 } else { flags };
            let star = if random.chance(80) { STAR } else { random.bits() };
            let fmask = if random.chance(50) { 0x4_7700 } else { random.bits() & 0xffff_ffff };
            let entry = ENTRY + 3 * random.below(2);
            // A change of these forgets all translations.
            if random.chance(10) {
                features = random.bits();
            }
            let address = |random: &mut Random| {
                let page = random.pick(&[at::DATA, at::DATA, at::KERNEL_ONLY, at::ABSENT, at::USER_STACK]);
                page + 0xe00 + random.below(0x210)
            };
            let (from, to) = (address(random), address(random));
            let target = match random.below(10) {
                0 => random.bits(),
                1 => ENTRY,
                2 => (1 << 47) - random.below(3),
                _ => at::USER_CODE + 2,
            };
            let other = random.bits();
            let r11 = if random.chance(80) { other & !0x4_0100 } else { other };
            both.each(|cpu| {
                for (number, value) in [(msr::STAR, star), (msr::FMASK, fmask), (msr::LSTAR, entry)] {
                    set_msr(cpu, number, value);
                }
                cpu.cr0.set(Cr0::AM, features & 1 != 0);
                let before = cpu.cr4;
                cpu.cr4.set(Cr4::SMAP, features & 2 != 0);
                cpu.cr4.set(Cr4::SMEP, features & 4 != 0);
                if cpu.cr4 != before {
                    cpu.tlb.flush();
                }
                cpu.efer.set(Efer::SCE, features & 0x78 != 0);
                cpu.set_rflags(flags);
                (cpu.regs[1], cpu.regs[11], cpu.regs[3]) = (target, r11, other);
                (cpu.regs[6], cpu.regs[7]) = (from, to);
                cpu.update_mode();
            });
            direct += u64::from(!both.go(&format!("seed {seed}, round {round}")).0);
        }
        assert!(direct > count(2000) / 2, "{direct}");
    }
}
