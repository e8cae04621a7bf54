//! Guests that change what code addresses mean: the code they then run must be the new one.

use iced_x86::code_asm::*;
use ringfence_x86::Gpr;

use crate::Case;
use crate::lab::{DATA, Guest, PML4, Start};

/// Where the code is called: in the first address space the page [`FIRST`], in the second [`SECOND`].
const CALLED: u64 = 0x4000_0000;
const FIRST: u64 = 0x30_0000;
const SECOND: u64 = FIRST + 0x1000;
/// The second address space's topmost table.
const OTHER_PML4: u64 = 0xa000;
/// What maps [`CALLED`] in each.
const ENTRY: u64 = 0xd000;
const OTHER_ENTRY: u64 = 0xf000;

/// CR3 for each address space: identifiers 0 and 1, translations kept.
const SPACE: u64 = PML4 | 1 << 63;
const OTHER_SPACE: u64 = OTHER_PML4 | 1 | 1 << 63;

const ROUNDS: u64 = 40;
const GLOBAL: u64 = 1 << 8;

type Written = Result<(), iced_x86::IcedError>;

/// A guest that repeats a body with CR4.PCIDE and PGE on, both address spaces in place, and RBX at the code to call, which
/// returns the number of its page in EAX.
fn guest(flags: u64, body: impl FnOnce(&mut CodeAssembler) -> Written) -> Guest {
    let guest = Guest::new(Start::Long, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 17 | 1 << 7)?;
        a.mov(cr4, rax)?;
        a.mov(rbx, CALLED)?;
        a.mov(r12d, ROUNDS as u32)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        body(a)?;
        a.dec(r12d)?;
        a.jnz(top)?;
        a.hlt()
    });
    let table = |at: u64, entry: u64| (at, (entry | 7).to_le_bytes());
    let mut guest = guest.with(FIRST, &[0xb8, 1, 0, 0, 0, 0xc3]).with(SECOND, &[0xb8, 2, 0, 0, 0, 0xc3]);
    for (at, bytes) in [
        table(0x7008, 0xc000),
        table(0xc000, ENTRY),
        table(ENTRY, FIRST | flags),
        table(OTHER_PML4, 0xb000),
        table(0xb000, 0x8000),
        table(0xb008, 0xe000),
        table(0xe000, OTHER_ENTRY),
        table(OTHER_ENTRY, SECOND | flags),
    ] {
        guest = guest.with(at, &bytes);
    }
    guest
}

fn switch(a: &mut CodeAssembler, space: u64) -> Written {
    a.mov(rax, space)?;
    a.mov(cr3, rax)
}

/// Maps the other page at [`CALLED`] by the entry at `entry`.
fn remap(a: &mut CodeAssembler, entry: u64) -> Written {
    a.xor(qword_ptr(entry), (FIRST ^ SECOND) as i32)
}

/// Calls the code and adds what it returns to R8.
fn call(a: &mut CodeAssembler) -> Written {
    a.call(rbx)?;
    a.add(r8, rax)
}

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "two address spaces kept across loads of CR3 each run their own code",
        guest: || {
            guest(0, |a| {
                switch(a, SPACE)?;
                call(a)?;
                switch(a, OTHER_SPACE)?;
                a.call(rbx)?;
                a.add(r9, rax)
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!((r.reg(Gpr::R8), r.reg(Gpr::R9)), (ROUNDS, 2 * ROUNDS));
        },
    },
    Case {
        name: "code page remapped and flushed by INVLPG is the new one",
        guest: || {
            guest(0, |a| {
                call(a)?;
                remap(a, ENTRY)?;
                a.invlpg(byte_ptr(rbx))
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.reg(Gpr::R8), 3 * ROUNDS / 2);
        },
    },
    Case {
        name: "code page remapped and flushed by a load of CR3 is the new one",
        guest: || {
            guest(0, |a| {
                call(a)?;
                remap(a, ENTRY)?;
                switch(a, PML4)
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.reg(Gpr::R8), 3 * ROUNDS / 2);
        },
    },
    Case {
        name: "global code page remapped and flushed in another address space is the new one in both",
        guest: || {
            guest(GLOBAL, |a| {
                // Both address spaces map what the first one's tables say.
                a.mov(rax, qword_ptr(0x7008))?;
                a.mov(qword_ptr(0xb008), rax)?;
                call(a)?;
                switch(a, OTHER_SPACE)?;
                call(a)?;
                remap(a, ENTRY)?;
                a.invlpg(byte_ptr(rbx))?;
                call(a)?;
                switch(a, SPACE)?;
                call(a)
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.reg(Gpr::R8), 6 * ROUNDS);
        },
    },
    Case {
        name: "code page of another address space remapped and flushed by every type of INVPCID is the new one there",
        guest: || {
            guest(0, |a| {
                a.mov(qword_ptr(DATA), 1)?;
                a.mov(qword_ptr(DATA + 8), rbx)?;
                switch(a, OTHER_SPACE)?;
                call(a)?;
                switch(a, SPACE)?;
                remap(a, OTHER_ENTRY)?;
                // Types 0 to 3 in turn.
                a.mov(ecx, r12d)?;
                a.and(ecx, 3)?;
                a.invpcid(rcx, xmmword_ptr(DATA))
            })
        },
        check: |r| {
            r.halted_with(&[]);
            assert_eq!(r.reg(Gpr::R8), 3 * ROUNDS / 2);
        },
    },
];
