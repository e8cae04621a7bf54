//! Gathers, scatters and byte-masked stores: one memory access an element, each of which may fault by itself.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};
use ringfence_x86::{Exception, Gpr};

use super::form::{Form, Requirement};
use super::ops::{check_pending, runs};
use super::table::host_is_amd;
use crate::interp::cpu::Cpu;
use crate::interp::op::Op;
use crate::mmu::tlb::Class;

/// What [`Op::aux`] holds of a gather or scatter: the index register and the opmask, and what follows.
mod aux {
    pub(super) const OPMASK: u32 = 8;
    pub(super) const WIDE_INDEX: u32 = 1 << 12;
    pub(super) const WIDE_ELEMENT: u32 = 1 << 13;
    pub(super) const COUNT: u32 = 16;
    pub(super) const LENGTH: u32 = 24;
}

/// The operation for a gather or scatter.
pub(super) fn lower(instruction: &Instruction, form: &Form, scatter: bool) -> Op {
    let evex = instruction.code().encoding() == EncodingKind::EVEX;
    debug_assert!(evex == (form.requirement == Requirement::Avx512));
    let handler = match (scatter, evex) {
        (true, _) => scatter_elements,
        (false, true) => gather_by_opmask,
        (false, false) => gather_by_signs,
    };
    let mut op = Op::new(instruction, handler);
    let index = instruction.memory_index();
    let register = (0..instruction.op_count())
        .filter(|&o| instruction.op_kind(o) == OpKind::Register)
        .map(|o| instruction.op_register(o))
        .next()
        .unwrap_or(Register::None);
    let index_size = if has_wide_index(instruction.mnemonic()) { 8 } else { 4 };
    let element = instruction.code().op_code().memory_size().element_size();
    let element = if element == 8 { 8 } else { 4 };
    let count = (index.size() / index_size).min(register.size() / element);
    op.aux = (index.number() as u32 & 31)
        | (instruction.op_mask().number() as u32 & 7) << aux::OPMASK
        | if index_size == 8 { aux::WIDE_INDEX } else { 0 }
        | if element == 8 { aux::WIDE_ELEMENT } else { 0 }
        | (count as u32) << aux::COUNT
        | (index.size().max(register.size()) as u32 / 8) << aux::LENGTH;
    if scatter {
        op.src = register.number() as u8;
    }
    op
}

fn has_wide_index(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vgatherqps
            | Mnemonic::Vgatherqpd
            | Mnemonic::Vpgatherqd
            | Mnemonic::Vpgatherqq
            | Mnemonic::Vscatterqps
            | Mnemonic::Vscatterqpd
            | Mnemonic::Vpscatterqd
            | Mnemonic::Vpscatterqq
    )
}

/// Element `i` of a register, of 4 or 8 bytes, zero-extended.
fn element(register: &[u64; 8], i: usize, wide: bool) -> u64 {
    if wide { register[i & 7] } else { register[(i / 2) & 7] >> (32 * (i & 1)) & 0xffff_ffff }
}

fn set_element(register: &mut [u64; 8], i: usize, wide: bool, value: u64) {
    if wide {
        register[i & 7] = value;
    } else {
        let shift = 32 * (i & 1);
        let word = &mut register[(i / 2) & 7];
        *word = *word & !(0xffff_ffff << shift) | value << shift;
    }
}

/// The parameters of one instruction, unpacked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The index register, and the opmask register if there is one.
    pub(crate) index: usize,
    pub(crate) opmask: usize,
    /// Indices, and elements, have 64 bits, not 32.
    pub(crate) wide_index: bool,
    pub(crate) wide_element: bool,
    /// Elements, 2 to 16.
    pub(crate) count: usize,
    /// The vector length in quadwords.
    length: usize,
}

impl Shape {
    /// Of the operation for a gather or scatter.
    pub(crate) fn new(op: &Op) -> Self {
        Self {
            index: (op.aux & 31) as usize,
            opmask: (op.aux >> aux::OPMASK & 7) as usize,
            wide_index: op.aux & aux::WIDE_INDEX != 0,
            wide_element: op.aux & aux::WIDE_ELEMENT != 0,
            count: (op.aux >> aux::COUNT & 0xff) as usize,
            length: (op.aux >> aux::LENGTH) as usize,
        }
    }

