//! Fixed code for what is rarely executed: where a check in translated code has failed, it comes here with the number of a
//! record ([`Site`], [`Row`]) that tells the rest.

use std::mem::offset_of;

use super::apart::Row;
use super::asm::{Assembler, Imm, Mem, RAX, RDI, RSI, Reg, Two, at, cc};
use super::emit::load_flags;
use super::helper::{SITE_SHIFT, Site, marks};
use super::links::Crossing;
use super::registers::{A, B, BUDGET, C, PIN};
use super::state::field;
use super::stubs::{fetch_entry, load_registers, load_table, reason, spill, store_registers};
use crate::interp::cpu::Cpu;
use crate::interp::op::Op;
use crate::vector::pass::{LEVELS, Level, X87};

/// Offsets of the code in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Misses {
    /// Jumped to with a site in [`A`]: runs its handler and goes on behind it.
    pub(super) slow: usize,
    /// Jumped to with a site in [`B`] and the distance of an address from the stack's page in [`A`]: makes the page of that address the stack's
    /// and goes on with the check; or as `slow`.
    pub(super) stack: usize,
    /// Jumped to with a row's distance from the first in [`B`]: runs it apart.
    pub(super) row: usize,
    /// As `stack`, for a row; or as `row`.
    pub(super) row_of_stack: usize,
    /// Jumped to with a site in [`B`], an indirect branch to the linear address in [`A`] that is not in the table of targets.
    pub(super) target: usize,
    /// For links to other pages: of 64-bit code, of 32-bit code.
    pub(super) crossings: [CrossingCode; 2],
    /// Jumped to with a site in [`A`]: brings vector registers into the host's.
    pub(super) load: usize,
    /// Likewise, the x87 state.
    pub(super) load_x87: usize,
    /// Jumped to: the interpreter is to execute what is at RIP.
    pub(super) give_up: usize,
}

/// Code for a [`Crossing`].
#[derive(Clone, Copy, Debug)]
pub(super) struct CrossingCode {
    /// Called with its number in [`A`], the page being the link's: "equal" if it leads where it should, which is noted. The
    /// number is put by. Uses [`A`], [`B`] and [`C`].
    pub(super) verify: usize,
    /// Jumped to after that, if it does not: looks the target up.
    pub(super) astray: usize,
}

/// Fixed code that this leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'a> {
    pub(super) interpret: usize,
    /// Called with a linear address in [`A`], which stays and is not in the table of targets: "equal" and the host's address of its code
    /// in [`B`] if there is some. Loads the soft TLB's table.
    pub(super) look_further: usize,
    pub(super) dispatch: usize,
    /// Jumped to with a link in [`A`]: it is not linked yet.
    pub(super) link: usize,
    /// Called with the distance of an address from the stack's page in [`A`]: makes the page of that address the stack's.
    /// "Equal" and the distance from it in [`A`] if it could. Uses [`B`] and [`C`].
    pub(super) stack: usize,
    /// Jumped to with the reason in [`B`].
    pub(super) leave: usize,
    /// Called: brings the guest's vector registers of a level into the host's. Flags say "not equal" if that is not
    /// allowed. Uses [`A`], which must be saved.
    pub(super) load: [usize; LEVELS],
    /// Those that the host has.
    pub(super) levels: &'a [Level],
}

const SITE_LENGTH: i32 = (offset_of!(Site, op) + offset_of!(Op, length)) as i32;
const SITE_LEVEL: i32 = offset_of!(Site, level) as i32;
const SITE_MARKS: i32 = offset_of!(Site, marks) as i32;
const SITE_BEHIND: i32 = offset_of!(Site, behind) as i32;
const SITE_NEXT: i32 = offset_of!(Site, next) as i32;
const SITE_BACK: i32 = offset_of!(Site, back) as i32;
const SITE_AGAIN: i32 = offset_of!(Site, again) as i32;
const SITE_LIMIT: i32 = offset_of!(Site, limit) as i32;

/// The address of the record whose number was put by to [`C`]: records of `1 << shift` bytes, of which the first one's address is at `first`.
fn find_record(a: &mut Assembler, shift: u8, first: Mem) {
    a.rm32(Two::Load, C, field::link());
    a.shl32(C, shift);
    a.rm(Two::Add, C, first);
}

/// The address of the site whose number was put by to [`C`].
pub(super) fn find_site(a: &mut Assembler) {
    find_record(a, SITE_SHIFT, field::sites());
}

