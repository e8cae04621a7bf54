//! Gathers and scatters: a loop over the elements that the mask selects, in line.
//!
//! Each element's address is looked up as any other operand's. An element goes straight between memory and vector registers, since
//! what is put together in memory piece by piece cannot be loaded as a whole before all of it is in the host's cache. So the mask register, which
//! is zero in the end, is used on the way, and what it and the destination held is put by: where an element is not found, all is made as
//! it was, and the handler begins from the start. A scatter is not repeated, as another processor may have written since: there the
//! handler goes on with the elements that are left, as after a fault (SDM 2C, VPSCATTERDD: completed elements' mask bits are clear).
//!
//! Three registers of the guest's spend the loop on the host's stack.

use iced_x86::{Code, EncodingKind, IcedError, Instruction, MemoryOperand, Register};

use super::asm::{Imm, Mem, RAX, Reg, Two, at, cc};
use super::emit::Emitter;
use super::operand::{CS, FS, GS};
use super::registers::{A, B, sized};
use super::state::field;
use crate::interp::op::{Op, ZERO};
use crate::vector::gather::Shape;
use crate::vector::pass::host_has_avx512;

/// The sum of everything in an address but the index.
const BASE: Reg = RAX;
/// Which element is next, by the lowest bit of what it has in [`LEFT`].
const NEXT: Reg = Reg(1);
/// Elements that are left: bits.
const LEFT: Reg = Reg(2);
const BORROWED: [Reg; 3] = [BASE, NEXT, LEFT];

/// Where such an instruction is left if an element is not to be had.
#[derive(Debug)]
pub(super) struct Undo {
    /// The branch.
    site: usize,
    /// What is done then: code that can lie anywhere.
    code: Vec<u8>,
    /// Number of the record whose handler is called.
    id: u64,
}

/// What translated code keeps of such an instruction in the vCPU, aligned so that no access of it is split.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Lanes {
    /// The index register; 64-bit elements have 64-bit indices here with AVX2.
    index: [u64; 8],
    /// What the destination was; what a scatter stores.
    data: [u64; 8],
    /// What the mask was, a vector register or an opmask register.
    mask: [u64; 8],
    /// A vector for each element of 32 and of 64 bits, with all bits of that element set.
    narrow: [[u32; 8]; 8],
    wide: [[u64; 4]; 4],
    zero: [u64; 4],
}

impl Lanes {
    /// Nothing kept.
    pub(crate) const fn new() -> Self {
        let (mut narrow, mut wide) = ([[0; 8]; 8], [[0; 4]; 4]);
        let mut i = 0;
        while i < 8 {
            narrow[i][i] = u32::MAX;
            wide[i / 2][i / 2] = u64::MAX;
            i += 1;
        }
        Self { index: [0; 8], data: [0; 8], mask: [0; 8], narrow, wide, zero: [0; 4] }
    }
}

/// Fields of [`Lanes`].
mod lane {
    use super::{Lanes, Mem, field};

    macro_rules! fields {
        ($($name:ident),*) => {$(
            pub(super) fn $name() -> Mem {
                field::lanes(std::mem::offset_of!(Lanes, $name))
            }
        )*};
    }

    fields!(index, data, mask, narrow, wide, zero);
}

/// `mem`, with [`NEXT`] times `1 << scale` added, and `more`.
fn indexed(mem: Mem, scale: u8, more: i32) -> Mem {
    Mem { index: Some((NEXT, scale)), disp: mem.disp + more, ..mem }
}

fn operand(mem: Mem) -> MemoryOperand {
    let register = |reg: Option<Reg>| reg.map_or(Register::None, |reg| sized(reg, 8));
    let (index, scale) = mem.index.map_or((None, 0), |(reg, scale)| (Some(reg), scale));
    MemoryOperand::new(
        register(mem.base),
        register(index),
        1 << scale,
        mem.disp.into(),
        if mem.disp == 0 { 0 } else { 8 },
        false,
        Register::None,
    )
}

fn xmm(number: usize) -> Register {
    Register::XMM0 + number as u32
}

fn ymm(number: usize) -> Register {
    Register::YMM0 + number as u32
}

fn zmm(number: usize) -> Register {
    Register::ZMM0 + number as u32
}

fn k(number: usize) -> Register {
    Register::K0 + number as u32
}

impl Shape {
    /// Bytes of an element.
    fn element(self) -> usize {
        if self.wide_element { 8 } else { 4 }
    }

    /// Bytes of all elements.
    fn bytes(self) -> usize {
        self.count * self.element()
    }

    /// A bit for each element.
    fn bits(self) -> i32 {
        (1 << self.count) - 1
    }
}

