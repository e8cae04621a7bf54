//! A small assembler for the fixed sequences around translated instructions.
//!
//! It knows the handful of instructions that checks, spills and exits consist of; guest instructions themselves are
//! re-encoded by the decoder's library.

/// A host register by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reg(pub(super) u8);

/// RAX.
pub(super) const RAX: Reg = Reg(0);
/// RSP, the host's stack.
pub(super) const RSP: Reg = Reg(4);
/// RSI.
pub(super) const RSI: Reg = Reg(6);
/// RDI.
pub(super) const RDI: Reg = Reg(7);

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mem {
    pub(super) base: Option<Reg>,
    pub(super) index: Option<(Reg, u8)>,
    pub(super) disp: i32,
}

/// `[base + disp]`.
#[inline(always)]
pub(super) fn at(base: Reg, disp: i32) -> Mem {
    Mem { base: Some(base), index: None, disp }
}

/// A two-operand instruction with a 32- or 64-bit register and a register or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Two {
    /// `mov reg, rm`
    Load = 0x8b,
    /// `mov rm, reg`
    Store = 0x89,
    /// `lea reg, rm`
    Lea = 0x8d,
    /// `add reg, rm`
    Add = 0x03,
    /// `and reg, rm`
    And = 0x23,
    /// `sub reg, rm`
    Sub = 0x2b,
    /// `or reg, rm`
    Or = 0x0b,
    /// `xor reg, rm`
    Xor = 0x33,
    /// `cmp reg, rm`
    Cmp = 0x3b,
    /// `test rm, reg`
    Test = 0x85,
}

/// An instruction with an immediate: the opcode's extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Imm {
    /// `add`
    Add = 0,
    /// `or`
    Or = 1,
    /// `and`
    And = 4,
    /// `sub`
    Sub = 5,
    /// `xor`
    Xor = 6,
    /// `cmp`
    Cmp = 7,
}

/// Conditions, as Jcc's opcode numbers them.
pub(super) mod cc {
    pub(in super::super) const B: u8 = 2;
    pub(in super::super) const AE: u8 = 3;
    pub(in super::super) const E: u8 = 4;
    pub(in super::super) const NE: u8 = 5;
    pub(in super::super) const BE: u8 = 6;
    pub(in super::super) const A: u8 = 7;
    pub(in super::super) const L: u8 = 12;
}

/// A REX prefix, 0x40 if none is needed.
#[inline(always)]
fn rex(wide: bool, reg: u8, index: u8, rm: u8) -> u8 {
    0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | rm >> 3
}

/// REX, if one is needed, and an opcode: the bytes, and how many.
#[inline(always)]
fn head(rex: u8, opcode: u16) -> (u32, usize) {
    let length = if opcode > 0xff { 2 } else { 1 };
    if rex == 0x40 { (opcode.into(), length) } else { (u32::from(opcode) << 8 | u32::from(rex), length + 1) }
}

/// Bytes of what [`Assembler::constant_and_jump`] emits.
pub(super) const CONSTANT_AND_JUMP: usize = 11;

/// An opcode behind 0x0f.
const fn escaped(opcode: u8) -> u16 {
    0x0f | (opcode as u16) << 8
}

/// A buffer of code and the helpers that fill it.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    pub(super) code: Vec<u8>,
    /// Where the second part starts, once it has been begun: it will be moved away from the first.
    split: Option<usize>,
    /// Branches from one part to the other: where their displacements are, and their targets. Targets before the buffer are
    /// outside it, and stay where they are, as the first part does.
    branches: Vec<(usize, i64)>,
    /// The host has RORX.
    bmi2: bool,
}

impl Assembler {
    /// Where the next instruction goes.
    pub(super) fn here(&self) -> usize {
        self.code.len()
    }