/// The address of the row whose distance was put by to [`C`].
fn find_row(a: &mut Assembler) {
    a.rm32(Two::Load, C, field::link());
    a.rm(Two::Add, C, field::rows());
}

/// The host's address of a place in the arena that is said at `mem`, to `reg`.
fn find_place(a: &mut Assembler, reg: Reg, mem: Mem) {
    find_place_in(a, reg, mem, field::arena());
}

/// Likewise, in the mapping of the arena whose address is at `arena`.
fn find_place_in(a: &mut Assembler, reg: Reg, mem: Mem, arena: Mem) {
    a.rm32(Two::Load, reg, mem);
    a.rm(Two::Add, reg, arena);
}

/// Goes on where the site says whose number was put by.
fn go_on(a: &mut Assembler) {
    find_site(a);
    find_place(a, B, at(C, SITE_BACK));
    load_table(a);
    a.jmp_reg(B);
}

/// Goes where a handler has put RIP.
fn follow_rip(a: &mut Assembler, around: &Around) {
    a.rm(Two::Load, A, field::rip());
    a.jmp_to(around.dispatch as i64);
}

/// Loads the vector registers of the level in [`B`]; flags as from [`Around::load`].
fn load_level(a: &mut Assembler, around: &Around) {
    let mut done = Vec::new();
    for level in [Level::Sse, Level::Avx] {
        a.imm(Imm::Cmp, false, B, level as i32);
        let other = a.jcc(cc::NE);
        a.call_to(around.load[level as usize - 1] as i64);
        done.push(a.jmp());
        a.bind(other);
    }
    a.call_to(around.load[Level::Avx512 as usize - 1] as i64);
    for site in done {
        a.bind(site);
    }
}

/// The branches returned are taken where code that expects x87 instructions to pass may not go on: that of the site at [`C`].
fn unless_x87_passes(a: &mut Assembler) -> [usize; 2] {
    a.imm_mem(Imm::Cmp, field::x87(), X87::Ready as i32);
    let passes = a.jcc(cc::E);
    a.test_byte(field::x87(), X87::PASS);
    let refused = a.jcc(cc::E);
    a.test_byte(at(C, SITE_MARKS), marks::CAREFUL);
    let careless = a.jcc(cc::E);
    a.bind(passes);
    [refused, careless]
}

/// Emits all.
pub(super) fn emit(a: &mut Assembler, around: &Around) -> Misses {
    let slow = slow(a, around);
    let stack = self::stack(a, around, slow);
    let (row, row_of_stack) = row(a, around);
    let target = target(a, around);
    let crossings = [false, true].map(|narrow| crossing(a, around, narrow));
    let give_up = a.here();
    a.constant(B, reason::INTERPRET);
    a.jmp_to(around.leave as i64);
    let (load, behind) = load(a, around);
    let load_x87 = load_x87(a, around, behind, give_up);
    Misses { slow, stack, row, row_of_stack, target, crossings, load, load_x87, give_up }
}

fn slow(a: &mut Assembler, around: &Around) -> usize {
    let start = a.here();
    a.rm32(Two::Store, A, field::link());
    a.call_to(around.interpret as i64);
    find_site(a);
    a.test_byte(at(C, SITE_MARKS), marks::ENDS);
    let ends = a.jcc(cc::NE);
    a.test_byte(at(C, SITE_MARKS), marks::X87);
    let other_units = a.jcc(cc::E);
    let no_x87 = unless_x87_passes(a);
    a.bind(other_units);
    a.load_byte(B, at(C, SITE_LEVEL));
    a.rm(Two::Cmp, B, field::level());
    let missing = a.jcc(cc::A);
    let ready = a.here();
    find_place(a, B, at(C, SITE_BACK));
    load_flags(a, C);
    load_table(a);
    a.jmp_reg(B);

    a.bind(missing);
    load_level(a, around);
    let refused = a.jcc(cc::NE);
    find_site(a);
    a.jmp_to(ready as i64);

    // Then nothing of the unit is executed behind it.
    a.bind(refused);
    find_site(a);
    for site in no_x87 {
        a.bind(site);
    }
    a.load_word(B, at(C, SITE_BEHIND));
    a.rr(Two::Add, BUDGET, B);
    a.bind(ends);
    follow_rip(a, around);
    start
}

