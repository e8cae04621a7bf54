//! The fixed code at the start of the arena: how translated code is entered and left, and what all regions share.
//!
//! While translated code runs, the host's stack holds two words for each call of the guest that has not returned: the
//! host's return address, and above it the guest's. A return of the guest to the address on top is a return of the host.
//! At the bottom are two words that hardly any return of the guest matches.

use std::mem::offset_of;

use super::asm::{Assembler, Imm, Mem, RAX, RDI, RSI, RSP, Reg, Two, at, cc};
use super::compat;
use super::gate;
use super::helper::Site;
use super::interrupt_return;
use super::misses::{self, Around, Misses};
use super::privilege::{self, Ways};
use super::registers::{A, B, BUDGET, C, PIN, STACK, TABLE, resident};
use super::state::field;
use super::unmasked;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::Cpu;
use crate::interp::op::Op;
use crate::mmu::tlb::{DataRow, ENTRIES, FETCH_ENTRIES};
use crate::vector::Quirks;
use crate::vector::pass::{LEVELS, Level, host_has_avx512, offset};

/// log2 of the number of jump targets remembered.
pub(super) const JUMP_BITS: u32 = 15;
/// log2 of the size of [`Jump`] and of an entry of the soft TLB.
const ENTRY_SHIFT: u8 = 4;
/// log2 of the size of a row of the soft TLB for loads and stores: an entry for reads and one for writes.
const ROW_SHIFT: u8 = 5;
const _: () = assert!(size_of::<DataRow>() == 1 << ROW_SHIFT);

/// The code for a guest physical address in a mode.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Jump {
    /// The guest physical address, and the mode: [`CodeAddress::bits`].
    pub(super) code: u64,
    /// The host's address.
    pub(super) host: u64,
}

/// Where an address that some indirect branch went to has its code: a row of a table by linear address.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(super) struct Target {
    /// The linear address.
    linear: u64,
    /// Under which circumstances; see `Cpu::jump_context`. Zero for none.
    context: u64,
    /// The host's address.
    host: u64,
}

/// Targets remembered; a power of two. Bits 4 and up of an address tell its row, so that the functions of a program, which start at
/// multiples of 16, have all rows.
pub(super) const TARGETS: usize = 1 << 13;
/// What turns twice an address into the offset of its row.
const TARGET_MASK: i32 = ((TARGETS - 1) * size_of::<Target>()) as i32;
const _: () = assert!(size_of::<Target>() == 2 << 4);

impl Target {
    /// The fields of the row at [`C`]: linear address, context, host's address.
    fn at_c() -> [Mem; 3] {
        [offset_of!(Target, linear), offset_of!(Target, context), offset_of!(Target, host)]
            .map(|field| at(C, field as i32))
    }

    /// Finds the code for the linear address in [`A`] in the table: its host's address is in [`B`] then, unless one of the branches
    /// returned is taken. Uses [`C`]; changes flags.
    pub(super) fn find(a: &mut Assembler) -> [usize; 2] {
        let [linear, context, host] = Self::at_c();
        Self::row(a);
        a.rm(Two::Cmp, A, linear);
        let other = a.jcc(cc::NE);
        a.rm(Two::Load, B, context);
        a.rm(Two::Cmp, B, field::context());
        let stale = a.jcc(cc::NE);
        a.rm(Two::Load, B, host);
        [other, stale]
    }

    /// Makes its row say that the code for the linear address in [`A`] is at the host's address in [`B`]. Uses [`C`]; changes flags.
    fn remember(a: &mut Assembler) {
        let [linear, context, host] = Self::at_c();
        Self::row(a);
        a.rm(Two::Store, A, linear);
        a.rm(Two::Store, B, host);
        a.push(RAX);
        a.rm(Two::Load, RAX, field::context());
        a.rm(Two::Store, RAX, context);
        a.pop(RAX);
    }