    /// Raw bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// The low `length` bytes of a number, lowest first.
    #[inline(always)]
    pub(super) fn put(&mut self, bytes: u128, length: usize) {
        let end = self.code.len() + length;
        // All of them at once: what is too much is written over, or never looked at.
        self.code.extend_from_slice(&bytes.to_le_bytes());
        self.code.truncate(end);
    }

    /// REX, an opcode of one or two bytes, and what follows: a number of `length` bytes.
    #[inline(always)]
    fn encoded(&mut self, rex: u8, opcode: u16, rest: u64, length: usize) {
        let (head, count) = head(rex, opcode);
        self.put(u128::from(head) | u128::from(rest) << (8 * count), count + length);
    }

    #[inline(always)]
    fn with_reg(&mut self, wide: bool, opcode: u16, reg: u8, rm: Reg) {
        let rest = 0xc0 | (reg & 7) << 3 | rm.0 & 7;
        self.encoded(rex(wide, reg, 0, rm.0), opcode, rest.into(), 1);
    }

    // In line, so that an instruction with constant operands is a constant.
    #[inline(always)]
    fn with_mem(&mut self, wide: bool, opcode: u16, reg: u8, mem: Mem) {
        let (Some(Reg(base)), None) = (mem.base, mem.index) else {
            return self.with_index(wide, opcode, reg, mem);
        };
        // RSP and R12 want a SIB byte.
        let scaled = base & 7 == 4;
        let short = i32::from(mem.disp as i8) == mem.disp;
        let (mode, length) = match mem.disp {
            0 if base & 7 != 5 => (0, 0),
            _ if short => (0x40, 1),
            _ => (0x80, 4),
        };
        let modrm = mode | (reg & 7) << 3 | base & 7;
        let (rest, count) = if scaled { (u64::from(modrm) | 0x2400, 2) } else { (u64::from(modrm), 1) };
        let rest = rest | u64::from(mem.disp as u32) << (8 * count);
        self.encoded(rex(wide, reg, 0, base), opcode, rest, count + length);
    }

    /// Likewise, with an index or without a base.
    fn with_index(&mut self, wide: bool, opcode: u16, reg: u8, mem: Mem) {
        let (index, scale) = mem.index.map_or((4, 0), |(r, s)| (r.0, s));
        let base = mem.base.map_or(0, |r| r.0);
        let index_bit = if mem.index.is_some() { index } else { 0 };
        let (low, mode, length) = match (mem.base, i8::try_from(mem.disp)) {
            // No base: a SIB byte with base 5 and a 32-bit displacement.
            (None, _) => (5, 0, 4),
            (Some(_), Ok(0)) if base & 7 != 5 => (base & 7, 0, 0),
            (Some(_), Ok(_)) => (base & 7, 0x40, 1),
            (Some(_), Err(_)) => (base & 7, 0x80, 4),
        };
        let modrm = mode | (reg & 7) << 3 | 4;
        let sib = scale << 6 | (index & 7) << 3 | low;
        let rest = u64::from(modrm) | u64::from(sib) << 8 | u64::from(mem.disp as u32) << 16;
        self.encoded(rex(wide, reg, index_bit, base), opcode, rest, 2 + length);
    }

    /// 64-bit, register and register.
    #[inline(always)]
    pub(super) fn rr(&mut self, two: Two, reg: Reg, rm: Reg) {
        self.with_reg(true, two as u16, reg.0, rm);
    }

    /// 32-bit, register and register.
    pub(super) fn rr32(&mut self, two: Two, reg: Reg, rm: Reg) {
        self.with_reg(false, two as u16, reg.0, rm);
    }

    /// 64-bit, register and memory.
    #[inline(always)]
    pub(super) fn rm(&mut self, two: Two, reg: Reg, mem: Mem) {
        self.with_mem(true, two as u16, reg.0, mem);
    }

    /// 32-bit, register and memory.
    pub(super) fn rm32(&mut self, two: Two, reg: Reg, mem: Mem) {
        self.with_mem(false, two as u16, reg.0, mem);
    }

