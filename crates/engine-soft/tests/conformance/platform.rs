//! Guests that wait for interrupts of the local APIC and the 8259 pair.

use iced_x86::code_asm::*;
use ringfence_x86::Gpr;

use crate::Case;
use crate::lab::{DATA, Guest, Start};

/// Stores the address behind the wait where the handlers resume.
macro_rules! resume_at {
    ($a:expr, $label:expr) => {{
        $a.lea(r15, ptr($label))?;
        $a.mov(r14, DATA - 8)?;
        $a.mov(qword_ptr(r14), r15)?;
    }};
}

/// x2APIC on, spurious vector 0xff, software-enabled.
fn enable_x2apic(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    write_msr(a, 0x80f, 0x1ff)
}

fn write_msr(a: &mut CodeAssembler, number: u32, value: u32) -> Result<(), iced_x86::IcedError> {
    a.mov(ecx, number)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "self-IPI is held off while interrupts are disabled and comes after STI's shadow",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                enable_x2apic(a)?;
                resume_at!(a, after);
                write_msr(a, 0x83f, 0x50)?;
                a.xor(r8d, r8d)?;
                a.inc(r8d)?;
                a.sti()?;
                a.inc(r8d)?;
                a.inc(r8d)?;
                a.inc(r8d)?;
                a.set_label(&mut after)?;
                a.cli()?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(0x50, 0)]);
            // One instruction before STI and one in its shadow.
            assert_eq!(r.reg(Gpr::R8), 2);
        },
    },
    Case {
        name: "one-shot APIC timer wakes HLT",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                enable_x2apic(a)?;
                resume_at!(a, after);
                write_msr(a, 0x83e, 0b1011)?;
                write_msr(a, 0x832, 0x61)?;
                write_msr(a, 0x838, 5000)?;
                a.sti()?;
                a.hlt()?;
                a.ud2()?;
                a.set_label(&mut after)?;
                a.cli()?;
                a.hlt()
            })
        },
        check: |r| r.halted_with(&[(0x61, 0)]),
    },
    Case {
        name: "TSC deadline interrupts a running loop not before its time",
        guest: || {
            Guest::new(Start::Long, |a| {
                let (mut after, mut spin) = (a.create_label(), a.create_label());
                enable_x2apic(a)?;
                resume_at!(a, after);
                write_msr(a, 0x832, 2 << 17 | 0x62)?;
                a.rdtsc()?;
                a.shl(rdx, 32)?;
                a.or(rax, rdx)?;
                a.mov(r12, rax)?;
                a.add(rax, 100_000)?;
                a.mov(r13, rax)?;
                a.mov(rdx, rax)?;
                a.shr(rdx, 32)?;
                a.mov(ecx, 0x6e0)?;
                a.wrmsr()?;
                a.sti()?;
                a.set_label(&mut spin)?;
                a.jmp(spin)?;
                a.set_label(&mut after)?;
                a.cli()?;
                a.rdtsc()?;
                a.shl(rdx, 32)?;
                a.or(rax, rdx)?;
                a.sub(rax, r13)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(0x62, 0)]);
            assert!((0..1000).contains(&(r.rax() as i64)), "{} ticks late", r.rax() as i64);
        },
    },
    Case {
        name: "higher task priority holds an interrupt back",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                enable_x2apic(a)?;
                resume_at!(a, after);
                a.mov(eax, 6)?;
                a.mov(cr8, rax)?;
                write_msr(a, 0x83f, 0x55)?;
                a.sti()?;
                a.nop()?;
                a.nop()?;
                a.mov(r8d, 1)?;
                a.xor(eax, eax)?;
                a.mov(cr8, rax)?;
                a.nop()?;
                a.mov(r8d, 2)?;
                a.set_label(&mut after)?;
                a.cli()?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(0x55, 0)]);
            assert_eq!(r.reg(Gpr::R8), 1);
        },
    },
    Case {
        name: "counted time repeats exactly",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut again = a.create_label();
                a.rdtsc()?;
                a.mov(r12d, eax)?;
                a.mov(ecx, 1000)?;
                a.set_label(&mut again)?;
                a.dec(ecx)?;
                a.jnz(again)?;
                a.rdtsc()?;
                a.sub(eax, r12d)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            // mov, mov, 1000 times dec and jnz, and the first RDTSC itself.
            assert_eq!(r.rax(), 2003);
        },
    },
];