    /// The row for the linear address in [`A`], to [`C`]. Changes flags.
    fn row(a: &mut Assembler) {
        a.rm32(Two::Lea, C, Mem { base: Some(A), index: Some((A, 0)), disp: 0 });
        a.imm(Imm::And, false, C, TARGET_MASK);
        a.rm(Two::Add, C, field::targets());
    }
}

/// No code: no guest has such an address.
pub(super) const NO_JUMP: Jump = Jump { code: u64::MAX, host: 0 };

const _: () = assert!(size_of::<Jump>() == 1 << ENTRY_SHIFT);

/// What selects a pair of rows of the table.
const JUMP_MASK: i32 = (1 << JUMP_BITS) - 2;

/// The first of the two rows for an address; the code below computes the same. With one row, two targets of a loop would
/// take each other's place for ever: some programs left translated code a hundred thousand times a second for it.
pub(super) fn jump_index(address: CodeAddress) -> usize {
    let bits = address.bits();
    (bits ^ bits >> 12) as usize & JUMP_MASK as usize
}

/// Why translated code was left.
pub(super) mod reason {
    /// Not left: go on.
    pub(in super::super) const CONTINUE: u64 = 0;
    /// An instruction asked to leave; RIP is behind it.
    pub(in super::super) const LEAVE: u64 = 1;
    /// An instruction faulted.
    pub(in super::super) const FAULT: u64 = 2;
    /// The budget does not cover the next unit.
    pub(in super::super) const BUDGET: u64 = 3;
    /// The target of a jump is not known.
    pub(in super::super) const LOOKUP: u64 = 4;
    /// A direct branch has not been linked yet.
    pub(in super::super) const LINK: u64 = 5;
    /// Not left: go on at RIP, with no call remembered.
    pub(in super::super) const RESUME: u64 = 6;
    /// The interpreter is to execute what is at RIP.
    pub(in super::super) const INTERPRET: u64 = 7;
    /// The code at RIP is to be translated anew, for where some x87 exception is not masked.
    pub(in super::super) const CAREFUL: u64 = 8;
    /// A power of two above all of them.
    pub(in super::super) const COUNT: usize = 16;
}

/// Offsets of the fixed code in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stubs {
    /// Called from Rust: `extern "sysv64" fn(pin) -> reason`.
    pub(super) enter: usize,
    /// Called with a site in [`A`]: runs its handler.
    pub(super) interpret: usize,
    /// Jumped to with a linear address in [`A`].
    pub(super) dispatch: usize,
    /// Jumped to with the unit's length and offset in [`A`] (see [`pack_unit`]): the budget does not cover it.
    pub(super) budget: usize,
    /// Jumped to with a link in [`A`]: it is not linked yet. RIP is left to Rust.
    pub(super) link: usize,
    /// Jumped to with a return address in [`A`] that is not the one on top, and the site in [`B`]. The stack pointer is where it
    /// is behind the return. One for 64-bit code, one for 32-bit code.
    pub(super) ret: [usize; 2],
    /// Jumped to with the address of the next instruction in [`A`] and the site in [`C`]: SYSCALL.
    pub(super) system_call: usize,
    /// Jumped to with the site in [`C`]: SYSRET to 64-bit code.
    pub(super) system_return: usize,
    /// Jumped to with the site in [`C`]: SYSENTER in 32-bit code.
    pub(super) system_enter: usize,
    /// Jumped to with the site in [`C`]: SYSRET to 32-bit code.
    pub(super) system_return_narrow: usize,
    /// Jumped to with the site in [`C`] and the vector in [`A`], RIP behind the instruction: INT n. One in 64-bit code, one in 32-bit code.
    pub(super) software_interrupt: [usize; 2],
    /// Jumped to with the site in [`C`]: IRETQ.
    pub(super) interrupt_return: usize,
    /// Jumped to with an offset in the page in [`A`]: the interpreter is to execute what is there.
    pub(super) by_interpreter: usize,
    /// Where a thread goes on whose translated code has raised a floating-point exception.
    pub(super) raised: usize,
    /// For what is rarely executed.
    pub(super) misses: Misses,
    /// What the x87 unit records.
    pub(super) quirks: Quirks,
    /// Length of all.
    pub(super) length: usize,
}