    /// `mov to, from`, nothing if they are the same.
    pub(super) fn copy(&mut self, to: Reg, from: Reg) {
        if to != from {
            self.rr(Two::Load, to, from);
        }
    }

    /// `xchg a, b`.
    pub(super) fn exchange(&mut self, a: Reg, b: Reg) {
        self.with_reg(true, 0x87, a.0, b);
    }

    /// An immediate on a register, 32 or 64 bits wide.
    pub(super) fn imm(&mut self, imm: Imm, wide: bool, rm: Reg, value: i32) {
        match i8::try_from(value) {
            Ok(value) => {
                self.with_reg(wide, 0x83, imm as u8, rm);
                self.code.push(value as u8);
            }
            Err(_) => {
                self.with_reg(wide, 0x81, imm as u8, rm);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// An immediate on 64 bits in memory.
    #[inline(always)]
    pub(super) fn imm_mem(&mut self, imm: Imm, mem: Mem, value: i32) {
        match i8::try_from(value) {
            Ok(value) => {
                self.with_mem(true, 0x83, imm as u8, mem);
                self.code.push(value as u8);
            }
            Err(_) => {
                self.with_mem(true, 0x81, imm as u8, mem);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// An immediate on 32 bits in memory.
    #[inline(always)]
    pub(super) fn imm_mem32(&mut self, imm: Imm, mem: Mem, value: i32) {
        match i8::try_from(value) {
            Ok(value) => {
                self.with_mem(false, 0x83, imm as u8, mem);
                self.code.push(value as u8);
            }
            Err(_) => {
                self.with_mem(false, 0x81, imm as u8, mem);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// `test reg8, value`: the register's low byte.
    pub(super) fn test_low(&mut self, reg: Reg, value: u8) {
        debug_assert!(reg.0 >= 8, "lower registers' bytes want another encoding");
        self.with_reg(false, 0xf6, 0, reg);
        self.code.push(value);
    }

    /// `cmp reg, value`, 64 bits wide.
    pub(super) fn compare_imm(&mut self, reg: Reg, value: i32) {
        self.imm(Imm::Cmp, true, reg, value);
    }

    /// `test reg, value`, 64 bits wide.
    pub(super) fn test_imm(&mut self, reg: Reg, value: i32) {
        self.with_reg(true, 0xf7, 0, reg);
        self.bytes(&value.to_le_bytes());
    }

    /// `cmp byte ptr mem, value`.
    pub(super) fn compare_byte(&mut self, mem: Mem, value: u8) {
        self.with_mem(false, 0x80, Imm::Cmp as u8, mem);
        self.code.push(value);
    }

    /// `test byte ptr mem, value`.
    pub(super) fn test_byte(&mut self, mem: Mem, value: u8) {
        self.with_mem(false, 0xf6, 0, mem);
        self.code.push(value);
    }

    /// `mov byte ptr mem, value`.
    pub(super) fn store_byte(&mut self, mem: Mem, value: u8) {
        self.with_mem(false, 0xc6, 0, mem);
        self.code.push(value);
    }

    /// `movzx reg32, byte ptr mem`.
    pub(super) fn load_byte(&mut self, reg: Reg, mem: Mem) {
        self.with_mem(false, escaped(0xb6), reg.0, mem);
    }

    /// `test dword ptr mem, value`.
    pub(super) fn test_imm32(&mut self, mem: Mem, value: u32) {
        self.with_mem(false, 0xf7, 0, mem);
        self.bytes(&value.to_le_bytes());
    }

    /// `cmp dword ptr mem, value`, with all four bytes of the value.
    pub(super) fn compare_imm32(&mut self, mem: Mem, value: u32) {
        self.with_mem(false, 0x81, Imm::Cmp as u8, mem);
        self.bytes(&value.to_le_bytes());
    }

    /// `push reg`.
    pub(super) fn push(&mut self, reg: Reg) {
        self.encoded(rex(false, 0, 0, reg.0), u16::from(0x50 | reg.0 & 7), 0, 0);
    }

    /// `pop reg`.
    pub(super) fn pop(&mut self, reg: Reg) {
        self.encoded(rex(false, 0, 0, reg.0), u16::from(0x58 | reg.0 & 7), 0, 0);
    }

    /// `ret`.
    pub(super) fn ret(&mut self) {
        self.code.push(0xc3);
    }

    /// `lea reg, [rip + rel32]`, as [`Assembler::jcc`].
    pub(super) fn lea_rip(&mut self, reg: Reg) -> usize {
        self.encoded(rex(true, reg.0, 0, 0), 0x8d, u64::from((reg.0 & 7) << 3 | 5), 5);
        self.here() - 4
    }

    /// `mov qword ptr mem, value`, the value below 2^31.
    pub(super) fn store_imm32_wide(&mut self, mem: Mem, value: u32) {
        self.with_mem(true, 0xc7, 0, mem);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov dword ptr mem, value`.
    pub(super) fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.with_mem(false, 0xc7, 0, mem);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov reg, value`, in the shortest form.
    pub(super) fn constant(&mut self, reg: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.encoded(rex(false, 0, 0, reg.0), u16::from(0xb8 | reg.0 & 7), value.into(), 4);
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.with_reg(true, 0xc7, 0, reg);
            self.bytes(&value.to_le_bytes());
        } else {
            self.wide_constant(reg, value);
        }
    }

    /// `mov reg, value` with all eight bytes of the value.
    pub(super) fn wide_constant(&mut self, reg: Reg, value: u64) {
        self.encoded(rex(true, 0, 0, reg.0), u16::from(0xb8 | reg.0 & 7), 0, 0);
        self.bytes(&value.to_le_bytes());
    }

    /// `shr reg32, count`.
    pub(super) fn shr32(&mut self, reg: Reg, count: u8) {
        self.with_reg(false, 0xc1, 5, reg);
        self.code.push(count);
    }

    /// Bits of `from` from `count` on to the low bits of `to`, 32 bits wide; what comes into the high ones is not said.
    pub(super) fn shifted(&mut self, to: Reg, from: Reg, count: u8) {
        if self.bmi2 {
            // RORX, VEX.LZ.F2.0F3A.W0 F0 /r ib (SDM 2B).
            let first = (!(to.0 >> 3) & 1) << 7 | 1 << 6 | (!(from.0 >> 3) & 1) << 5 | 3;
            self.bytes(&[0xc4, first, 0x7b, 0xf0, 0xc0 | (to.0 & 7) << 3 | from.0 & 7, count]);
        } else {
            self.rr32(Two::Load, to, from);
            self.shr32(to, count);
        }
    }

    /// `shr reg, count`.
    pub(super) fn shr(&mut self, reg: Reg, count: u8) {
        self.with_reg(true, 0xc1, 5, reg);
        self.code.push(count);
    }

    /// `mul qword ptr mem`: RAX times that to RDX and RAX.
    pub(super) fn multiply(&mut self, mem: Mem) {
        self.with_mem(true, 0xf7, 4, mem);
    }

    /// `jmp reg`.
    pub(super) fn jmp_reg(&mut self, reg: Reg) {
        self.with_reg(false, 0xff, 4, reg);
    }

    /// `call reg`.
    pub(super) fn call_reg(&mut self, reg: Reg) {
        self.with_reg(false, 0xff, 2, reg);
    }

    /// `movsxd to, from32`.
    pub(super) fn sign_extend(&mut self, to: Reg, from: Reg) {
        self.with_reg(true, 0x63, to.0, from);
    }

    /// `movsxd reg, dword ptr mem`.
    pub(super) fn load_signed(&mut self, reg: Reg, mem: Mem) {
        self.with_mem(true, 0x63, reg.0, mem);
    }

    /// `shl reg32, count`.
    pub(super) fn shl32(&mut self, reg: Reg, count: u8) {
        self.with_reg(false, 0xc1, 4, reg);
        self.code.push(count);
    }

    /// `sar reg, count`, 32 or 64 bits wide.
    pub(super) fn sar(&mut self, wide: bool, reg: Reg, count: u8) {
        self.with_reg(wide, 0xc1, 7, reg);
        self.code.push(count);
    }

    /// `mov word ptr mem, reg`.
    pub(super) fn store_word(&mut self, reg: Reg, mem: Mem) {
        self.code.push(0x66);
        self.with_mem(false, 0x89, reg.0, mem);
    }

    /// `mov reg16, word ptr mem`: the rest of the register stays.
    pub(super) fn load_low_word(&mut self, reg: Reg, mem: Mem) {
        self.code.push(0x66);
        self.with_mem(false, 0x8b, reg.0, mem);
    }

    /// `movzx reg, word ptr mem`.
    pub(super) fn load_word(&mut self, reg: Reg, mem: Mem) {
        self.with_mem(false, escaped(0xb7), reg.0, mem);
    }

    /// `jcc rel32`, to be filled in by [`Assembler::patch`]: where its displacement is.
    pub(super) fn jcc(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `jmp rel32`, as [`Assembler::jcc`].
    pub(super) fn jmp(&mut self) -> usize {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `call rel32`, as [`Assembler::jcc`].
    pub(super) fn call(&mut self) -> usize {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `call qword ptr mem`.
    pub(super) fn call_mem(&mut self, mem: Mem) {
        self.with_mem(false, 0xff, 2, mem);
    }

    /// `jmp qword ptr mem`.
    pub(super) fn jmp_mem(&mut self, mem: Mem) {
        self.with_mem(false, 0xff, 4, mem);
    }

    /// Makes the branch whose displacement is at `site` go to `target`, which may lie outside the buffer.
    pub(super) fn patch(&mut self, site: usize, target: i64) {
        self.note(site, target);
        self.displace(site, target - (site as i64 + 4));
    }

    #[inline(always)]
    fn note(&mut self, site: usize, target: i64) {
        if let Some(split) = self.split
            && (site < split) != (target < split as i64)
        {
            self.branches.push((site, target));
        }
    }

    /// A branch of `length` opcode bytes to a target that is known.
    #[inline(always)]
    fn branch_to(&mut self, opcode: u16, length: usize, target: i64) {
        let site = self.here() + length;
        let distance = (target - (site as i64 + 4)) as u32;
        self.put(u128::from(opcode) | u128::from(distance) << (8 * length), length + 4);
        self.note(site, target);
    }

    /// Writes the displacement of the branch at `site`.
    #[inline(always)]
    pub(super) fn displace(&mut self, site: usize, distance: i64) {
        self.code[site..site + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// An empty buffer with room.
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self {
            code: Vec::with_capacity(bytes),
            split: None,
            branches: Vec::new(),
            bmi2: is_x86_feature_detected!("bmi2"),
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.code.clear();
        self.branches.clear();
        self.split = None;
    }

    /// Drops what was emitted behind `length` bytes.
    pub(super) fn truncate(&mut self, length: usize) {
        self.code.truncate(length);
        while self.branches.last().is_some_and(|(site, _)| *site >= length) {
            self.branches.pop();
        }
    }

    /// Begins the second part, at `split`: nothing has been emitted behind it that leads to the first.
    pub(super) fn begin_part(&mut self, split: usize) {
        self.split = Some(split);
    }

    /// Makes branches right for code whose second part lies `moved` bytes behind where it was.
    pub(super) fn move_part(&mut self, moved: i64) {
        for &(site, target) in &self.branches {
            let distance = target - (site as i64 + 4);
            // It is the branch that moves, or what it leads to.
            let back = self.split.is_some_and(|split| site >= split);
            let distance = if back { distance - moved } else { distance + moved };
            self.code[site..site + 4].copy_from_slice(&(distance as i32).to_le_bytes());
        }
        self.branches.clear();
        self.split = None;
    }

    /// `jcc target`, which is there already.
    pub(super) fn jcc_to(&mut self, condition: u8, target: i64) {
        self.branch_to(escaped(0x80 | condition), 2, target);
    }

    /// `jmp target`, likewise.
    pub(super) fn jmp_to(&mut self, target: i64) {
        self.branch_to(0xe9, 1, target);
    }

    /// `mov reg32, value; jmp target`, likewise; the register is one of the upper eight.
    #[inline(always)]
    pub(super) fn constant_and_jump(&mut self, reg: Reg, value: u32, target: i64) {
        debug_assert!(reg.0 >= 8, "lower registers want another encoding");
        let site = self.here() + 7;
        let distance = (target - (site as i64 + 4)) as u32;
        let head = u128::from(0x41 | u16::from(0xb8 | reg.0 & 7) << 8);
        self.put(head | u128::from(value) << 16 | 0xe9 << 48 | u128::from(distance) << 56, CONSTANT_AND_JUMP);
        self.note(site, target);
    }

    /// `call target`, likewise.
    pub(super) fn call_to(&mut self, target: i64) {
        self.branch_to(0xe8, 1, target);
    }

    /// Makes the branch at `site` come here.
    pub(super) fn bind(&mut self, site: usize) {
        self.patch(site, self.here() as i64);
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

    use super::*;

    fn text(code: &[u8]) -> Vec<String> {
        let mut formatter = GasFormatter::new();
        Decoder::with_ip(64, code, 0, DecoderOptions::NONE)
            .iter()
            .map(|i| {
                let mut s = String::new();
                formatter.format(&i, &mut s);
                s
            })
            .collect()
    }

    #[test]
    fn every_addressing_form_decodes_to_what_was_asked() {
        let mut a = Assembler::default();
        for base in [Reg(0), RSP, Reg(5), Reg(12), Reg(13), Reg(15)] {
            for disp in [0, 8, -129, 0x1000] {
                a.rm(Two::Load, Reg(9), at(base, disp));
            }
        }
        a.rm(Two::Lea, Reg(8), Mem { base: None, index: Some((Reg(12), 3)), disp: -4 });
        a.rm32(Two::Lea, Reg(8), Mem { base: Some(Reg(13)), index: Some((Reg(5), 1)), disp: 0 });
        a.rm(Two::Load, Reg(8), Mem { base: None, index: None, disp: 0x20 });
        let text = text(&a.code);
        assert_eq!(text.len(), 27);
        assert_eq!(text[0], "mov (%rax),%r9");
        assert_eq!(text[4], "mov (%rsp),%r9");
        assert_eq!(text[8], "mov (%rbp),%r9");
        assert_eq!(text[14], "mov -0x81(%r12),%r9");
        assert_eq!(text[16], "mov (%r13),%r9");
        assert_eq!(text[23], "mov 0x1000(%r15),%r9");
        assert_eq!(text[24], "lea -4(,%r12,8),%r8");
        assert_eq!(text[25], "lea (%r13,%rbp,2),%r8d");
        assert_eq!(text[26], "mov 0x20,%r8");
    }

    #[test]
    fn constants_take_the_form_that_holds_them() {
        let mut a = Assembler::default();
        for value in [0, 0xffff_ffff, u64::MAX, 0x1_2345_6789] {
            a.constant(Reg(9), value);
        }
        let text = text(&a.code);
        assert_eq!(
            text,
            ["mov $0,%r9d", "mov $0xFFFFFFFF,%r9d", "mov $0xFFFFFFFFFFFFFFFF,%r9", "movabs $0x123456789,%r9"]
        );
    }
}
