//! Changes of privilege in translated code: SYSCALL and SYSRET (SDM 2B; APM 3) between 64-bit code at CPL 3 and at CPL 0.
//!
//! What is done here is the common case: nothing waits, nothing is traced, the target is canonical. Everything else is the
//! handler's, which finds the vCPU as it was. No call is remembered behind such an instruction: what one privilege may fetch
//! the other may not, and a return found on the host's stack asks no table of fetches.

use ringfence_x86::{Cr4, Efer, Gpr, Rflags, msr};

use super::asm::{Assembler, Imm, Mem, RSP, Reg, Two, at, cc};
use super::emit::Emitter;
use super::registers::{A, B, C, PIN};
use super::state::{NO_STACK, field};
use crate::interp::system::syscall::SYSRET_FLAGS;
use crate::mmu::tlb::Class;

/// The guest's RCX.
const RCX: Reg = Reg(Gpr::Rcx as u8);

impl Emitter<'_> {
    /// SYSCALL.
    pub(super) fn system_call(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let id = self.site(i);
        self.a.constant(C, id);
        self.linear(self.at(i).0.next.into());
        self.jump_out(self.stubs.system_call);
        Some(())
    }

    /// An instruction that fixed code returns from, to wherever it goes: SYSRET, IRETQ, or SYSENTER.
    pub(super) fn return_by(&mut self, i: usize, stub: usize) -> Option<()> {
        self.save_flags();
        let id = self.site(i);
        self.a.constant(C, id);
        self.jump_out(stub);
        Some(())
    }
}

/// Fixed code that these stubs go to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    /// [`super::stubs::Stubs::interpret`].
    pub(super) interpret: usize,
    /// [`super::stubs::Stubs::dispatch`].
    pub(super) dispatch: usize,
}

/// The code of [`super::stubs::Stubs::system_call`].
pub(super) fn system_call(a: &mut Assembler, ways: Ways) -> usize {
    let start = a.here();
    let mut declined = begin(a);
    // At CPL 3 there is nothing to be looked at by each access that would not be at CPL 0.
    a.compare_byte(field::class(), Class::User as u8);
    declined.push(a.jcc(cc::NE));
    load_rflags(a, B);
    // From here on nothing can go wrong.
    a.rm(Two::Store, B, field::register(Gpr::R11 as u8));
    a.copy(RCX, A);
    a.rm(Two::Load, A, field::msr(msr::FMASK));
    a.imm(Imm::Xor, true, A, -1);
    a.rr(Two::And, B, A);
    store_rflags(a);
    use_kernel_table(a);
    change(a, false, field::code_and_stack(false), field::flat_by_star());
    a.rm(Two::Load, A, field::msr(msr::LSTAR));
    a.jmp_to(ways.dispatch as i64);
    decline(a, declined, ways);
    start
}

/// The code of [`super::stubs::Stubs::system_return`].
pub(super) fn system_return(a: &mut Assembler, ways: Ways) -> usize {
    let start = a.here();
    let mut declined = begin_return(a);
    // Where the target is not canonical, one vendor faults here and the other there.
    declined.push(not_canonical(a, RCX));
    take_return_flags(a, &mut declined);
    store_rflags(a);
    use_table(a, Class::User, field::user_table());
    change(a, true, field::code_and_stack(true), field::flat_by_star());
    a.copy(A, RCX);
    a.jmp_to(ways.dispatch as i64);
    decline(a, declined, ways);
    start
}

/// The flags that SYSRET takes from R11, to [`B`], unless they are unusual. Uses [`C`].
pub(super) fn take_return_flags(a: &mut Assembler, declined: &mut Vec<usize>) {
    // A trap behind this instruction, or accesses whose alignment is checked.
    a.rm(Two::Load, B, field::register(Gpr::R11 as u8));
    a.rr32(Two::Load, C, B);
    a.imm(Imm::And, false, C, (Rflags::TF | Rflags::AC).bits() as i32);
    declined.push(a.jcc(cc::NE));
    a.imm(Imm::And, false, B, SYSRET_FLAGS as i32);
}

/// What SYSRET begins with, as [`begin`].
pub(super) fn begin_return(a: &mut Assembler) -> Vec<usize> {
    let mut declined = begin(a);
    a.compare_byte(field::cpl(), 0);
    declined.push(a.jcc(cc::NE));
    a.compare_byte(field::class(), Class::Slow as u8);
    declined.push(a.jcc(cc::E));
    declined
}

/// What both begin with: the site is in [`C`], which is free then. [`A`] stays. Returns the branches taken where the handler
/// must do it.
fn begin(a: &mut Assembler) -> Vec<usize> {
    a.rm32(Two::Store, C, field::link());
    a.test_imm32(field::efer(), Efer::SCE.bits() as u32);
    let mut declined = vec![a.jcc(cc::E)];
    // The segments are worked out of STAR before translated code is entered.
    a.rm(Two::Load, B, field::msr(msr::STAR));
    a.rm(Two::Cmp, B, field::star());
    declined.push(a.jcc(cc::NE));
    declined.extend(nothing_waits(a));
    declined
}