/// What the stub for an exceeded budget wants to know: a unit's offset in the page and its length.
pub(super) fn pack_unit(offset: u32, length: u16) -> u64 {
    u64::from(offset & 0xfff | u32::from(length) << 12)
}

/// The registers that a System V function leaves as it found them, RSP aside.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];
/// At the bottom of the guest's calls. Hardly any code is there; a guest that returns to it all the same gets there as to any
/// other address. It is canonical, since a return to one that is not must fault itself.
pub(super) const NOWHERE: u64 = u64::MAX;

/// What translated code has in registers to the vCPU.
pub(super) fn store_registers(a: &mut Assembler) {
    for (number, reg) in resident() {
        a.rm(Two::Store, reg, field::register(number));
    }
    a.rm(Two::Store, BUDGET, field::budget());
}

/// And back, as Rust has left it.
pub(super) fn load_registers(a: &mut Assembler) {
    for (number, reg) in resident() {
        a.rm(Two::Load, reg, field::register(number));
    }
    a.rm(Two::Load, BUDGET, field::budget());
    load_table(a);
}

/// The soft TLB's table to its register; changes no flag.
pub(super) fn load_table(a: &mut Assembler) {
    a.rm(Two::Load, TABLE, field::data_table());
}

/// The offset to [`B`] of the row for the linear address in [`A`], in a table of the soft TLB. Changes flags.
fn row_offset(a: &mut Assembler, rows: usize, shift: u8) {
    // The shift leaves the page number where it is a row's offset.
    a.shifted(B, A, 12 - shift);
    a.imm(Imm::And, false, B, (rows as i32 - 1) << shift);
}

/// Finds the soft TLB's entry for a fetch from the linear address in [`A`]: it is at [`B`] then. Changes flags.
pub(super) fn fetch_entry(a: &mut Assembler) {
    row_offset(a, FETCH_ENTRIES, ENTRY_SHIFT);
    a.rm(Two::Add, B, field::fetch_table());
}

/// Finds the entry for a read or a write at the linear address in [`A`]: where the addresses of the linear page and of the host's are.
/// Uses [`B`]; changes flags.
pub(super) fn data_entry(a: &mut Assembler, write: bool) -> [Mem; 2] {
    row_offset(a, ENTRIES, ROW_SHIFT);
    let entry = i32::from(write) << ENTRY_SHIFT;
    [entry, entry + 8].map(|disp| Mem { base: Some(TABLE), index: Some((B, 0)), disp })
}

/// Makes the page of the address in [`A`] the one whose code runs.
pub(super) fn enter_page(a: &mut Assembler) {
    a.imm(Imm::And, true, A, -0x1000);
    a.rm(Two::Store, A, field::page());
}

