//! System calls of 32-bit programs under a 64-bit kernel: SYSENTER from compatibility mode to 64-bit code, and SYSRET from there
//! back to it (SDM 2B SYSENTER, SYSRET), in translated code.
//!
//! As with SYSCALL, what is done here is the common case; the rest is the handler's. What changes besides the privilege is the
//! mode: whatever depends on that is put in place as `Cpu::update_mode` and `Cpu::prepare_privileges` would. Translated 32-bit code
//! sees memory as one flat space ([`super::mode`]), so that nobody's segment base changes.

use std::mem::offset_of;

use ringfence_x86::segment::Segment;
use ringfence_x86::{Efer, Gpr, Rflags, SegmentRegister, msr};

use super::asm::{Assembler, Imm, Mem, Reg, Two, cc};
use super::emit::Emitter;
use super::mode::Mode;
use super::privilege::{
    Ways, begin_return, change, decline, nothing_waits, store_rflags, take_return_flags, use_kernel_table,
    use_table,
};
use super::registers::{A, B, C, STACK};
use super::state::field;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::{CodeSize, Cpu};
use crate::interp::system::segment::{flat_code, flat_stack};
use crate::mmu::tlb::Class;

/// The guest's RCX.
const RCX: Reg = Reg(Gpr::Rcx as u8);

/// What is worked out of model-specific registers before translated code is entered.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Compat {
    /// CS and SS that SYSENTER puts in place in long mode.
    enter: [Segment; 2],
    /// CS and SS that SYSRET puts in place for 32-bit code, by the same STAR as those for 64-bit code.
    back: [Segment; 2],
    /// The value of IA32_SYSENTER_CS whose segments are in `enter`.
    sysenter_cs: u64,
    /// Whether SYSENTER is an instruction in long mode: the vendors differ.
    has_sysenter: u64,
}

impl Compat {
    /// STAR has another value.
    pub(super) fn follow_star(&mut self, star: u64) {
        self.back = back_by(star);
    }

    pub(super) fn new() -> Self {
        Self { enter: enter_by(0), back: back_by(0), sysenter_cs: 0, has_sysenter: 0 }
    }
}

fn enter_by(sysenter_cs: u64) -> [Segment; 2] {
    let selector = sysenter_cs as u16 & !3;
    [flat_code(selector, 0, true), flat_stack(selector.wrapping_add(8), 0)]
}

fn back_by(star: u64) -> [Segment; 2] {
    let selector = (star >> 48) as u16;
    [flat_code(selector, 3, false), flat_stack(selector.wrapping_add(8), 3)]
}

impl Cpu {
    /// What SYSENTER puts in place; see [`Cpu::prepare_privileges`].
    #[inline(always)]
    pub(super) fn prepare_compat(&mut self) {
        let sysenter_cs = self.stored_msr(msr::SYSENTER_CS);
        let intel = self.features.is_intel();
        let compat = &mut self.translated.compat;
        compat.has_sysenter = intel.into();
        if compat.sysenter_cs != sysenter_cs {
            (compat.sysenter_cs, compat.enter) = (sysenter_cs, enter_by(sysenter_cs));
        }
    }
}

impl Emitter<'_> {
    /// SYSENTER in 32-bit code: a 64-bit program has no use for it.
    pub(super) fn system_enter(&mut self, i: usize) -> Option<()> {
        if !self.is_narrow() {
            return None;
        }
        self.return_by(i, self.stubs.system_enter)
    }

    /// SYSRET to 32-bit code, from 64-bit code.
    pub(super) fn system_return_narrow(&mut self, i: usize) -> Option<()> {
        if self.is_narrow() {
            return None;
        }
        self.return_by(i, self.stubs.system_return_narrow)
    }
}

/// Words of CS and SS, and where they go.
fn segments(offset: usize) -> impl Iterator<Item = (Mem, Mem)> {
    (0..2 * size_of::<Segment>())
        .step_by(8)
        .map(move |at| (field::compat(offset + at), field::code_segment(at)))
}