/// Branches taken where something waits for the run loop. Uses [`B`].
pub(super) fn nothing_waits(a: &mut Assembler) -> Vec<usize> {
    a.rm(Two::Load, B, field::inbox());
    a.compare_imm32(at(B, 0), 0);
    let waits = a.jcc(cc::NE);
    a.rm(Two::Load, B, field::stale_flag());
    a.compare_byte(at(B, 0), 0);
    vec![waits, a.jcc(cc::NE)]
}

/// A branch taken if a register holds no canonical address: bits 47 to 63 are the same in one. Uses [`B`].
pub(super) fn not_canonical(a: &mut Assembler, address: Reg) -> usize {
    a.copy(B, address);
    a.sar(true, B, 47);
    a.rm(Two::Lea, B, at(B, 1));
    a.compare_imm(B, 1);
    a.jcc(cc::A)
}

/// RFLAGS to a register. Uses [`C`].
pub(super) fn load_rflags(a: &mut Assembler, to: Reg) {
    // The status flags are in the form in which LAHF and SETO deliver them.
    let status = field::status();
    a.load_byte(to, at(PIN, status.disp + 1));
    a.imm(Imm::And, false, to, 0xd5);
    a.load_byte(C, status);
    a.shl32(C, 11);
    a.rr(Two::Or, to, C);
    a.rm(Two::Load, C, field::flags());
    a.rr(Two::Or, to, C);
}

/// RFLAGS from [`B`]. Uses [`A`] and [`C`].
pub(super) fn store_rflags(a: &mut Assembler) {
    a.rr32(Two::Load, C, B);
    a.imm(Imm::And, false, C, 0xd5);
    a.shl32(C, 8);
    a.rr32(Two::Load, A, B);
    a.shr32(A, 11);
    a.imm(Imm::And, false, A, 1);
    a.rr32(Two::Or, C, A);
    a.store_word(C, field::status());
    a.imm(Imm::And, false, B, (Rflags::all() - Rflags::STATUS).bits() as i32);
    a.imm(Imm::Or, false, B, Rflags::FIXED.bits() as i32);
    a.rm(Two::Store, B, field::flags());
}

/// Makes a class that whose accesses ask this table. Uses [`A`].
pub(super) fn use_table(a: &mut Assembler, class: Class, table: Mem) {
    a.store_byte(field::class(), class as u8);
    a.rm(Two::Load, A, table);
    a.rm(Two::Store, A, field::data_table());
}

/// Makes the class of CPL 0 that. Uses [`A`].
pub(super) fn use_kernel_table(a: &mut Assembler) {
    with_kernel_table(a, use_table);
}

/// Does something with the class of CPL 0 and its table: user pages may be accessed if SMAP is off, or AC set.
pub(super) fn with_kernel_table(a: &mut Assembler, then: impl Fn(&mut Assembler, Class, Mem)) {
    a.test_imm32(field::flags(), Rflags::AC.bits() as u32);
    let open = a.jcc(cc::NE);
    a.test_imm32(field::cr4(), Cr4::SMAP.bits() as u32);
    let off = a.jcc(cc::E);
    then(a, Class::Kernel, field::kernel_table(false));
    let chosen = a.jmp();
    a.bind(open);
    a.bind(off);
    then(a, Class::KernelAc, field::kernel_table(true));
    a.bind(chosen);
}

/// CPL, CS and SS from words of the vCPU, and what follows from them but for the class, and forgets the guest's calls. `flat` says whether
/// CS and SS span all 4 GiB. Uses [`A`].
pub(super) fn change(a: &mut Assembler, user: bool, segments: impl Iterator<Item = (Mem, Mem)>, flat: Mem) {
    a.store_byte(field::cpl(), if user { 3 } else { 0 });
    for (from, to) in segments {
        a.rm(Two::Load, A, from);
        a.rm(Two::Store, A, to);
    }
    a.load_word(A, flat);
    a.store_word(A, field::flat_code_and_stack());
    a.rm(Two::Load, A, field::context_of(user));
    a.rm(Two::Store, A, field::context());
    a.rm(Two::Load, A, field::fetch_table_of(user));
    a.rm(Two::Store, A, field::fetch_table());
    forget_stack(a);
    a.rm(Two::Load, RSP, field::base());
}

/// Makes translated code look for the stack's page anew. Uses [`A`].
pub(super) fn forget_stack(a: &mut Assembler) {
    a.constant(A, NO_STACK);
    a.rm(Two::Store, A, field::stack_page());
    a.rm(Two::Load, A, field::no_stack());
    a.rm(Two::Store, A, field::stack_host());
}

/// Has the handler do it, and goes on where it leads.
pub(super) fn decline(a: &mut Assembler, sites: Vec<usize>, ways: Ways) {
    for site in sites {
        a.bind(site);
    }
    a.rm32(Two::Load, A, field::link());
    a.call_to(ways.interpret as i64);
    a.rm(Two::Load, A, field::rip());
    a.jmp_to(ways.dispatch as i64);
}