    /// Linear address of element `i`.
    fn address(self, cpu: &Cpu, op: &Op, i: usize, write: bool) -> Result<u64, Exception> {
        let index = element(&cpu.vector.unit.registers.zmm[self.index], i, self.wide_index);
        let index = if self.wide_index { index } else { index as u32 as i32 as u64 };
        let offset = cpu.regs[usize::from(op.base)]
            .wrapping_add(op.displacement as u64)
            .wrapping_add(index << op.scale)
            & op.address_mask;
        cpu.linear(op.segment, offset, if self.wide_element { 8 } else { 4 }, write)
    }

    /// Loads an element. Alignment is not checked.
    fn load(self, cpu: &mut Cpu, op: &Op, i: usize) -> Result<u64, Exception> {
        let linear = self.address(cpu, op, i, false)?;
        if cpu.class == Class::Slow {
            let mut bytes = [0; 8];
            cpu.load_bytes(op.segment, linear, &mut bytes[..if self.wide_element { 8 } else { 4 }])?;
            Ok(u64::from_le_bytes(bytes))
        } else if self.wide_element {
            cpu.load::<u64>(op.segment, linear)
        } else {
            cpu.load::<u32>(op.segment, linear).map(u64::from)
        }
    }

    /// Loads element `i` of the destination.
    fn gather(self, cpu: &mut Cpu, op: &Op, i: usize) -> Result<(), Exception> {
        let value = self.load(cpu, op, i)?;
        let register = &mut cpu.vector.unit.registers.zmm[usize::from(op.dst) & 31];
        set_element(register, i, self.wide_element, value);
        Ok(())
    }

    /// What Intel's processors do to the mask before the first element, as can be seen when it faults: signs are extended
    /// to their elements, over all of the vector length.
    fn extend_signs(self, cpu: &mut Cpu, mask: usize, sign: u64) {
        let register = &mut cpu.vector.unit.registers.zmm[mask];
        let old = std::mem::take(register);
        for i in 0..self.length * if self.wide_element { 1 } else { 2 } {
            if element(&old, i, self.wide_element) & sign != 0 {
                set_element(register, i, self.wide_element, sign | (sign - 1));
            }
        }
    }

    /// Clears the destination above the elements.
    fn finish(self, cpu: &mut Cpu, op: &Op) {
        let register = &mut cpu.vector.unit.registers.zmm[usize::from(op.dst) & 31];
        let bytes = self.count * if self.wide_element { 8 } else { 4 };
        if bytes & 7 != 0 {
            register[bytes / 8] &= 0xffff_ffff;
        }
        register[bytes.div_ceil(8)..].fill(0);
    }
}

/// AVX2: elements whose mask sign is set, which is cleared as they are done, so that the instruction can be restarted
/// after a fault.
fn gather_by_signs(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Avx)?;
    let shape = Shape::new(op);
    let mask = usize::from(op.src) & 31;
    let sign = if shape.wide_element { 1 << 63 } else { 1 << 31 };
    if !host_is_amd() {
        shape.extend_signs(cpu, mask, sign);
    }
    for i in 0..shape.count {
        if element(&cpu.vector.unit.registers.zmm[mask], i, shape.wide_element) & sign != 0 {
            shape.gather(cpu, op, i)?;
            if !host_is_amd() {
                cpu.vector.unit.registers.zmm[usize::from(op.dst) & 31][shape.length.min(8)..].fill(0);
            }
        }
        set_element(&mut cpu.vector.unit.registers.zmm[mask], i, shape.wide_element, 0);
    }
    cpu.vector.unit.registers.zmm[mask] = [0; 8];
    shape.finish(cpu, op);
    Ok(())
}

