//! 64-bit guests.

use iced_x86::code_asm::*;
use ringfence_x86::Gpr;

use crate::Case;
use crate::lab::{DATA, Guest, KERNEL_CODE, STACK, Start, USER_CODE, USER_DATA};

const CR2_PAGE: u64 = 0x4000_0000;

/// The handler resumes at the label's address, which the guest itself stores.
macro_rules! resume_at {
    ($a:expr, $label:expr) => {{
        $a.lea(r15, ptr($label))?;
        $a.mov(r14, DATA - 8)?;
        $a.mov(qword_ptr(r14), r15)?;
    }};
}

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "division by zero reports #DE at the instruction",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                resume_at!(a, after);
                a.xor(ecx, ecx)?;
                a.mov(eax, 7)?;
                a.div(ecx)?;
                a.set_label(&mut after)?;
                a.mov(ebx, 0x55)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(0, 0)]);
            assert_eq!((r.rax(), r.reg(Gpr::Rbx)), (7, 0x55));
        },
    },
    Case {
        name: "page fault pushes the error code and loads CR2",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                resume_at!(a, after);
                a.mov(rax, CR2_PAGE + 0x123)?;
                a.mov(qword_ptr(rax), rax)?;
                a.set_label(&mut after)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(14, 2)]);
            assert_eq!(r.log[0].cr2, CR2_PAGE + 0x123);
        },
    },
    Case {
        name: "push that faults leaves the stack pointer alone",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                resume_at!(a, after);
                a.mov(rdi, rsp)?;
                a.mov(rax, CR2_PAGE)?;
                a.push(qword_ptr(rax))?;
                a.set_label(&mut after)?;
                a.sub(rdi, rsp)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(14, 0)]);
            assert_eq!(r.reg(Gpr::Rdi), 0);
        },
    },
    Case {
        name: "non-canonical access is #GP, on the stack #SS",
        guest: || {
            Guest::new(Start::Long, |a| {
                let (mut second, mut after) = (a.create_label(), a.create_label());
                a.mov(rax, 0x8000_0000_0000_u64)?;
                resume_at!(a, second);
                a.mov(cl, byte_ptr(rax))?;
                a.set_label(&mut second)?;
                resume_at!(a, after);
                a.mov(rbp, rax)?;
                a.mov(cl, byte_ptr(rbp))?;
                a.set_label(&mut after)?;
                a.hlt()
            })
        },
        check: |r| r.halted_with(&[(13, 0), (12, 0)]),
    },
    Case {
        name: "undefined instruction and breakpoint",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                resume_at!(a, after);
                a.ud2()?;
                a.set_label(&mut after)?;
                let mut end = a.create_label();
                resume_at!(a, end);
                a.int3()?;
                a.nop()?;
                a.set_label(&mut end)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(6, 0), (3, 0)]);
            // A breakpoint is a trap: the address is that behind it.
            let code = r.word(r.log[1].rip - 1) & 0xff;
            assert_eq!(code, 0xcc);
        },
    },
    Case {
        name: "system call enters the kernel and comes back with flags masked",
        guest: || {
            Guest::new(Start::Long, |a| {
                let (mut user, mut kernel) = (a.create_label(), a.create_label());
                // STAR: kernel 08/10, user 1b/23; LSTAR; FMASK clears CF.
                a.mov(ecx, 0xc000_0081_u32)?;
                a.xor(eax, eax)?;
                a.mov(edx, u32::from(KERNEL_CODE) | 0x13 << 16)?;
                a.wrmsr()?;
                a.mov(ecx, 0xc000_0082_u32)?;
                a.lea(rax, ptr(kernel))?;
                a.xor(edx, edx)?;
                a.wrmsr()?;
                a.mov(ecx, 0xc000_0084_u32)?;
                a.mov(eax, 1)?;
                a.wrmsr()?;
                // To ring 3 by IRET.
                a.push(i32::from(USER_DATA))?;
                a.push(STACK as i32 - 0x1000)?;
                a.push(0x3)?;
                a.push(i32::from(USER_CODE))?;
                a.lea(rax, ptr(user))?;
                a.push(rax)?;
                a.iretq()?;
                a.set_label(&mut user)?;
                a.mov(ebx, cs)?;
                a.stc()?;
                a.syscall()?;
                // Back in ring 3, with the caller's flags.
                a.setc(dl)?;
                a.mov(esi, cs)?;
                a.int3()?;
                a.hlt()?;
                a.set_label(&mut kernel)?;
                a.setc(dh)?;
                a.mov(edi, cs)?;
                a.mov(r12d, ss)?;
                a.sysretq()
            })
        },
        check: |r| {
            // INT3 from ring 3 is not allowed by a DPL 0 gate: #GP with the gate's error code.
            r.halted_with(&[(13, 3 << 3 | 2)]);
            assert_eq!((r.reg(Gpr::Rbx), r.reg(Gpr::Rdi), r.reg(Gpr::Rsi)), (0x23, 8, 0x23));
            assert_eq!((r.reg(Gpr::R12), r.reg(Gpr::Rdx) & 0xffff), (0x10, 0x0001));
        },
    },
    Case {
        name: "user code may not touch supervisor pages nor run privileged instructions",
        guest: || {
            Guest::new(Start::Long, |a| {
                let (mut user, mut next) = (a.create_label(), a.create_label());
                // The second 2 MiB page of DATA's gigabyte becomes a supervisor page.
                a.mov(eax, 0x8000 + 8 * 4)?;
                a.and(qword_ptr(rax), !4)?;
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
                a.push(i32::from(USER_DATA))?;
                a.push(STACK as i32 - 0x1000)?;
                a.push(2)?;
                a.push(i32::from(USER_CODE))?;
                a.lea(rax, ptr(user))?;
                a.push(rax)?;
                a.iretq()?;
                a.set_label(&mut user)?;
                resume_at!(a, next);
                a.mov(eax, 0x80_0000)?;
                a.mov(eax, dword_ptr(rax))?;
                a.set_label(&mut next)?;
                a.mov(eax, DATA as u32 - 8)?;
                a.mov(qword_ptr(rax), 0)?;
                a.cli()?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(14, 5), (13, 0)]);
            assert_eq!(r.log[0].cr2, 0x80_0000);
        },
    },
    Case {
        name: "double fault after a missing gate, triple fault without a handler",
        guest: || {
            Guest::new(Start::Long, |a| {
                // An IDT of zero length: every delivery fails.
                a.mov(eax, DATA as u32)?;
                a.mov(qword_ptr(rax), 0)?;
                a.mov(qword_ptr(rax + 8), 0)?;
                a.lidt(tbyte_ptr(rax))?;
                a.ud2()
            })
        },
        check: |r| {
            assert!(
                matches!(&r.exit, ringfence_engine::VmExit::Shutdown(why) if why.contains("#UD")),
                "{:?}",
                r.exit
            );
        },
    },
    Case {
        name: "code that rewrites itself runs the new bytes at once",
        guest: || {
            Guest::new(Start::Long, |a| {
                let (mut patched, mut again) = (a.create_label(), a.create_label());
                a.mov(ecx, 3)?;
                a.xor(eax, eax)?;
                a.lea(rbx, ptr(patched))?;
                a.set_label(&mut again)?;
                a.inc(byte_ptr(rbx + 1))?;
                a.set_label(&mut patched)?;
                // add al, imm8: the immediate is incremented before each round.
                a.db(&[0x04, 0x00])?;
                a.dec(ecx)?;
                a.jnz(again)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.rax(), 1 + 2 + 3);
        },
    },
    Case {
        name: "the same code through two mappings follows its own address",
        guest: || {
            let code = [0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xc3];
            Guest::new(Start::Long, |a| {
                // Linear 1 GiB maps to physical 0 too.
                a.mov(eax, 0x7008)?;
                a.mov(qword_ptr(rax), 0x8007)?;
                a.mov(ebx, DATA as u32)?;
                a.call(rbx)?;
                a.mov(r12, rax)?;
                a.add(rbx, 0x4000_0000)?;
                a.call(rbx)?;
                a.sub(rax, r12)?;
                a.hlt()
            })
            .with(DATA, &code)
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.rax(), 0x4000_0000);
        },
    },
    Case {
        name: "changed mapping is seen after INVLPG",
        guest: || {
            Guest::new(Start::Long, |a| {
                a.mov(ebx, 0x40_0000)?;
                a.mov(dword_ptr(rbx), 0x1111)?;
                a.mov(ecx, 0x60_0000)?;
                a.mov(dword_ptr(rcx), 0x2222)?;
                a.mov(eax, 0x8000 + 8 * 2)?;
                a.mov(qword_ptr(rax), 0x60_0087)?;
                a.invlpg(byte_ptr(rbx))?;
                a.mov(eax, dword_ptr(rbx))?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.rax(), 0x2222);
        },
    },
    Case {
        name: "vector and x87 results are the host's",
        guest: || {
            Guest::new(Start::Long, |a| {
                a.mov(eax, 3)?;
                a.cvtsi2sd(xmm0, eax)?;
                a.sqrtsd(xmm0, xmm0)?;
                a.movq(rbx, xmm0)?;
                a.mov(ecx, DATA as u32)?;
                a.fninit()?;
                a.fldpi()?;
                a.fstp(qword_ptr(rcx))?;
                a.pcmpeqd(xmm1, xmm1)?;
                a.psrlq(xmm1, 63)?;
                a.paddq(xmm1, xmm1)?;
                a.movq(rdx, xmm1)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.reg(Gpr::Rbx), 3_f64.sqrt().to_bits());
            assert_eq!(r.word(DATA), std::f64::consts::PI.to_bits());
            assert_eq!(r.reg(Gpr::Rdx), 2);
        },
    },
    Case {
        name: "ports reach the bus",
        guest: || {
            Guest::new(Start::Long, |a| {
                a.mov(dx, 0x500)?;
                a.mov(eax, 0x1234_5678)?;
                a.out(dx, eax)?;
                a.in_(eax, dx)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.rax(), 0x1234_5679);
            assert_eq!(r.ports, [(0x500, 0x1234_5678_u32.to_le_bytes().to_vec())]);
        },
    },
    Case {
        name: "unknown MSR is #GP, a KVM clock is announced",
        guest: || {
            Guest::new(Start::Long, |a| {
                let mut after = a.create_label();
                resume_at!(a, after);
                a.mov(ecx, 0x4b56_4dff)?;
                a.rdmsr()?;
                a.set_label(&mut after)?;
                a.mov(eax, 0x4000_0000)?;
                a.cpuid()?;
                a.mov(r8d, ebx)?;
                a.mov(eax, 0x4000_0001)?;
                a.cpuid()?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(13, 0)]);
            assert_eq!(r.reg(Gpr::R8) as u32, u32::from_le_bytes(*b"KVMK"));
            assert_eq!(r.rax() as u32, 1 << 3 | 1 << 6 | 1 << 24);
        },
    },
    Case {
        name: "hypercalls that nobody knows say so, by either instruction",
        guest: || {
            Guest::new(Start::Long, |a| {
                a.mov(eax, 999)?;
                a.vmcall()?;
                a.mov(r8, rax)?;
                a.mov(eax, 999)?;
                a.vmmcall()?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!((r.rax() as i64, r.reg(Gpr::R8) as i64), (-1000, -1000));
        },
    },
    Case {
        name: "single step traps after the instruction behind POPF",
        guest: || {
            Guest::new(Start::Long, |a| {
                a.pushfq()?;
                a.or(qword_ptr(rsp), 0x100)?;
                a.popfq()?;
                a.inc(r8d)?;
                a.inc(r8d)?;
                a.hlt()
            })
        },
        check: |r| {
            r.halted_with(&[(1, 0)]);
            assert_eq!((r.reg(Gpr::R8), r.state.dr6 & 0x4000), (1, 0x4000));
        },
    },
];