/// Called with a linear address in [`A`], which stays: "equal" and the host's address of its code in [`B`] if there is some. Loads
/// [`TABLE`]. Asks the table by linear address, then what fetches there lead to; returns where the latter starts ([`Around::look_further`]).
fn look_up(a: &mut Assembler) -> usize {
    let missing = Target::find(a);
    load_table(a);
    a.ret();

    for site in missing {
        a.bind(site);
    }
    let further = a.here();
    fetch_entry(a);
    a.copy(C, A);
    a.imm(Imm::And, true, C, -0x1000);
    a.rm(Two::Cmp, C, at(B, 0));
    let unknown = a.jcc(cc::NE);
    a.rm(Two::Load, B, at(B, 8));
    a.rr32(Two::Load, C, A);
    a.imm(Imm::And, false, C, 0xfff);
    a.rr(Two::Add, B, C);
    a.rm(Two::Add, B, field::code_tag());
    a.copy(C, B);
    a.shr(C, 12);
    a.rr32(Two::Xor, C, B);
    a.imm(Imm::And, false, C, JUMP_MASK);
    a.shl32(C, ENTRY_SHIFT);
    a.rm(Two::Add, C, field::jumps());
    a.rm(Two::Cmp, B, at(C, 0));
    let first = a.jcc(cc::E);
    a.imm(Imm::Add, true, C, size_of::<Jump>() as i32);
    a.rm(Two::Cmp, B, at(C, 0));
    let not_there = a.jcc(cc::NE);
    a.bind(first);
    a.rm(Two::Load, B, at(C, 8));
    Target::remember(a);
    a.rr32(Two::Cmp, A, A); // equal
    a.bind(unknown);
    a.bind(not_there);
    load_table(a);
    a.ret();
    further
}

/// `op register, [base + disp]` or the reverse: legacy (128 bits), VEX (256) or EVEX (512).
fn vector_move(a: &mut Assembler, level: Level, store: bool, register: u8, base: Reg, disp: i32) {
    // MOVAPS 0F 28 /r, 0F 29 /r (SDM 2B); VMOVAPS ymm is the same with VEX.256.0F, VMOVAPS zmm with EVEX.512.0F.W0.
    let opcode = if store { 0x29 } else { 0x28 };
    let modrm = 0x80 | (register & 7) << 3 | base.0 & 7;
    // VEX's and EVEX's R, X, B and R' are inverted.
    let inverted = |number: u8, bit: u8| !(number >> bit) & 1;
    match level {
        Level::Sse => {
            a.bytes(&[0x40 | (register >> 3) << 2 | base.0 >> 3, 0x0f, opcode, modrm]);
        }
        Level::Avx => {
            let first = inverted(register, 3) << 7 | 1 << 6 | inverted(base.0, 3) << 5 | 1;
            a.bytes(&[0xc4, first, 0x7c, opcode, modrm]);
        }
        Level::Avx512 => {
            let first = inverted(register, 3) << 7
                | 1 << 6
                | inverted(base.0, 3) << 5
                | inverted(register, 4) << 4
                | 1;
            a.bytes(&[0x62, first, 0x7c, 0x48, opcode, modrm]);
        }
    }
    a.bytes(&disp.to_le_bytes());
}

/// `kmovq kN, [A + disp]` or the reverse: VEX.L0.0F.W1 90 /r, 91 /r (SDM 2A).
fn mask_move(a: &mut Assembler, store: bool, register: u8, disp: i32) {
    let opcode = if store { 0x91 } else { 0x90 };
    a.bytes(&[0xc4, 0xc1, 0xf8, opcode, 0x80 | register << 3 | A.0 & 7]);
    a.bytes(&disp.to_le_bytes());
}

/// All registers of a level, to or from the register file at [`A`].
fn move_all(a: &mut Assembler, level: Level, store: bool) {
    let registers = if level == Level::Avx512 { 32 } else { 16 };
    for register in 0..registers {
        vector_move(a, level, store, register, A, offset::ZMM + 64 * i32::from(register));
    }
    if level == Level::Avx512 {
        for register in 0..8 {
            mask_move(a, store, register, offset::K + 8 * i32::from(register));
        }
    }
}

/// `ldmxcsr` or `stmxcsr` of a field of the register file at [`A`].
pub(super) fn mxcsr(a: &mut Assembler, store: bool, disp: i32) {
    a.bytes(&[0x41, 0x0f, 0xae, 0x80 | if store { 3 << 3 } else { 2 << 3 } | A.0 & 7]);
    a.bytes(&disp.to_le_bytes());
}

