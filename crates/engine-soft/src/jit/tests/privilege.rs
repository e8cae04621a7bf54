//! Changes of privilege, translated and interpreted: SYSCALL, SYSENTER, INT n, SYSRET and IRETQ; and POPF, which depends on it.

mod calls;
mod compat;
mod exceptions;
mod flags;
mod gates;
mod interrupts;
mod random;
mod returns;

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
    /// Most instructions at a time.
    limit: u64,
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
        Self { reference, subject, jit, limit: 40 }
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

    /// How often translated code has left a change of privilege, or POPF, to its handler.
    fn handed(&self) -> u64 {
        let forms = super::super::handed(&self.subject.m.cpu);
        let changes =
            |form: &str| ["Sys", "Iret", "Popf", "Int_imm8"].iter().any(|start| form.starts_with(start));
        forms.iter().filter(|(form, _)| changes(form)).map(|(_, count)| count).sum()
    }

    /// Executes an instruction and what it leads to, until an exception; whether translated code called its handler, and
    /// the exception. Both vCPUs must be in the same state wherever the translator stops.
    fn go(&mut self, what: &str) -> (bool, Option<Exception>) {
        let handed = self.handed();
        let mut end = None;
        for _ in 0..20 {
            let before = self.subject.m.cpu.retired;
            let outcome = run(&mut self.subject.m, Some(&mut self.jit), self.limit);
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
            assert_eq!((a.code_size, a.stack_mask), (b.code_size, b.stack_mask), "{what}");
            // 64-bit code does not ask what CS and SS span.
            assert!(a.is_64bit() || a.spans == b.spans, "{what}");
            assert_eq!((a.retired, a.bases, a.nmi_masked), (b.retired, b.bases, b.nmi_masked), "{what}");
            if let Err(exception) = outcome {
                assert_eq!(a.fault_address, b.fault_address, "{what}");
                end = Some(exception);
                break;
            }
        }
        for page in
            [at::GDT, at::USER_STACK - 0x1000, at::DATA, at::KERNEL_ONLY, at::STACK - 0x1000, at::STACK]
        {
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

fn page_fault(code: u16) -> Exception {
    Exception::with_code(ringfence_x86::Vector::PageFault, code)
}

/// With NX, a fetch says so.
fn fetch_fault(code: u16) -> Exception {
    page_fault(code | 16)
}
