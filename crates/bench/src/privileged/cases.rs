//! What is measured.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_x86::msr;

use super::{INTERRUPT, KERNEL_CODE, KERNEL_DATA, OPEN, PAGES, SHARED_PAGE, TABLES, WINDOW, WINDOW_PAGES};

pub(super) type Code = Result<(), IcedError>;

/// Something to be measured.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) user: bool,
    /// What is done each time. RBX, RBP and R12 to R15 are the loop's.
    pub(super) once: fn(&mut CodeAssembler) -> Code,
    /// What SYSCALL leads to.
    pub(super) entry: fn(&mut CodeAssembler) -> Code,
    /// What all vectors but that of HLT in a program lead to.
    pub(super) handler: fn(&mut CodeAssembler) -> Code,
}

fn nothing(_: &mut CodeAssembler) -> Code {
    Ok(())
}

fn sysret(a: &mut CodeAssembler) -> Code {
    a.sysretq()
}

/// Opens the page of the window that CR2 names, and drops the error code.
fn open_page(a: &mut CodeAssembler) -> Code {
    a.push(rax)?;
    a.push(rdx)?;
    a.mov(rax, cr2)?;
    a.sub(rax, WINDOW as i32)?;
    a.shr(rax, 12)?;
    a.mov(rdx, SHARED_PAGE | OPEN)?;
    a.mov(qword_ptr(rax * 8 + PAGES as i32), rdx)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.iretq()
}

/// Closes all pages of the window.
fn close_pages(a: &mut CodeAssembler) -> Code {
    a.mov(r10, rcx)?;
    a.xor(eax, eax)?;
    a.mov(edi, PAGES as u32)?;
    a.mov(ecx, WINDOW_PAGES as u32)?;
    a.rep().stosq()?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.mov(rcx, r10)?;
    a.sysretq()
}

/// Steps over an instruction of two bytes.
fn step_over(a: &mut CodeAssembler) -> Code {
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()
}

/// Ends an interrupt.
fn end_interrupt(a: &mut CodeAssembler) -> Code {
    a.mov(ecx, X2APIC_EOI)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.iretq()
}

/// Of APIC_BASE: enabled, in x2APIC mode (SDM 3A 10.12.1).
pub(super) const X2APIC_ENABLED: i32 = 0xc00;
const X2APIC_EOI: u32 = 0x80b;
pub(super) const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_SELF_IPI: u32 = 0x83f;

const NOTHING: Case = Case { name: "nothing", user: false, once: nothing, entry: nothing, handler: nothing };

/// All of them.
pub(super) fn cases() -> Vec<Case> {
    vec![
        Case { name: "RDTSC", once: |a| a.rdtsc(), ..NOTHING },
        Case { name: "RDTSCP", once: |a| a.rdtscp(), ..NOTHING },
        Case { name: "SYSCALL and SYSRET", user: true, once: |a| a.syscall(), entry: sysret, ..NOTHING },
        Case {
            name: "IRETQ to CPL 0",
            once: |a| {
                let mut behind = a.create_label();
                a.mov(rax, rsp)?;
                a.push(i32::from(KERNEL_DATA))?;
                a.push(rax)?;
                a.push(2)?;
                a.push(i32::from(KERNEL_CODE))?;
                a.lea(rax, qword_ptr(behind))?;
                a.push(rax)?;
                a.iretq()?;
                a.set_label(&mut behind)
            },
            ..NOTHING
        },
        Case { name: "INT and IRETQ", user: true, once: |a| a.int(0x30), handler: |a| a.iretq(), ..NOTHING },
        Case { name: "#UD and IRETQ", user: true, once: |a| a.ud2(), handler: step_over, ..NOTHING },
        Case { name: "#UD and IRETQ at CPL 0", once: |a| a.ud2(), handler: step_over, ..NOTHING },
        Case {
            name: "page fault and IRETQ",
            user: true,
            once: |a| {
                let mut there = a.create_label();
                a.mov(byte_ptr(r12 + WINDOW as i32), al)?;
                a.add(r12d, 0x1000)?;
                a.cmp(r12d, (WINDOW_PAGES << 12) as i32)?;
                a.jb(there)?;
                a.xor(r12d, r12d)?;
                a.syscall()?;
                a.set_label(&mut there)?;
                a.nop()
            },
            entry: close_pages,
            handler: open_page,
        },
        Case {
            name: "interrupt to itself",
            once: |a| {
                a.mov(ecx, X2APIC_SELF_IPI)?;
                a.mov(eax, u32::from(INTERRUPT))?;
                a.xor(edx, edx)?;
                a.wrmsr()
            },
            handler: end_interrupt,
            ..NOTHING
        },
        Case {
            name: "CPUID",
            once: |a| {
                a.mov(r13, rbx)?;
                a.xor(eax, eax)?;
                a.xor(ecx, ecx)?;
                a.cpuid()?;
                a.mov(rbx, r13)
            },
            ..NOTHING
        },
        Case { name: "INVLPG", once: |a| a.invlpg(ptr(WINDOW)), ..NOTHING },
        Case {
            name: "CR3 written",
            once: |a| {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)
            },
            ..NOTHING
        },
        Case {
            name: "CR3 written, another PCID kept",
            once: |a| {
                a.xor(r12d, 1)?;
                a.mov(rax, 1_u64 << 63 | TABLES)?;
                a.or(rax, r12)?;
                a.mov(cr3, rax)?;
                a.mov(edx, dword_ptr(SHARED_PAGE))
            },
            ..NOTHING
        },
        Case {
            name: "RDMSR",
            once: |a| {
                a.mov(ecx, msr::KERNEL_GS_BASE)?;
                a.rdmsr()
            },
            ..NOTHING
        },
        Case {
            name: "WRMSR",
            once: |a| {
                a.mov(ecx, msr::KERNEL_GS_BASE)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.wrmsr()
            },
            ..NOTHING
        },
    ]
}
