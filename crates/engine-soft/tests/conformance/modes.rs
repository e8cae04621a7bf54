//! Guests in real and protected mode, and the ways between the modes.

use iced_x86::code_asm::*;
use ringfence_x86::Gpr;

use crate::Case;
use crate::lab::{CODE, CODE_32, DATA, Guest, KERNEL_CODE, KERNEL_DATA, PML4, Start};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "real mode: segments shift by four, 16-bit arithmetic wraps",
        guest: || {
            Guest::new(Start::Real, |a| {
                a.mov(ax, 0x1234)?;
                a.mov(es, ax)?;
                a.mov(di, 0x0010)?;
                a.mov(word_ptr(di).es(), 0xbeef_u32)?;
                a.mov(bx, 0xffff_u32 as i32)?;
                a.inc(bx)?;
                a.hlt()
            })
        },
        check: |r| {
            assert_eq!(r.exit, ringfence_engine::VmExit::HaltedForGood);
            assert_eq!(r.word(0x1_2350) & 0xffff, 0xbeef);
            assert_eq!(r.reg(Gpr::Rbx) & 0xffff, 0);
        },
    },
    Case {
        name: "real mode: INT goes through the vector table and IRET returns",
        guest: || {
            // Vector 0x40 at 0:100h, pointing to the handler at CODE + 0x100.
            let segment = (CODE >> 4) as u16;
            let vector = [0x00, 0x01, segment as u8, (segment >> 8) as u8];
            // mov cx, 77h ; iret
            Guest::new(Start::Real, |a| {
                a.int(0x40)?;
                a.mov(dx, 0x88)?;
                a.hlt()
            })
            .with(0x40 * 4, &vector)
            .with(CODE + 0x100, &[0xb9, 0x77, 0x00, 0xcf])
        },
        check: |r| {
            assert_eq!(r.exit, ringfence_engine::VmExit::HaltedForGood);
            assert_eq!((r.reg(Gpr::Rcx) & 0xffff, r.reg(Gpr::Rdx) & 0xffff), (0x77, 0x88));
        },
    },
    Case {
        name: "protected mode: decimal adjustment and pusha",
        guest: || {
            Guest::new(Start::Protected, |a| {
                a.mov(al, 0x79)?;
                a.add(al, 0x35)?;
                a.daa()?;
                a.setc(bl)?;
                a.mov(ecx, 0x1111)?;
                a.pushad()?;
                a.xor(ecx, ecx)?;
                a.popad()?;
                a.hlt()
            })
        },
        check: |r| {
            assert_eq!(r.exit, ringfence_engine::VmExit::HaltedForGood);
            assert_eq!((r.rax() & 0xff, r.reg(Gpr::Rbx) & 0xff, r.reg(Gpr::Rcx)), (0x14, 1, 0x1111));
        },
    },
    Case {
        name: "from real mode through protected mode to 64-bit code",
        guest: || {
            // 16-bit: load GDT, set PE, far jump to 32-bit code at CODE + 0x100.
            let gdt_pointer = [0xff, 0x00, 0x00, 0x30, 0x00, 0x00];
            let mut protected = CodeAssembler::new(32).unwrap();
            let write = |a: &mut CodeAssembler| -> Result<(), iced_x86::IcedError> {
                a.mov(eax, u32::from(KERNEL_DATA))?;
                a.mov(ds, eax)?;
                a.mov(ss, eax)?;
                a.mov(eax, cr4)?;
                a.or(eax, 0x20)?;
                a.mov(cr4, eax)?;
                a.mov(eax, PML4 as u32)?;
                a.mov(cr3, eax)?;
                a.mov(ecx, 0xc000_0080_u32)?;
                a.rdmsr()?;
                a.or(eax, 0x100)?;
                a.wrmsr()?;
                a.mov(eax, cr0)?;
                a.or(eax, 0x8000_0000_u32 as i32)?;
                a.mov(cr0, eax)?;
                // jmp KERNEL_CODE:CODE + 0x200
                a.db(&[0xea, 0x00, 0x02, 0x01, 0x00, KERNEL_CODE as u8, 0x00])
            };
            write(&mut protected).unwrap();
            let mut long = CodeAssembler::new(64).unwrap();
            long.mov(rax, 0x1234_5678_9abc_def0_u64).unwrap();
            long.hlt().unwrap();
            Guest::new(Start::Real, |a| {
                // lgdt cs:[0x300] (data just behind the code)
                a.db(&[0x2e, 0x0f, 0x01, 0x16, 0x00, 0x03])?;
                a.mov(eax, cr0)?;
                a.or(al, 1)?;
                a.mov(cr0, eax)?;
                // jmp dword CODE_32:CODE + 0x100
                a.db(&[0x66, 0xea, 0x00, 0x01, 0x01, 0x00, CODE_32 as u8, 0x00])
            })
            .with(CODE + 0x300, &gdt_pointer)
            .with(CODE + 0x100, &protected.assemble(CODE + 0x100).unwrap())
            .with(CODE + 0x200, &long.assemble(CODE + 0x200).unwrap())
        },
        check: |r| {
            assert_eq!(r.exit, ringfence_engine::VmExit::HaltedForGood, "{:x?}", r.state.rip);
            assert_eq!(r.rax(), 0x1234_5678_9abc_def0);
            assert_eq!(r.state.efer & 0x500, 0x500);
        },
    },
    Case {
        name: "protected mode: store beyond a segment's limit does not happen",
        guest: || {
            Guest::new(Start::Protected, |a| {
                a.mov(dword_ptr(0x3000 + 8 * 8), 0x0000_0fff)?;
                a.mov(dword_ptr(0x3000 + 8 * 8 + 4), 0x0040_9310)?;
                a.mov(ax, 0x40)?;
                a.mov(es, ax)?;
                a.mov(byte_ptr(0xfff).es(), 0x7e)?;
                a.mov(byte_ptr(0x1000).es(), 0x7f)?;
                a.hlt()
            })
        },
        check: |r| {
            // There is no 32-bit IDT: the fault ends in a shutdown, and nothing was written.
            assert!(
                matches!(&r.exit, ringfence_engine::VmExit::Shutdown(why) if why.contains("#GP")),
                "{:?}",
                r.exit
            );
            assert_eq!(r.word(DATA + 0xff8), 0x7e << 56);
            assert_eq!(r.word(DATA + 0x1000), 0);
        },
    },
];