impl Emitter<'_> {
    fn encode_new(&mut self, instruction: Result<Instruction, IcedError>) -> Option<()> {
        self.encode(&instruction.ok()?)
    }

    /// All of a vector register to memory, or from there; of what there is where AVX-512 is not.
    fn move_all(&mut self, number: usize, mem: Mem, store: bool) -> Option<()> {
        let mem = operand(mem);
        self.encode_new(match (host_has_avx512(), store) {
            (true, true) => Instruction::with2(Code::EVEX_Vmovdqu64_zmmm512_k1z_zmm, mem, zmm(number)),
            (true, false) => Instruction::with2(Code::EVEX_Vmovdqu64_zmm_k1z_zmmm512, zmm(number), mem),
            (false, true) => Instruction::with2(Code::VEX_Vmovdqu_ymmm256_ymm, mem, ymm(number)),
            (false, false) => Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, ymm(number), mem),
        })
    }

    /// An opmask register to memory, or from there.
    fn move_mask(&mut self, number: usize, mem: Mem, store: bool) -> Option<()> {
        let mem = operand(mem);
        self.encode_new(if store {
            Instruction::with2(Code::VEX_Kmovq_m64_kr, mem, k(number))
        } else {
            Instruction::with2(Code::VEX_Kmovq_kr_km64, k(number), mem)
        })
    }

    /// A gather.
    pub(super) fn gather(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let (shape, dst) = (Shape::new(op), usize::from(op.dst) & 31);
        if op.code.encoding() == EncodingKind::EVEX {
            self.gather_by_opmask(i, shape, dst)
        } else {
            self.gather_by_signs(i, shape, dst, usize::from(op.src) & 15)
        }
    }

    /// AVX2. Elements are told by the signs of their bytes, of which the highest of each counts: a multiple of the bit's number is
    /// the distance of all that belongs to the element.
    fn gather_by_signs(&mut self, i: usize, shape: Shape, dst: usize, mask: usize) -> Option<()> {
        let wide = shape.wide_element;
        let long = shape.bytes() > 16;
        let register = if long { ymm } else { xmm };
        let (dst_register, mask_register) = (register(dst), register(mask));
        self.begin(i)?;
        self.move_all(dst, lane::data(), true)?;
        self.move_all(mask, lane::mask(), true)?;
        let code = if long { Code::VEX_Vpmovmskb_r32_ymm } else { Code::VEX_Vpmovmskb_r32_xmm };
        self.encode_new(Instruction::with2(code, sized(LEFT, 4), mask_register))?;
        let signs = if wide { 0x8080_8080_u64 } else { 0x8888_8888 } & ((1 << shape.bytes()) - 1);
        // Elements selected become zero.
        let code = match (wide, long) {
            (false, false) => Code::VEX_Vblendvps_xmm_xmm_xmmm128_xmm,
            (false, true) => Code::VEX_Vblendvps_ymm_ymm_ymmm256_ymm,
            (true, false) => Code::VEX_Vblendvpd_xmm_xmm_xmmm128_xmm,
            (true, true) => Code::VEX_Vblendvpd_ymm_ymm_ymmm256_ymm,
        };
        let zero = operand(lane::zero());
        self.encode_new(Instruction::with4(code, dst_register, dst_register, zero, mask_register))?;
        if wide && !shape.wide_index {
            let code = if long { Code::VEX_Vpmovsxdq_ymm_xmmm128 } else { Code::VEX_Vpmovsxdq_xmm_xmmm64 };
            self.encode_new(Instruction::with2(code, mask_register, xmm(shape.index)))?;
            self.move_all(mask, lane::index(), true)?;
        } else {
            self.move_all(shape.index, lane::index(), true)?;
        }
        self.a.imm(Imm::And, false, LEFT, signs as u32 as i32);
        let none = self.a.jcc(cc::E);

        let again = self.a.here();
        self.next_element();
        match (wide, shape.wide_index) {
            (false, false) => self.a.load_signed(A, indexed(lane::index(), 0, -3)),
            (false, true) => self.a.rm(Two::Load, A, indexed(lane::index(), 1, -6)),
            (true, _) => self.a.rm(Two::Load, A, indexed(lane::index(), 0, -7)),
        }
        let miss = self.element_address(i, shape, false);
        let (broadcast, row) = match (wide, long) {
            (false, false) => (Code::VEX_Vpbroadcastd_xmm_xmmm32, indexed(lane::narrow(), 3, -24)),
            (false, true) => (Code::VEX_Vpbroadcastd_ymm_xmmm32, indexed(lane::narrow(), 3, -24)),
            (true, false) => (Code::VEX_Vpbroadcastq_xmm_xmmm64, indexed(lane::wide(), 2, -28)),
            (true, true) => (Code::VEX_Vpbroadcastq_ymm_xmmm64, indexed(lane::wide(), 2, -28)),
        };
        self.encode_new(Instruction::with2(broadcast, mask_register, operand(at(A, 0))))?;
        let and = if long { Code::VEX_Vpand_ymm_ymm_ymmm256 } else { Code::VEX_Vpand_xmm_xmm_xmmm128 };
        self.encode_new(Instruction::with3(and, mask_register, mask_register, operand(row)))?;
        let or = if long { Code::VEX_Vpor_ymm_ymm_ymmm256 } else { Code::VEX_Vpor_xmm_xmm_xmmm128 };
        self.encode_new(Instruction::with3(or, dst_register, dst_register, mask_register))?;
        self.next_or_done(again, none);
        if shape.bytes() == 8 {
            self.encode_new(Instruction::with2(Code::VEX_Vmovq_xmm_xmmm64, xmm(dst), xmm(dst)))?;
        }
        self.encode_new(Instruction::with3(
            Code::VEX_Vpxor_xmm_xmm_xmmm128,
            xmm(mask),
            xmm(mask),
            xmm(mask),
        ))?;
        self.finish_elements(i, miss, |e| {
            e.move_all(dst, lane::data(), false)?;
            e.move_all(mask, lane::mask(), false)
        })
    }

    /// AVX-512.
    fn gather_by_opmask(&mut self, i: usize, shape: Shape, dst: usize) -> Option<()> {
        let mask = shape.opmask;
        self.begin(i)?;
        self.move_all(dst, lane::data(), true)?;
        self.move_mask(mask, lane::mask(), true)?;
        let none = self.begin_by_opmask(shape)?;

        let again = self.a.here();
        self.next_element();
        self.load_index(shape);
        let miss = self.element_address(i, shape, false);
        self.encode_new(Instruction::with2(Code::VEX_Blsi_r32_rm32, sized(NEXT, 4), sized(LEFT, 4)))?;
        self.encode_new(Instruction::with2(Code::VEX_Kmovw_kr_r32, k(mask), sized(NEXT, 4)))?;
        let (code, register) = match (shape.wide_element, shape.bytes()) {
            (false, 64) => (Code::EVEX_Vpbroadcastd_zmm_k1z_xmmm32, zmm(dst)),
            (false, 32) => (Code::EVEX_Vpbroadcastd_ymm_k1z_xmmm32, ymm(dst)),
            (false, _) => (Code::EVEX_Vpbroadcastd_xmm_k1z_xmmm32, xmm(dst)),
            (true, 64) => (Code::EVEX_Vpbroadcastq_zmm_k1z_xmmm64, zmm(dst)),
            (true, 32) => (Code::EVEX_Vpbroadcastq_ymm_k1z_xmmm64, ymm(dst)),
            (true, _) => (Code::EVEX_Vpbroadcastq_xmm_k1z_xmmm64, xmm(dst)),
        };
        let mut load = Instruction::with2(code, register, operand(at(A, 0))).ok()?;
        load.set_op_mask(k(mask));
        self.encode(&load)?;
        self.next_or_done(again, none);
        // What lies above the elements becomes zero, if there are none as well.
        match shape.bytes() {
            64 => {}
            32 => {
                self.encode_new(Instruction::with2(Code::EVEX_Vmovdqa64_ymm_k1z_ymmm256, ymm(dst), ymm(dst)))?
            }
            16 => {
                self.encode_new(Instruction::with2(Code::EVEX_Vmovdqa64_xmm_k1z_xmmm128, xmm(dst), xmm(dst)))?
            }
            _ => self.encode_new(Instruction::with2(Code::EVEX_Vmovq_xmm_xmmm64, xmm(dst), xmm(dst)))?,
        }
        self.encode_new(Instruction::with3(Code::VEX_Kxorw_kr_kr_kr, k(mask), k(mask), k(mask)))?;
        self.finish_elements(i, miss, |e| {
            e.move_all(dst, lane::data(), false)?;
            e.move_mask(mask, lane::mask(), false)
        })
    }

    /// A scatter. Elements are stored from the lowest on, so the highest of those that overlap stays.
    pub(super) fn scatter(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let (shape, src) = (Shape::new(op), usize::from(op.src) & 31);
        let mask = shape.opmask;
        self.begin(i)?;
        self.move_all(src, lane::data(), true)?;
        let none = self.begin_by_opmask(shape)?;

        let again = self.a.here();
        self.next_element();
        self.load_index(shape);
        let miss = self.element_address(i, shape, true);
        if shape.wide_element {
            self.a.rm(Two::Load, B, indexed(lane::data(), 3, 0));
            self.a.rm(Two::Store, B, at(A, 0));
        } else {
            self.a.rm32(Two::Load, B, indexed(lane::data(), 2, 0));
            self.a.rm32(Two::Store, B, at(A, 0));
        }
        self.next_or_done(again, none);
        self.encode_new(Instruction::with3(Code::VEX_Kxorw_kr_kr_kr, k(mask), k(mask), k(mask)))?;
        self.finish_elements(i, miss, |e| {
            // All bits from the lowest on that is left: some above the elements may be set.
            e.a.rr32(Two::Xor, NEXT, NEXT);
            e.a.rr(Two::Sub, NEXT, LEFT);
            e.a.rr(Two::Or, NEXT, LEFT);
            e.encode_new(Instruction::with2(Code::VEX_Kmovq_r64_kr, sized(LEFT, 8), k(mask)))?;
            e.a.rr(Two::And, LEFT, NEXT);
            e.encode_new(Instruction::with2(Code::VEX_Kmovq_kr_r64, k(mask), sized(LEFT, 8)))
        })
    }

    /// What comes first: vector registers are there, flags are stored, and [`BORROWED`] are free, the first with its sum.
    fn begin(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let segment = match op.segment {
            FS | GS if self.is_narrow() || op.address_mask != u64::MAX => return None,
            FS | GS => Some(op.segment),
            CS => return None,
            _ => None,
        };
        let (next, op) = (step.next, Op { index: ZERO as u8, ..*op });
        self.want(step.facts.passed?.units, i);
        self.keep_flags(i);
        self.host_flags = false;
        self.effective_address(A, &op, next, false)?;
        if let Some(segment) = segment {
            self.a.rm(Two::Add, A, field::segment_base(segment));
        }
        for reg in BORROWED {
            self.a.push(reg);
        }
        self.a.copy(BASE, A);
        Some(())
    }

    /// Index and mask where the loop has them; the branch returned is taken if no element is selected.
    fn begin_by_opmask(&mut self, shape: Shape) -> Option<usize> {
        self.move_all(shape.index, lane::index(), true)?;
        self.encode_new(Instruction::with2(Code::VEX_Kmovw_r32_kr, sized(LEFT, 4), k(shape.opmask)))?;
        self.a.imm(Imm::And, false, LEFT, shape.bits());
        Some(self.a.jcc(cc::E))
    }

    fn next_element(&mut self) {
        // TZCNT.
        self.a.bytes(&[0xf3, 0x0f, 0xbc, 0xc0 | NEXT.0 << 3 | LEFT.0]);
    }

    /// The next element's index to [`A`].
    fn load_index(&mut self, shape: Shape) {
        if shape.wide_index {
            self.a.rm(Two::Load, A, indexed(lane::index(), 3, 0));
        } else {
            self.a.load_signed(A, indexed(lane::index(), 2, 0));
        }
    }

    /// The host's address of the element with the index in [`A`], to there, unless the branch returned is taken. Uses [`B`].
    fn element_address(&mut self, i: usize, shape: Shape, write: bool) -> usize {
        let op = self.at(i).1;
        let sum = Mem { base: Some(BASE), index: Some((A, op.scale)), disp: 0 };
        if op.address_mask == u64::MAX {
            self.a.rm(Two::Lea, A, sum);
        } else {
            self.a.rm32(Two::Lea, A, sum);
        }
        self.check(shape.element(), 1, write)
    }

    /// Goes on at `again` if an element is left after this one; `none` comes here as well.
    fn next_or_done(&mut self, again: usize, none: usize) {
        // BLSR, VEX.LZ.0F38.W0 F3 /1.
        self.a.bytes(&[0xc4, 0xe2, (!LEFT.0 & 15) << 3, 0xf3, 0xc0 | 1 << 3 | LEFT.0]);
        self.a.jcc_to(cc::NE, again as i64);
        self.a.bind(none);
    }

    /// What comes last, and what is done where `miss` is taken: `undo` may use all of [`BORROWED`].
    fn finish_elements(
        &mut self,
        i: usize,
        miss: usize,
        undo: impl FnOnce(&mut Self) -> Option<()>,
    ) -> Option<()> {
        let give_back = |e: &mut Self| BORROWED.into_iter().rev().for_each(|reg| e.a.pop(reg));
        give_back(self);
        let end = self.a.here();
        undo(self)?;
        give_back(self);
        let code = self.a.code.split_off(end);
        let id = self.site_back(i, |_| ());
        self.undos.push(Undo { site: miss, code, id });
        Some(())
    }

    /// The ways out of line where an element is not to be had.
    pub(super) fn emit_undos(&mut self) {
        for Undo { site, code, id } in std::mem::take(&mut self.undos) {
            self.a.bind(site);
            self.a.bytes(&code);
            self.a.constant(A, id);
            self.jump_out(self.stubs.misses.slow);
        }
    }
}