/// The code of [`super::stubs::Stubs::system_enter`].
pub(super) fn system_enter(a: &mut Assembler, ways: Ways) -> usize {
    let start = a.here();
    a.rm32(Two::Store, C, field::link());
    let mut declined = nothing_waits(a);
    a.compare_byte(field::class(), Class::User as u8);
    declined.push(a.jcc(cc::NE));
    a.test_imm32(field::efer(), Efer::LMA.bits() as u32);
    declined.push(a.jcc(cc::E));
    a.imm_mem(Imm::Cmp, field::compat(offset_of!(Compat, has_sysenter)), 0);
    declined.push(a.jcc(cc::E));
    a.rm(Two::Load, B, field::msr(msr::SYSENTER_CS));
    a.rm(Two::Cmp, B, field::compat(offset_of!(Compat, sysenter_cs)));
    declined.push(a.jcc(cc::NE));
    a.imm(Imm::And, false, B, 0xfffc);
    declined.push(a.jcc(cc::E));
    // From here on nothing can go wrong.
    a.imm_mem32(Imm::And, field::flags(), !(Rflags::IF.bits() as i32));
    use_kernel_table(a);
    change_mode(a, Mode::Bits64);
    change(a, false, segments(offset_of!(Compat, enter)), field::flat_by_star());
    a.rm(Two::Load, STACK, field::msr(msr::SYSENTER_ESP));
    a.rm(Two::Load, A, field::msr(msr::SYSENTER_EIP));
    a.jmp_to(ways.dispatch as i64);
    decline(a, declined, ways);
    start
}

/// The code of [`super::stubs::Stubs::system_return_narrow`].
pub(super) fn system_return(a: &mut Assembler, ways: Ways) -> usize {
    let start = a.here();
    let mut declined = begin_return(a);
    require_flat(a, &mut declined);
    a.copy(B, STACK);
    a.shr(B, 32);
    declined.push(a.jcc(cc::NE));
    take_return_flags(a, &mut declined);
    store_rflags(a);
    use_table(a, Class::User, field::user_table());
    change_mode(a, Mode::Flat32);
    change(a, true, segments(offset_of!(Compat, back)), field::flat_by_star());
    store_spans(a);
    a.rr32(Two::Load, A, RCX);
    a.jmp_to(ways.dispatch as i64);
    decline(a, declined, ways);
    start
}

/// Goes on if DS and ES span all 4 GiB, as they must for 32-bit code. Uses [`B`].
pub(super) fn require_flat(a: &mut Assembler, declined: &mut Vec<usize>) {
    for register in [SegmentRegister::Ds, SegmentRegister::Es] {
        a.load_byte(B, field::flat(register as u8));
        a.imm(Imm::And, false, B, 3);
        a.imm(Imm::Cmp, false, B, 3);
        declined.push(a.jcc(cc::NE));
    }
}

/// Goes to another mode; before [`change`]. Uses [`A`].
pub(super) fn change_mode(a: &mut Assembler, to: Mode) {
    let narrow = to == Mode::Flat32;
    for user in [false, true] {
        // The mode is all that is other in them.
        a.imm_mem(Imm::Xor, field::context_of(user), Mode::Flat32 as i32 ^ Mode::Bits64 as i32);
    }
    a.constant(A, CodeAddress::tag(narrow));
    a.rm(Two::Store, A, field::code_tag());
    let size = if narrow { CodeSize::Bits32 } else { CodeSize::Bits64 };
    a.store_byte(field::code_size(), size as u8);
    a.constant(A, if narrow { 0xffff_ffff } else { u64::MAX });
    a.rm(Two::Store, A, field::stack_mask());
}

/// Behind [`change`] to 32-bit code: CS and SS start at 0, and what they span is what they span from there. Uses [`A`].
pub(super) fn store_spans(a: &mut Assembler) {
    a.load_word(A, field::flat_code_and_stack());
    a.store_word(A, field::spans(SegmentRegister::Cs as u8));
}