/// Takes the guest's vector registers out of the host's, if they are there. Uses [`A`] and flags.
pub(super) fn spill(a: &mut Assembler, levels: &[Level]) {
    a.imm_mem(Imm::Cmp, field::level(), 0);
    let none = a.jcc(cc::E);
    a.rm(Two::Load, A, field::vectors());
    let mut done = Vec::new();
    for (i, &level) in levels.iter().enumerate() {
        let other = (i + 1 < levels.len()).then(|| {
            a.imm_mem(Imm::Cmp, field::level(), level as i32);
            a.jcc(cc::NE)
        });
        move_all(a, level, true);
        if level > Level::Sse {
            // Rust's code is legacy code in good part.
            a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        if let Some(other) = other {
            done.push(a.jmp());
            a.bind(other);
        }
    }
    for site in done {
        a.bind(site);
    }
    mxcsr(a, true, offset::MXCSR);
    mxcsr(a, false, offset::MXCSR_HOST);
    a.store_imm32_wide(field::level(), 0);
    a.bind(none);
}

/// The code of [`Around::load`] for a level. `above` is that for the level above, if the host has it.
fn load(a: &mut Assembler, level: Level, levels: &[Level], above: Option<usize>) {
    a.imm_mem32(Imm::Cmp, field::passing(), level as i32);
    let allowed = a.jcc(cc::AE);
    let refuse = a.here();
    a.imm(Imm::Cmp, true, RSP, 0); // never equal
    a.ret();
    a.bind(allowed);
    spill(a, levels);
    a.rm(Two::Load, A, field::vectors());
    if level == Level::Avx && is_x86_feature_detected!("avx512f") {
        // Bits above 255 of the registers must be zero: instructions of this level clear them, which would not be seen. If they are
        // not, they come along; or the handler must do it, where the guest has not turned them on.
        a.bytes(&[0xc4, 0xc1, 0x7d, 0x6f, 0x80 | A.0 & 7]); // vmovdqa ymm0, [A + disp32]
        a.bytes(&(offset::ZMM + 32).to_le_bytes());
        for register in 1..16 {
            a.bytes(&[0xc4, 0xc1, 0x7d, 0xeb, 0x80 | A.0 & 7]); // vpor ymm0, ymm0, [A + disp32]
            a.bytes(&(offset::ZMM + 32 + 64 * register).to_le_bytes());
        }
        a.bytes(&[0xc4, 0xe2, 0x7d, 0x17, 0xc0]); // vptest ymm0, ymm0
        a.jcc_to(cc::NE, above.unwrap_or(refuse) as i64);
    }
    if level > Level::Sse {
        test_upper(a, level);
    }
    move_all(a, level, false);
    if level > Level::Sse {
        let in_use = a.jcc(cc::NE);
        a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        a.bind(in_use);
    }
    mxcsr(a, false, offset::MXCSR);
    a.store_imm32_wide(field::level(), level as u32);
    a.rr32(Two::Cmp, A, A); // equal
    a.ret();
}

/// "Equal" if all that VZEROUPPER clears is zero in the register file at [`A`]. What has been loaded counts as in use for the processor, zero or not,
/// and where it is, some processors take a microsecond between an instruction with VEX and one without. Code that has cleared
/// it mixes them. Uses the first register.
fn test_upper(a: &mut Assembler, level: Level) {
    a.bytes(&[0xc5, 0xf9, 0xef, 0xc0]); // vpxor xmm0, xmm0, xmm0
    for register in 0..16 {
        let at = offset::ZMM + 64 * register;
        let parts: &[i32] = if level == Level::Avx512 { &[16, 32, 48] } else { &[16] };
        for part in parts {
            // vpor xmm0, xmm0, [A + disp32]
            a.bytes(&[0xc4, 0xc1, 0x79, 0xeb, 0x80 | A.0 & 7]);
            a.bytes(&(at + part).to_le_bytes());
        }
    }
    a.bytes(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]); // vptest xmm0, xmm0
}