/// Tries the check of the stack again with another page, and goes on with it if that is of use; control comes to what is emitted next
/// otherwise. What it is about is in [`B`], and put by; `find` brings the address of its record to [`C`], where these fields are.
fn try_stack(a: &mut Assembler, around: &Around, find: fn(&mut Assembler), [again, limit]: [i32; 2]) {
    a.rm32(Two::Store, B, field::link());
    a.call_to(around.stack as i64);
    let unknown = a.jcc(cc::NE);
    find(a);
    a.load_word(B, at(C, limit));
    a.rr(Two::Cmp, A, B);
    let beyond = a.jcc(cc::A);
    find_place(a, B, at(C, again));
    load_table(a);
    a.jmp_reg(B);
    a.bind(unknown);
    a.bind(beyond);
}

fn stack(a: &mut Assembler, around: &Around, slow: usize) -> usize {
    let start = a.here();
    try_stack(a, around, find_site, [SITE_AGAIN, SITE_LIMIT]);
    a.rm32(Two::Load, A, field::link());
    a.jmp_to(slow as i64);
    start
}

/// The code of [`Misses::row`] and [`Misses::row_of_stack`].
fn row(a: &mut Assembler, around: &Around) -> (usize, usize) {
    let of_stack = a.here();
    try_stack(a, around, find_row, [offset_of!(Row, again) as i32, offset_of!(Row, limit) as i32]);
    a.rm32(Two::Load, B, field::link());
    let start = a.here();
    a.rm32(Two::Store, B, field::link());
    find_row(a);
    a.rm32(Two::Load, B, at(C, offset_of!(Row, code) as i32));
    a.rr32(Two::Test, B, B);
    let none = a.jcc(cc::E);
    a.rm(Two::Add, B, field::arena());
    load_table(a);
    a.jmp_reg(B);

    a.bind(none);
    call_rust(a, around, field::apart());
    a.rm(Two::Store, RAX, field::onward());
    load_registers(a);
    a.jmp_mem(field::onward());
    (start, of_stack)
}

/// Calls the function whose address is at `function` with the vCPU and the number that was put by. The vector registers that are in the
/// host's are there again behind it; others must be loaded. Result in RAX.
fn call_rust(a: &mut Assembler, around: &Around, function: Mem) {
    store_registers(a);
    // Twice, so that the stack is aligned for a call.
    a.rm(Two::Load, A, field::level());
    a.push(A);
    a.push(A);
    spill(a, around.levels);
    a.rm(Two::Lea, RDI, at(PIN, -(offset_of!(Cpu, regs) as i32)));
    a.rm32(Two::Load, RSI, field::link());
    a.call_mem(function);
    a.pop(B);
    a.pop(B);
    a.rr32(Two::Test, B, B);
    let no_vectors = a.jcc(cc::E);
    // They were there a moment ago, so they may be.
    load_level(a, around);
    a.bind(no_vectors);
}

fn target(a: &mut Assembler, around: &Around) -> usize {
    let start = a.here();
    a.rm32(Two::Store, B, field::link());
    a.call_to(around.look_further as i64);
    let unknown = a.jcc(cc::NE);
    find_site(a);
    find_place(a, C, at(C, SITE_BACK));
    a.jmp_reg(C);
    a.bind(unknown);
    a.rm32(Two::Load, A, field::link());
    a.call_to(around.interpret as i64);
    follow_rip(a, around);
    start
}

/// How often a crossing is verified under one number before its check learns it: what is written to code costs hundreds of cycles.
const PATIENCE: u32 = 4;
const CROSSING_SHIFT: u8 = 5;
const _: () = assert!(size_of::<Crossing>() == 1 << CROSSING_SHIFT);

/// The crossing whose number was put by, and the linear address that it is meant to lead to, to [`A`]; 32-bit ones (`narrow`) wrap.
fn find_crossing(a: &mut Assembler, narrow: bool) {
    find_record(a, CROSSING_SHIFT, field::crossings());
    a.rm(Two::Load, A, field::page());
    let target = at(C, offset_of!(Crossing, target) as i32);
    if narrow { a.rm32(Two::Add, A, target) } else { a.rm(Two::Add, A, target) }
}

