//! STOS, MOVS, SCAS and CMPS, alone and repeated, and LODS alone.
//!
//! A repeated one runs as the host's own where all of it lies in one page on each side, which is every call of the guest's
//! memcpy and memset for small things and most of its work on whole pages. Then it ends within the elements that the
//! interpreter's handler does at once, so both count it as one instruction. Anything else is the handler's. A repeated SCAS is for whoever finds
//! what is looked for, which most do within a page, however large the count is; and so is a repeated CMPS, where what is compared may end
//! there as well.

use ringfence_x86::Rflags;

use super::asm::{Imm, Mem, RAX, RDI, RSI, Reg, Two, at, cc};
use super::emit::Emitter;
use super::registers::{A, B, C};
use super::state::field;
use super::stubs::load_table;
use crate::interp::op::prefix;

const RCX: Reg = Reg(1);
/// Most elements at once: those of a page of bytes.
const MOST: i32 = 0x1000;

/// log2 of an element's size, and whether the instruction is repeated.
#[derive(Clone, Copy)]
struct Shape {
    scale: u8,
    repeated: bool,
}

impl Emitter<'_> {
    /// What the string instruction at step `i` is like; `None` if its addresses are not plain ones.
    fn string_shape(&self, i: usize) -> Option<Shape> {
        let (step, op) = self.at(i);
        // The segment is that of what RSI points at; RDI's never has a base.
        let plain = self.is_plain(op);
        let scale = match step.facts.size {
            1 => 0,
            2 => 1,
            4 => 2,
            8 => 3,
            _ => return None,
        };
        plain.then_some(Shape { scale, repeated: op.has(prefix::REP | prefix::REPNE) })
    }

    /// Leaves by the branches returned if DF is set, a step is to end after each element (TF), or a repeated instruction has nothing or more than a page to do.
    fn check_string(&mut self, i: usize, shape: Shape) -> Vec<usize> {
        self.keep_flags(i);
        self.host_flags = false;
        self.a.test_imm32(field::flags(), (Rflags::DF | Rflags::TF).bits() as u32);
        let mut sites = vec![self.a.jcc(cc::NE)];
        if shape.repeated {
            self.a.rm(Two::Lea, A, at(RCX, -1));
            self.a.compare_imm(A, MOST - 1);
            sites.push(self.a.jcc(cc::A));
        }
        sites
    }

    /// The host's address of what `pointer` points at to [`A`]: one element, or the first of RCX that lie in one page.
    fn check_elements(&mut self, pointer: Reg, shape: Shape, write: bool, sites: &mut Vec<usize>) {
        if shape.repeated {
            self.a.rr32(Two::Load, A, pointer);
            self.a.imm(Imm::And, false, A, 0xfff);
            self.a.rm(Two::Lea, A, Mem { base: Some(A), index: Some((RCX, shape.scale)), disp: 0 });
            self.a.compare_imm(A, 0x1000);
            sites.push(self.a.jcc(cc::A));
        }
        self.copy_pointer(A, pointer);
        sites.push(self.check(if shape.repeated { 1 } else { 1 << shape.scale }, 1, write));
    }

    /// `pointer` behind the elements, to [`C`].
    fn behind_elements(&mut self, pointer: Reg, shape: Shape) {
        let (index, disp) =
            if shape.repeated { (Some((RCX, shape.scale)), 0) } else { (None, 1 << shape.scale) };
        self.lea(C, Mem { base: Some(pointer), index, disp });
    }

    /// The host's instruction, repeated by [`REP`] if it is: `opcode` for bytes, the next for wider elements.
    fn host_string(&mut self, opcode: u8, shape: Shape) {
        self.host_string_by(REP, opcode, shape);
    }

    /// Likewise, with another prefix.
    fn host_string_by(&mut self, prefix: u8, opcode: u8, shape: Shape) {
        if shape.scale == 1 {
            self.a.bytes(&[0x66]);
        }
        if shape.repeated {
            self.a.bytes(&[prefix]);
        }
        if shape.scale == 3 {
            self.a.bytes(&[0x48]);
        }
        self.a.bytes(&[opcode | u8::from(shape.scale > 0)]);
    }

    /// An instruction with one operand in memory, which `pointer` points at and `opcode` is for.
    fn by_one_pointer(
        &mut self,
        pointer: Reg,
        opcode: u8,
        shape: Shape,
        write: bool,
        sites: &mut Vec<usize>,
    ) {
        self.check_elements(pointer, shape, write, sites);
        self.behind_elements(pointer, shape);
        self.a.copy(pointer, A);
        self.host_string(opcode, shape);
        self.a.copy(pointer, C);
    }

    /// STOS.
    pub(super) fn store_string(&mut self, i: usize) -> Option<()> {
        let shape = self.string_shape(i)?;
        let mut sites = self.check_string(i, shape);
        self.by_one_pointer(RDI, 0xaa, shape, true, &mut sites);
        load_table(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    /// MOVS.
    pub(super) fn move_string(&mut self, i: usize) -> Option<()> {
        let shape = self.string_shape(i)?;
        let mut sites = self.check_string(i, shape);
        self.by_two_pointers(0xa4, shape, true, &mut sites);
        load_table(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    /// An instruction with an operand that RSI points at and one that RDI points at, which it may `write`.
    fn by_two_pointers(&mut self, opcode: u8, shape: Shape, write: bool, sites: &mut Vec<usize>) {
        self.check_elements(RSI, shape, false, sites);
        self.a.rm(Two::Store, A, field::slot());
        self.check_elements(RDI, shape, write, sites);
        self.a.rm(Two::Load, B, field::slot());
        self.behind_elements(RSI, shape);
        self.a.rm(Two::Store, C, field::slot());
        self.behind_elements(RDI, shape);
        self.a.copy(RDI, A);
        self.a.copy(RSI, B);
        self.host_string(opcode, shape);
        self.a.copy(RDI, C);
        self.a.rm(Two::Load, RSI, field::slot());
    }

    /// LODS.
    pub(super) fn load_string(&mut self, i: usize) -> Option<()> {
        let shape = self.string_shape(i).filter(|shape| !shape.repeated)?;
        let mut sites = self.check_string(i, shape);
        self.by_one_pointer(RSI, 0xac, shape, false, &mut sites);
        load_table(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    /// SCAS.
    pub(super) fn scan_string(&mut self, i: usize) -> Option<()> {
        let shape = self.string_shape(i)?;
        let once = Shape { repeated: false, ..shape };
        let mut sites = self.check_string(i, once);
        if shape.repeated {
            self.scan_page(i, shape, &mut sites);
        } else {
            self.by_one_pointer(RDI, 0xae, once, false, &mut sites);
        }
        load_table(&mut self.a);
        self.flags_changed(i);
        self.slow(i, sites);
        Some(())
    }

    /// A repeated SCAS of as many elements as there are in RDI's page, RCX at most: if that does not end it, its handler does it all.
    fn scan_page(&mut self, i: usize, shape: Shape, sites: &mut Vec<usize>) {
        self.count_in_pages(&[RDI], shape, sites);
        self.copy_pointer(A, RDI);
        sites.push(self.check(1, 1, false));
        // What RCX and RDI are to be less what they are while the host looks, to B and C.
        self.a.copy(B, RCX);
        self.a.rm(Two::Load, RCX, field::slot());
        self.a.rr(Two::Sub, B, RCX);
        self.a.copy(C, RDI);
        self.a.copy(RDI, A);
        self.a.rr(Two::Sub, C, A);
        let ended = self.host_string_until(i, 0xae, shape);
        // All of both as it was, and the handler begins anew.
        self.a.rm(Two::Load, RCX, field::slot());
        self.a.rm(Two::Lea, RCX, sum(RCX, B));
        self.a.rm(Two::Lea, RDI, sum(A, C));
        sites.push(self.a.jmp());
        self.a.bind(ended);
        self.lea(RCX, sum(RCX, B));
        self.lea(RDI, sum(RDI, C));
    }

    /// How many elements a repeated instruction is to look at, to the slot: RCX, or those up to the end of a pointer's page.
    fn count_in_pages(&mut self, pointers: &[Reg], shape: Shape, sites: &mut Vec<usize>) {
        self.copy_pointer(B, RCX);
        for &pointer in pointers {
            self.cut_to_page(pointer, shape);
        }
        self.a.compare_imm(B, 0);
        sites.push(self.a.jcc(cc::E));
        self.a.rm(Two::Store, B, field::slot());
    }

    /// The host's instruction, repeated as that of step `i` is until a comparison ends it: the branch taken if one has.
    fn host_string_until(&mut self, i: usize, opcode: u8, shape: Shape) -> usize {
        let (prefix, ended) = if self.at(i).1.has(prefix::REPNE) { (REPNE, cc::E) } else { (REP, cc::NE) };
        self.host_string_by(prefix, opcode, shape);
        self.a.jcc(ended)
    }

    /// Makes the number in [`B`] no more than that of the elements from `pointer` to its page's end. Uses [`A`].
    fn cut_to_page(&mut self, pointer: Reg, shape: Shape) {
        self.a.rr32(Two::Load, A, pointer);
        self.a.imm(Imm::And, false, A, 0xfff);
        self.a.imm(Imm::Xor, false, A, 0xfff);
        self.a.rm(Two::Lea, A, at(A, 1));
        self.a.sar(false, A, shape.scale);
        self.a.rr(Two::Cmp, A, B);
        let page_is_more = self.a.jcc(cc::A);
        self.a.copy(B, A);
        self.a.bind(page_is_more);
    }

    /// CMPS.
    pub(super) fn compare_string(&mut self, i: usize) -> Option<()> {
        let shape = self.string_shape(i)?;
        let once = Shape { repeated: false, ..shape };
        let mut sites = self.check_string(i, once);
        if shape.repeated {
            self.compare_pages(i, shape, &mut sites);
        } else {
            self.by_two_pointers(0xa6, once, false, &mut sites);
        }
        load_table(&mut self.a);
        self.flags_changed(i);
        self.slow(i, sites);
        Some(())
    }

    /// A repeated CMPS of as many elements as there are in both pages, RCX at most: if that does not end it, its handler does it all.
    fn compare_pages(&mut self, i: usize, shape: Shape, sites: &mut Vec<usize>) {
        self.count_in_pages(&[RSI, RDI], shape, sites);
        self.copy_pointer(A, RDI);
        sites.push(self.check(1, 1, false));
        self.a.rm(Two::Store, A, field::base_host(0));
        self.copy_pointer(A, RSI);
        sites.push(self.check(1, 1, false));
        // What RCX, RDI and RSI are to be less what they are while the host looks, to B, C and A.
        self.a.copy(C, RSI);
        self.a.copy(RSI, A);
        self.a.rr(Two::Sub, C, A);
        self.a.copy(A, C);
        self.a.copy(C, RDI);
        self.a.rm(Two::Load, RDI, field::base_host(0));
        self.a.rr(Two::Sub, C, RDI);
        self.a.copy(B, RCX);
        self.a.rm(Two::Load, RCX, field::slot());
        self.a.rr(Two::Sub, B, RCX);
        let ended = self.host_string_until(i, 0xa6, shape);
        // RCX is zero. If it is to be, that was all; the flags are the last comparison's.
        self.a.copy(RCX, B);
        if self.is_narrow() {
            self.a.bytes(&[0x67]);
        }
        self.a.bytes(&[0xe3, 0]); // jrcxz
        let over = self.a.here();
        // All three as they were, and the handler begins anew.
        self.a.rm(Two::Lea, RSI, sum(RSI, A));
        self.a.rm(Two::Lea, RDI, sum(RDI, C));
        self.a.rm(Two::Load, RCX, field::slot());
        self.a.rr32(Two::Load, A, RCX);
        self.a.shl32(A, shape.scale);
        self.a.rr(Two::Sub, RSI, A);
        self.a.rr(Two::Sub, RDI, A);
        self.a.rm(Two::Lea, RCX, sum(RCX, B));
        sites.push(self.a.jmp());
        self.a.code[over - 1] = (self.a.here() - over) as u8;
        self.a.bind(ended);
        self.lea(RCX, sum(RCX, B));
        self.lea(RDI, sum(RDI, C));
        self.lea(RSI, sum(RSI, A));
    }

    /// CLD.
    pub(super) fn clear_direction(&mut self) -> Option<()> {
        self.save_flags();
        self.host_flags = false;
        // It is clear nearly always.
        self.a.test_imm32(field::flags(), Rflags::DF.bits() as u32);
        let clear = self.a.jcc(cc::E);
        self.a.imm_mem32(Imm::And, field::flags(), !(Rflags::DF.bits() as i32));
        self.a.bind(clear);
        Some(())
    }

    /// STD.
    pub(super) fn set_direction(&mut self) -> Option<()> {
        self.save_flags();
        self.host_flags = false;
        self.a.imm_mem32(Imm::Or, field::flags(), Rflags::DF.bits() as i32);
        Some(())
    }
}

/// Prefixes of the host's instruction.
const REP: u8 = 0xf3;
const REPNE: u8 = 0xf2;

/// The sum of two registers, as LEA takes it.
fn sum(one: Reg, other: Reg) -> Mem {
    Mem { base: Some(one), index: Some((other, 0)), disp: 0 }
}

const _: () = assert!(RAX.0 == 0, "what STOS stores is the guest's own RAX");