/// The fixed code.
pub(super) fn emit() -> (Vec<u8>, Stubs) {
    let levels: &[Level] = match (is_x86_feature_detected!("avx"), host_has_avx512()) {
        (true, true) => &[Level::Sse, Level::Avx, Level::Avx512],
        (true, false) => &[Level::Sse, Level::Avx],
        _ => &[Level::Sse],
    };
    let mut a = Assembler::with_capacity(0x1000);
    let enter = a.here();
    for reg in SAVED {
        a.push(Reg(reg));
    }
    // The return address, six registers and 24 bytes more: the stack is aligned for calls out of translated code.
    a.imm(Imm::Sub, true, RSP, 24);
    a.copy(PIN, RDI);
    a.rm(Two::Store, RSP, field::base());
    a.constant(A, NOWHERE);
    a.rm(Two::Store, A, at(RSP, 8));
    let nowhere = a.lea_rip(A);
    a.rm(Two::Store, A, at(RSP, 0));
    load_registers(&mut a);
    a.jmp_mem(field::entry());

    // With the reason in B.
    let leave = a.here();
    store_registers(&mut a);
    spill(&mut a, levels);
    let leave_stored = a.here();
    a.rr32(Two::Load, RAX, B);
    a.rm(Two::Load, RSP, field::base());
    a.imm(Imm::Add, true, RSP, 24);
    for reg in SAVED.into_iter().rev() {
        a.pop(Reg(reg));
    }
    a.ret();

    let leave_for = |a: &mut Assembler, reason: u64| {
        a.constant(B, reason);
        a.jmp_to(leave as i64);
    };
    let budget = a.here();
    a.rr32(Two::Load, B, A);
    a.imm(Imm::And, false, A, 0xfff);
    a.shr32(B, 12);
    a.rr(Two::Add, BUDGET, B);
    a.rm(Two::Add, A, field::page());
    a.rm(Two::Store, A, field::rip());
    leave_for(&mut a, reason::BUDGET);

    let link = a.here();
    a.rm32(Two::Store, A, field::link());
    leave_for(&mut a, reason::LINK);

    let look_up_start = a.here();
    let look_further = look_up(&mut a);

    a.bind(nowhere);
    // The two words at the bottom are there for the next time.
    a.rm(Two::Load, RSP, field::base());
    let dispatch = a.here();
    a.call_to(look_up_start as i64);
    let missing = a.jcc(cc::NE);
    enter_page(&mut a);
    a.jmp_reg(B);
    a.bind(missing);
    a.rm(Two::Store, A, field::rip());
    leave_for(&mut a, reason::LOOKUP);

    let interpret = a.here();
    store_registers(&mut a);
    a.rr32(Two::Load, RSI, A);
    spill(&mut a, levels);
    a.rm(Two::Lea, RDI, at(PIN, -(offset_of!(Cpu, regs) as i32)));
    // The return address on top of pairs of words.
    a.imm(Imm::Sub, true, RSP, 8);
    a.call_mem(field::interpret());
    a.imm(Imm::Add, true, RSP, 8);
    a.rr32(Two::Test, RAX, RAX);
    let leaves = a.jcc(cc::NE);
    load_registers(&mut a);
    a.ret();
    a.bind(leaves);
    let leaves_start = a.here();
    a.imm(Imm::Cmp, false, RAX, reason::RESUME as i32);
    let other = a.jcc(cc::NE);
    a.rm(Two::Load, RSP, field::base());
    load_registers(&mut a);
    a.rm(Two::Load, A, field::rip());
    a.jmp_to(dispatch as i64);
    a.bind(other);
    a.rr32(Two::Load, B, RAX);
    a.jmp_to(leave_stored as i64);

    let raised = unmasked::landing(&mut a, levels, leaves_start);

    let ret = [8, 4].map(|word| ret(&mut a, interpret, look_up_start, dispatch, word));
    let ways = Ways { interpret, dispatch };
    let system_call = privilege::system_call(&mut a, ways);
    let system_return = privilege::system_return(&mut a, ways);
    let system_enter = compat::system_enter(&mut a, ways);
    let system_return_narrow = compat::system_return(&mut a, ways);
    let software_interrupt = [false, true].map(|narrow| gate::software_interrupt(&mut a, ways, narrow));
    let interrupt_return = interrupt_return::interrupt_return(&mut a, ways);
    // From the highest, which the one below leads to.
    let mut load = [0; LEVELS];
    let mut above = None;
    for level in [Level::Avx512, Level::Avx, Level::Sse] {
        let start = a.here();
        load[level as usize - 1] = start;
        self::load(&mut a, level, levels, above);
        above = (level == Level::Avx512 && levels.contains(&level)).then_some(start);
    }
    let stack = a.here();
    find_stack(&mut a);
    let by_interpreter = a.here();
    a.rm(Two::Add, A, field::page());
    a.rm(Two::Store, A, field::rip());
    leave_for(&mut a, reason::INTERPRET);
    let around = Around { interpret, look_further, dispatch, link, stack, leave, load, levels };
    let misses = misses::emit(&mut a, &around);
    let length = a.here();
    (
        a.code,
        Stubs {
            enter,
            interpret,
            dispatch,
            budget,
            link,
            ret,
            system_call,
            system_return,
            system_enter,
            system_return_narrow,
            software_interrupt,
            interrupt_return,
            by_interpreter,
            raised,
            misses,
            quirks: Quirks::host(),
            length,
        },
    )
}

