//! Handlers of the instructions that save, load and reset vector and x87 state.

use iced_x86::{CpuidFeature, Instruction, MemorySize};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Efer, Exception, Gpr};

use super::environment::Layout;
use super::form::{Form, Requirement};
use super::gather;
use super::ops::{check_pending, is_wide};
use super::state::VectorUnit;
use super::table::Special;
use super::xsave::{AREA, HEADER_END, InvalidImage, Save, Saved, View};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

/// The operation for a special form.
pub(super) fn lower(instruction: &Instruction, form: &Form, kind: Special) -> Op {
    let handler: Handler = match kind {
        Special::Gather => return gather::lower(instruction, form, false),
        Special::Scatter => return gather::lower(instruction, form, true),
        Special::MaskedBytes => return gather::lower_masked_bytes(instruction, form),
        Special::Wait => wait,
        Special::InitX87 => init_x87,
        Special::StoreStatusAx => store_status_ax,
        Special::StoreEnvironment => store_environment,
        Special::LoadEnvironment => load_environment,
        Special::SaveX87 => save_x87,
        Special::RestoreX87 => restore_x87,
        Special::Fxsave => fxsave,
        Special::Fxrstor => fxrstor,
        Special::Xsave => |cpu, op| xsave(cpu, op, Save::All),
        Special::Xsaveopt => |cpu, op| xsave(cpu, op, Save::Optimised),
        Special::Xsavec => |cpu, op| xsave(cpu, op, Save::Compacted),
        Special::Xsaves => |cpu, op| {
            cpu.require(Requirement::Xsave)?;
            privileged(cpu)?;
            xsave(cpu, op, Save::Compacted)
        },
        Special::Xrstor => xrstor,
        Special::Xrstors => xrstors,
        Special::Xgetbv => xgetbv,
        Special::Xsetbv => xsetbv,
        Special::LoadMxcsr => load_mxcsr,
        Special::StoreMxcsr => store_mxcsr,
        Special::ZeroUpper => |cpu, _| zero(cpu, 2),
        Special::ZeroAll => |cpu, _| zero(cpu, 0),
    };
    let mut op = Op::new(instruction, handler);
    op.aux = match kind {
        Special::StoreEnvironment | Special::LoadEnvironment | Special::SaveX87 | Special::RestoreX87 => {
            let wide = matches!(instruction.memory_size(), MemorySize::FpuEnv28 | MemorySize::FpuState108);
            wide.into()
        }
        _ => (form.requirement == Requirement::Avx).into(),
    };
    op
}

fn privileged(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
}

fn invalid(_: InvalidImage) -> Exception {
    Exception::GP0
}

impl Cpu {
    fn layout(&self, op: &Op) -> Layout {
        Layout { wide: op.aux != 0, real: self.real_or_virtual() }
    }

    fn view(&self, op: &Op) -> View {
        View { wide: is_wide(op.code), long: self.is_64bit() }
    }

    /// The linear address of an XSAVE image.
    fn image_address(&self, op: &Op, write: bool) -> Result<u64, Exception> {
        let offset = self.effective_address(op);
        let linear = self.whole_address(op, offset, HEADER_END as u16, write)?;
        self.check_operand_alignment(linear, 4)?;
        if linear & 63 != 0 { Err(Exception::GP0) } else { Ok(linear) }
    }

    /// The linear address of an FXSAVE image. The host looks at its last byte first. With alignment checking on, an
    /// image that is misaligned for a doubleword is #AC rather than #GP.
    fn fxsave_address(&mut self, op: &Op, write: bool) -> Result<u64, Exception> {
        let offset = self.effective_address(op);
        let last = self.whole_address(op, offset.wrapping_add(511) & op.address_mask, 1, write)?;
        let first = self.bases[usize::from(op.segment)].wrapping_add(offset);
        self.check_operand_alignment(first, 4)?;
        if first & 15 != 0 {
            return Err(Exception::GP0);
        }
        self.probe_bytes(op.segment, last, 1, write)?;
        self.whole_address(op, offset, 512, write)
    }

