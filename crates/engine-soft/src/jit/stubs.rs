//! The fixed code at the start of the arena: how translated code is entered and left, and what all regions share.

use std::mem::offset_of;

use super::asm::{Assembler, Imm, RAX, RDI, RSI, RSP, Reg, Two, at, cc};
use super::registers::{A, B, C, PIN, resident};
use super::state::field;
use crate::interp::cpu::Cpu;

/// log2 of the number of jump targets remembered.
pub(super) const JUMP_BITS: u32 = 12;
/// log2 of the size of [`Jump`].
const JUMP_SHIFT: u8 = 5;

/// Where a linear address leads, under which circumstances.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Jump {
    /// The address.
    pub(super) linear: u64,
    /// See `Cpu::jump_context`.
    pub(super) context: u64,
    /// Host address of the code.
    pub(super) host: u64,
    /// Index of the region.
    pub(super) region: u64,
}

/// No target: its context is none that a vCPU has.
pub(super) const NO_JUMP: Jump = Jump { linear: 0, context: 0, host: 0, region: 0 };

const _: () = assert!(size_of::<Jump>() == 1 << JUMP_SHIFT);

/// The entry of the table for an address; the code below computes the same.
pub(super) fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & ((1 << JUMP_BITS) - 1)
}

/// Why translated code was left.
pub(super) mod reason {
    /// Not left: go on.
    pub(in super::super) const CONTINUE: u64 = 0;
    /// An instruction asked to leave; RIP is behind it.
    pub(in super::super) const LEAVE: u64 = 1;
    /// An instruction faulted.
    pub(in super::super) const FAULT: u64 = 2;
    /// The budget does not cover the next region.
    pub(in super::super) const BUDGET: u64 = 3;
    /// The target of a jump is not known.
    pub(in super::super) const LOOKUP: u64 = 4;
    /// A direct branch in a page has not been linked yet.
    pub(in super::super) const LINK: u64 = 5;
}

/// Offsets of the fixed code in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stubs {
    /// Called from Rust: `extern "sysv64" fn(pin) -> reason`.
    pub(super) enter: usize,
    /// Called with an operation in [`A`] and its mark in [`B`]: runs its handler.
    pub(super) interpret: usize,
    /// Jumped to with a linear address in [`A`].
    pub(super) dispatch: usize,
    /// Jumped to with RIP stored.
    pub(super) budget: usize,
    /// As above.
    pub(super) link: usize,
    /// Length of all.
    pub(super) length: usize,
}

/// The registers that a System V function leaves as it found them, RSP aside.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

fn push(a: &mut Assembler, reg: u8) {
    a.bytes(if reg >= 8 { &[0x41] } else { &[] });
    a.bytes(&[0x50 | reg & 7]);
}

fn pop(a: &mut Assembler, reg: u8) {
    a.bytes(if reg >= 8 { &[0x41] } else { &[] });
    a.bytes(&[0x58 | reg & 7]);
}

fn store_registers(a: &mut Assembler) {
    for (number, reg) in resident() {
        a.rm(Two::Store, reg, field::register(number));
    }
}

fn load_registers(a: &mut Assembler) {
    for (number, reg) in resident() {
        a.rm(Two::Load, reg, field::register(number));
    }
}

/// Looks for the linear address in [`A`] among the jump targets: [`B`] is its entry where the branches returned are not
/// taken. Uses [`C`].
pub(super) fn look_up(a: &mut Assembler) -> [usize; 2] {
    a.rr32(Two::Load, B, A);
    a.shr32(B, 12);
    a.rr32(Two::Xor, B, A);
    a.imm(Imm::And, false, B, (1 << JUMP_BITS) - 1);
    a.shl32(B, JUMP_SHIFT);
    a.rm(Two::Add, B, field::jumps());
    a.rm(Two::Cmp, A, at(B, 0));
    let other_address = a.jcc(cc::NE);
    a.rm(Two::Load, C, field::context());
    a.rm(Two::Cmp, C, at(B, 8));
    [other_address, a.jcc(cc::NE)]
}

/// Goes to the target that [`look_up`] found for the address still in [`A`].
pub(super) fn go(a: &mut Assembler) {
    a.imm(Imm::And, true, A, -0x1000);
    a.rm(Two::Store, A, field::page());
    a.jmp_mem(at(B, 16));
}

/// The fixed code.
pub(super) fn emit() -> (Vec<u8>, Stubs) {
    let mut a = Assembler::default();
    let enter = a.here();
    for reg in SAVED {
        push(&mut a, reg);
    }
    // The return address and six registers: the stack is now 8 bytes off alignment, so that a stub called from
    // translated code can call a function as it is.
    a.copy(PIN, RDI);
    load_registers(&mut a);
    a.jmp_mem(field::entry());

    let leave = a.here();
    store_registers(&mut a);
    let leave_stored = a.here();
    a.rr32(Two::Load, RAX, A);
    for reg in SAVED.into_iter().rev() {
        pop(&mut a, reg);
    }
    a.bytes(&[0xc3]);

    let exit = |a: &mut Assembler, reason: u64| {
        let start = a.here();
        a.constant(A, reason);
        let site = a.jmp();
        a.patch(site, leave as i64);
        start
    };
    let budget = exit(&mut a, reason::BUDGET);
    let link = exit(&mut a, reason::LINK);

    let dispatch = a.here();
    let missing = look_up(&mut a);
    go(&mut a);
    for site in missing {
        a.bind(site);
    }
    a.rm(Two::Store, A, field::rip());
    exit(&mut a, reason::LOOKUP);

    let interpret = a.here();
    store_registers(&mut a);
    a.rm(Two::Lea, RDI, at(PIN, -(offset_of!(Cpu, regs) as i32)));
    a.copy(RSI, A);
    a.copy(Reg(2), B);
    a.call_mem(field::interpret());
    a.rr32(Two::Test, RAX, RAX);
    let leaves = a.jcc(cc::NE);
    load_registers(&mut a);
    a.bytes(&[0xc3]);
    a.bind(leaves);
    a.rr32(Two::Load, A, RAX);
    a.imm(Imm::Add, true, RSP, 8);
    let site = a.jmp();
    a.patch(site, leave_stored as i64);

    let length = a.here();
    (a.code, Stubs { enter, interpret, dispatch, budget, link, length })
}