/// The code of [`Around::stack`].
fn find_stack(a: &mut Assembler) {
    a.rm(Two::Add, A, field::stack_page());
    let [tag, host] = data_entry(a, true);
    a.rm(Two::Sub, A, tag);
    a.compare_imm(A, 0xfff);
    let unknown = a.jcc(cc::A);
    a.rm(Two::Lea, C, tag);
    a.rm(Two::Load, B, at(C, 0));
    a.rm(Two::Store, B, field::stack_page());
    a.rm(Two::Load, B, at(C, host.disp - tag.disp));
    a.rm(Two::Store, B, field::stack_host());
    a.rr32(Two::Cmp, A, A);
    a.bind(unknown);
    a.ret();
}

/// A return that does not match, the stack pointer being where it is behind it. As the host's predictor would, take one call off:
/// code that drops return addresses (return thunks do) matches the next. A return takes `word` bytes off the guest's stack.
fn ret(a: &mut Assembler, interpret: usize, look_up: usize, dispatch: usize, word: i32) -> usize {
    let start = a.here();
    a.rm32(Two::Store, B, field::link());
    a.rm(Two::Cmp, RSP, field::base());
    let empty = a.jcc(cc::AE);
    a.rm(Two::Lea, RSP, at(RSP, 16));
    a.rm(Two::Cmp, A, at(RSP, 8));
    let other = a.jcc(cc::NE);
    a.ret();
    a.bind(empty);
    a.bind(other);
    a.call_to(look_up as i64);
    let missing = a.jcc(cc::NE);
    enter_page(a);
    a.jmp_reg(B);
    a.bind(missing);
    // Where it may fault, the handler executes it, from before it.
    misses::find_site(a);
    // What it takes off besides.
    a.load_word(C, at(C, (offset_of!(Site, op) + offset_of!(Op, immediate)) as i32));
    let before = at(STACK, -word);
    if word == 4 {
        a.rm32(Two::Lea, STACK, before);
        a.rr32(Two::Sub, STACK, C);
    } else {
        a.rm(Two::Lea, STACK, before);
        a.rr(Two::Sub, STACK, C);
    }
    a.rm32(Two::Load, A, field::link());
    a.call_to(interpret as i64);
    a.rm(Two::Load, A, field::rip());
    a.jmp_to(dispatch as i64);
    start
}