    /// The linear address of an x87 environment or state of `size` bytes. The host looks at its first word, then at
    /// its last byte, then at the rest.
    fn x87_image_address(&mut self, op: &Op, size: usize, write: bool) -> Result<u64, Exception> {
        let word = if op.aux != 0 { 4 } else { 2 };
        let offset = self.effective_address(op);
        let first = self.linear(op.segment, offset, word.into(), write)?;
        if self.long_mode() && !is_canonical(first) {
            return Err(self.not_canonical(op.segment));
        }
        self.check_operand_alignment(first, word)?;
        self.probe_bytes(op.segment, first, word.into(), write)?;
        let linear = self.linear(op.segment, offset, size as u64, write)?;
        self.probe_bytes(op.segment, linear.wrapping_add(size as u64 - 1), 1, write)?;
        Ok(linear)
    }

    /// Writes what an instruction saves; nothing, if any of it faults.
    fn put_image(&mut self, op: &Op, linear: u64, saved: Saved) -> Result<(), Exception> {
        let extent = saved.extent();
        self.probe_bytes(op.segment, linear.wrapping_add(extent.start as u64), extent.len(), true)?;
        for part in &saved.parts {
            let start = linear.wrapping_add(part.start as u64);
            self.store_bytes(op.segment, start, &saved.bytes[part.clone()])?;
        }
        self.vector.unit.give_back(saved);
        Ok(())
    }
}

fn wait(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Wait)?;
    check_pending(cpu)
}

fn init_x87(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    cpu.vector.unit.init_x87();
    Ok(())
}

fn store_status_ax(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    let status = cpu.vector.unit.x87_status();
    cpu.set_reg(Gpr::Rax as u8, status);
    Ok(())
}

fn store_environment(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    let layout = cpu.layout(op);
    let linear = cpu.x87_image_address(op, layout.size(), true)?;
    let bytes = cpu.vector.unit.environment(layout);
    cpu.store_bytes(op.segment, linear, &bytes[..layout.size()])?;
    cpu.vector.unit.mask_x87();
    Ok(())
}

fn load_environment(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    check_pending(cpu)?;
    let layout = cpu.layout(op);
    let linear = cpu.x87_image_address(op, layout.size(), false)?;
    let mut bytes = [0; 28];
    cpu.load_bytes(op.segment, linear, &mut bytes[..layout.size()])?;
    cpu.vector.unit.load_environment(&bytes, layout);
    Ok(())
}

fn save_x87(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    let layout = cpu.layout(op);
    let linear = cpu.x87_image_address(op, layout.save_size(), true)?;
    let bytes = cpu.vector.unit.save_x87(layout);
    cpu.store_bytes(op.segment, linear, &bytes[..layout.save_size()])?;
    cpu.vector.unit.init_x87();
    Ok(())
}

fn restore_x87(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    check_pending(cpu)?;
    let layout = cpu.layout(op);
    let linear = cpu.x87_image_address(op, layout.save_size(), false)?;
    let mut bytes = [0; 108];
    cpu.load_bytes(op.segment, linear, &mut bytes[..layout.save_size()])?;
    cpu.vector.unit.restore_x87(&bytes, layout);
    Ok(())
}

/// FXSAVE and FXRSTOR leave XMM registers out under EFER.FFXSR at CPL 0 in 64-bit mode (APM 2 11.4.4).
fn fxsave_has_vectors(cpu: &Cpu) -> bool {
    !(cpu.efer.contains(Efer::FFXSR) && cpu.cpl == 0 && cpu.is_64bit())
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    let linear = cpu.fxsave_address(op, true)?;
    let (view, vectors) = (cpu.view(op), fxsave_has_vectors(cpu));
    let saved = cpu.vector.unit.fxsave(view, vectors);
    cpu.put_image(op, linear, saved)
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::X87)?;
    let linear = cpu.fxsave_address(op, false)?;
    let mut bytes = [0; 512];
    cpu.load_bytes(op.segment, linear, &mut bytes)?;
    let (view, vectors) = (cpu.view(op), fxsave_has_vectors(cpu));
    cpu.vector.unit.fxrstor(&bytes, view, vectors).map_err(invalid)
}

/// EDX:EAX, limited to what XCR0 enables.
fn requested(cpu: &Cpu) -> u64 {
    let low = cpu.regs[Gpr::Rax as usize] & 0xffff_ffff;
    let high = cpu.regs[Gpr::Rdx as usize] << 32;
    (low | high) & cpu.vector.xcr0()
}