/// The code for links to other pages.
fn crossing(a: &mut Assembler, around: &Around, narrow: bool) -> CrossingCode {
    let its = |offset: usize| at(C, offset as i32);
    let verify = a.here();
    a.rm32(Two::Store, A, field::link());
    find_crossing(a, narrow);
    a.imm(Imm::And, true, A, -0x1000);
    fetch_entry(a);
    a.rm(Two::Cmp, A, at(B, 0));
    let unknown = a.jcc(cc::NE);
    // Bits 8 to 39 of the physical page's address.
    a.rm32(Two::Load, B, at(B, 9));
    a.rm32(Two::Cmp, B, its(offset_of!(Crossing, page)));
    let other = a.jcc(cc::NE);
    a.rm32(Two::Load, A, field::code_generation());
    a.rm32(Two::Cmp, A, its(offset_of!(Crossing, seen)));
    let fresh = a.jcc(cc::NE);
    a.imm_mem32(Imm::Sub, its(offset_of!(Crossing, patience)), 1);
    let patient = a.jcc(cc::NE);
    find_place_in(a, B, its(offset_of!(Crossing, checked)), field::writable());
    // The processor may go on seeing the old number for a while, which is no harm: the check fails then. It does not see the new one
    // with the old page, which is written first and compared last.
    a.rm(Two::Load, C, field::page());
    a.rm(Two::Store, C, at(B, Crossing::FROM));
    a.rm32(Two::Store, A, at(B, 0));
    let learnt = a.jmp();
    a.bind(fresh);
    a.rm32(Two::Store, A, its(offset_of!(Crossing, seen)));
    a.store_imm32(its(offset_of!(Crossing, patience)), PATIENCE);
    a.bind(patient);
    a.bind(learnt);
    load_table(a);
    a.rr32(Two::Cmp, A, A); // equal
    a.bind(unknown);
    a.bind(other);
    a.ret();

    let astray = a.here();
    find_crossing(a, narrow);
    a.imm_mem32(Imm::Cmp, its(offset_of!(Crossing, page)), Crossing::NO_PAGE as i32);
    a.jcc_to(cc::NE, around.dispatch as i64);
    a.rm32(Two::Load, A, its(offset_of!(Crossing, link)));
    a.jmp_to(around.link as i64);
    CrossingCode { verify, astray }
}

/// The code of [`Misses::load`], and where a region is left behind the site at [`C`].
fn load(a: &mut Assembler, around: &Around) -> (usize, usize) {
    let start = a.here();
    a.rm32(Two::Store, A, field::link());
    find_site(a);
    a.load_byte(B, at(C, SITE_LEVEL));
    load_level(a, around);
    let refused = a.jcc(cc::NE);
    go_on(a);

    a.bind(refused);
    find_site(a);
    a.test_byte(at(C, SITE_MARKS), marks::DONE);
    let done = a.jcc(cc::NE);
    a.rm32(Two::Load, A, field::link());
    a.call_to(around.interpret as i64);
    find_site(a);
    a.load_word(B, at(C, SITE_BEHIND));
    a.rr(Two::Add, BUDGET, B);
    follow_rip(a, around);

    a.bind(done);
    let behind = a.here();
    a.load_word(B, at(C, SITE_BEHIND));
    a.rr(Two::Add, BUDGET, B);
    a.load_word(A, at(C, SITE_NEXT));
    a.rm(Two::Add, A, field::page());
    a.jmp_to(around.dispatch as i64);
    (start, behind)
}

/// The code of [`Misses::load_x87`]. Where x87 instructions may not be executed as they are, the interpreter goes on: more of them are likely to
/// follow, and for each one translated code would have to be left and found again. Where they may, but not by this code, other is to be made.
fn load_x87(a: &mut Assembler, around: &Around, behind: usize, give_up: usize) -> usize {
    let start = a.here();
    a.rm32(Two::Store, A, field::link());
    a.imm_mem(Imm::Cmp, field::x87(), X87::Away as i32);
    let known = a.jcc(cc::NE);
    call_rust(a, around, field::bring_x87());
    load_registers(a);
    a.bind(known);
    find_site(a);
    let refused = unless_x87_passes(a);
    go_on(a);

    for site in refused {
        a.bind(site);
    }
    a.test_byte(at(C, SITE_MARKS), marks::DONE);
    a.jcc_to(cc::NE, behind as i64);
    a.load_word(B, at(C, SITE_BEHIND));
    a.rm(Two::Lea, BUDGET, Mem { base: Some(BUDGET), index: Some((B, 0)), disp: 1 });
    a.load_word(A, at(C, SITE_NEXT));
    a.rm(Two::Add, A, field::page());
    a.load_byte(B, at(C, SITE_LENGTH));
    a.rr(Two::Sub, A, B);
    a.rm(Two::Store, A, field::rip());
    a.test_byte(field::x87(), X87::PASS);
    a.jcc_to(cc::E, give_up as i64);
    a.constant(B, reason::CAREFUL);
    a.jmp_to(around.leave as i64);
    start
}