/// AVX-512: likewise, with an opmask.
fn gather_by_opmask(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Avx512)?;
    let shape = Shape::new(op);
    for i in 0..shape.count {
        if cpu.vector.unit.registers.k[shape.opmask] >> i & 1 != 0 {
            shape.gather(cpu, op, i)?;
            // Should a later element fault, the part above the vector length is clear already.
            cpu.vector.unit.registers.zmm[usize::from(op.dst) & 31][shape.length.min(8)..].fill(0);
            cpu.vector.unit.registers.k[shape.opmask] &= !(1 << i);
        }
    }
    cpu.vector.unit.registers.k[shape.opmask] = 0;
    shape.finish(cpu, op);
    Ok(())
}

fn scatter_elements(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Avx512)?;
    let shape = Shape::new(op);
    for i in 0..shape.count {
        if cpu.vector.unit.registers.k[shape.opmask] >> i & 1 != 0 {
            let linear = shape.address(cpu, op, i, true)?;
            let value =
                element(&cpu.vector.unit.registers.zmm[usize::from(op.src) & 31], i, shape.wide_element);
            if cpu.class == Class::Slow {
                let size = if shape.wide_element { 8 } else { 4 };
                cpu.store_bytes(op.segment, linear, &value.to_le_bytes()[..size])?;
            } else if shape.wide_element {
                cpu.store(op.segment, linear, value)?;
            } else {
                cpu.store(op.segment, linear, value as u32)?;
            }
            cpu.vector.unit.registers.k[shape.opmask] &= !(1 << i);
        }
    }
    cpu.vector.unit.registers.k[shape.opmask] = 0;
    Ok(())
}

/// The operation for MASKMOVQ, MASKMOVDQU or VMASKMOVDQU.
pub(super) fn lower_masked_bytes(instruction: &Instruction, form: &Form) -> Op {
    let mmx = instruction.mnemonic() == Mnemonic::Maskmovq;
    let mut op = Op::new(instruction, if mmx { store_mmx_bytes } else { store_vector_bytes });
    op.aux = u32::from(form.requirement == Requirement::Avx);
    op
}

/// Bytes whose mask byte has its sign set, as a mask.
fn signs(words: &[u64]) -> u64 {
    words.iter().enumerate().fold(0, |mask, (i, word)| {
        (0..8).fold(mask, |mask, byte| mask | (word >> (8 * byte + 7) & 1) << (8 * i + byte))
    })
}

fn store_mmx_bytes(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Mmx)?;
    check_pending(cpu)?;
    // The store may fault after the transition to MMX mode, which repeating it changes no more.
    cpu.vector.unit.enter_mmx();
    let data = cpu.vector.unit.mmx(op.src.into());
    let mask = cpu.vector.unit.mmx(op.third.into());
    store_selected(cpu, op, signs(&[mask]), &data.to_le_bytes())
}

fn store_vector_bytes(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(if op.aux == 0 { Requirement::Sse } else { Requirement::Avx })?;
    let data = cpu.vector.unit.xmm(op.src.into()).to_le_bytes();
    let mask = cpu.vector.unit.xmm(op.third.into());
    store_selected(cpu, op, signs(&[mask as u64, (mask >> 64) as u64]), &data)
}

fn store_selected(cpu: &mut Cpu, op: &Op, mask: u64, data: &[u8]) -> Result<(), Exception> {
    // All of the operand must be writable, whatever the mask selects (the manuals leave that open). The host looks at it
    // by quadwords, and where the second's address begins anew at 0, at that one first.
    let offset = cpu.regs[Gpr::Rdi as usize] & op.address_mask;
    let place =
        |cpu: &Cpu, start| cpu.whole_address(op, offset.wrapping_add(start) & op.address_mask, 8, true);
    let first = place(cpu, 0)?;
    let second = if data.len() > 8 { place(cpu, 8)? } else { first };
    for place in [first.min(second), first.max(second)] {
        cpu.check_operand_alignment(place, 8)?;
        cpu.probe_bytes(op.segment, place, 8, true)?;
    }
    for (place, (i, bytes)) in [first, second].into_iter().zip(data.chunks(8).enumerate()) {
        for run in runs(mask >> (8 * i) & 0xff) {
            cpu.store_bytes(op.segment, place.wrapping_add(run.start as u64), &bytes[run])?;
        }
    }
    Ok(())
}