fn xsave(cpu: &mut Cpu, op: &Op, save: Save) -> Result<(), Exception> {
    cpu.require(Requirement::Xsave)?;
    let linear = cpu.image_address(op, true)?;
    let header = linear.wrapping_add(512);
    // The header is read and written, so a page that cannot be written is found here.
    cpu.probe_bytes(op.segment, header, 8, true)?;
    let old = cpu.load::<u64>(op.segment, header)?;
    let (mask, view) = (requested(cpu), cpu.view(op));
    let vector = &mut cpu.vector;
    let layout = vector.xsave_layout().clone();
    let saved = vector.unit.xsave(&layout, save, mask, old, view);
    cpu.put_image(op, linear, saved)
}

fn xrstor(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Xsave)?;
    let compacted = if cpu.vector.offers(CpuidFeature::XSAVEC) { None } else { Some(false) };
    restore(cpu, op, compacted)
}

fn xrstors(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Xsave)?;
    privileged(cpu)?;
    restore(cpu, op, Some(true))
}

fn restore(cpu: &mut Cpu, op: &Op, compacted: Option<bool>) -> Result<(), Exception> {
    let linear = cpu.image_address(op, false)?;
    let mut image = cpu.vector.unit.blank();
    let bytes = &mut image.bytes;
    let mut header = [0; HEADER_END];
    cpu.load_bytes(op.segment, linear, &mut header)?;
    bytes[..HEADER_END].copy_from_slice(&header);
    let (mask, view, xcr0) = (requested(cpu), cpu.view(op), cpu.vector.xcr0());
    let layout = cpu.vector.xsave_layout().clone();
    let size = VectorUnit::xrstor_size(&layout, xcr0, mask, &header, compacted).map_err(invalid)?;
    if size > HEADER_END {
        let rest = linear.wrapping_add(HEADER_END as u64);
        cpu.load_bytes(op.segment, rest, &mut bytes[HEADER_END..size.min(AREA)])?;
    }
    let restored = cpu.vector.unit.xrstor(&layout, mask, bytes, view).map_err(invalid);
    cpu.vector.unit.give_back(image);
    restored
}

fn xgetbv(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Xcr)?;
    let xcr0 = cpu.vector.xcr0();
    let value = match cpu.regs[Gpr::Rcx as usize] as u32 {
        0 => xcr0,
        1 if cpu.vector.shows_in_use() => xcr0 & cpu.vector.unit.in_use(),
        _ => return Err(Exception::GP0),
    };
    cpu.set_reg(Gpr::Rax as u8, value as u32);
    cpu.set_reg(Gpr::Rdx as u8, (value >> 32) as u32);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require(Requirement::Xcr)?;
    privileged(cpu)?;
    let value = (cpu.regs[Gpr::Rax as usize] & 0xffff_ffff) | cpu.regs[Gpr::Rdx as usize] << 32;
    if cpu.regs[Gpr::Rcx as usize] as u32 != 0 || !cpu.vector.set_xcr0(value) {
        return Err(Exception::GP0);
    }
    Ok(())
}

fn mxcsr_requirement(op: &Op) -> Requirement {
    if op.aux != 0 { Requirement::Avx } else { Requirement::Sse }
}

fn load_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(mxcsr_requirement(op))?;
    let value = cpu.read::<u32>(op)?;
    if cpu.vector.unit.set_mxcsr(value) { Ok(()) } else { Err(Exception::GP0) }
}

fn store_mxcsr(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require(mxcsr_requirement(op))?;
    let value = cpu.vector.unit.mxcsr();
    cpu.write(op, value)
}

/// VZEROUPPER and VZEROALL: clears the quadwords from `first` of the registers that the mode has, ZMM16 and up
/// excepted.
fn zero(cpu: &mut Cpu, first: usize) -> Result<(), Exception> {
    cpu.require(Requirement::Avx)?;
    let registers = if cpu.is_64bit() { 16 } else { 8 };
    for register in &mut cpu.vector.unit.registers.zmm[..registers] {
        register[first..].fill(0);
    }
    Ok(())
}
