//! Instructions on segment registers and descriptor tables.

use iced_x86::{Code, Instruction, Mnemonic};
use ringfence_memory::Scalar;
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{DescriptorTable, Segment, Selector, attribute, system_type};
use ringfence_x86::{Cr4, Exception, Rflags, SegmentRegister, Vector};

use super::descriptor::{self, selector_fault};
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, prefix};

/// A segment register by its number.
pub(super) fn register(number: u8) -> SegmentRegister {
    SegmentRegister::ALL[usize::from(number) % 6]
}

impl Cpu {
    /// #UD unless in protected mode.
    pub(super) fn require_protected(&self) -> Result<(), Exception> {
        if self.protected() { Ok(()) } else { Err(Exception::UD) }
    }

    /// #GP(0) unless at CPL 0.
    pub(super) fn require_cpl0(&self) -> Result<(), Exception> {
        if self.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    /// #GP(0) where user-mode instruction prevention forbids (SDM 3A 2.5, CR4.UMIP).
    pub(super) fn require_umip(&self) -> Result<(), Exception> {
        if self.cpl > 0 && self.cr4.contains(Cr4::UMIP) { Err(Exception::GP0) } else { Ok(()) }
    }

    /// The 16-bit operand of SLDT's and LLDT's kind: memory or a register.
    pub(super) fn read_word_operand(&mut self, op: &Op, index: u8) -> Result<u16, Exception> {
        if op.has(prefix::MEMORY) { self.read(op) } else { Ok(self.reg(index)) }
    }

    /// Stores a 16-bit result: memory gets 16 bits, a register as many as it has, zero-extended.
    pub(super) fn write_word_operand<T: Scalar>(&mut self, op: &Op, value: u64) -> Result<(), Exception> {
        if op.has(prefix::MEMORY) {
            return self.write(op, value as u16);
        }
        self.set_reg(op.dst, T::truncate(value));
        Ok(())
    }

    /// Interrupts and debug traps wait for one instruction, so that SS and the stack pointer change together
    /// (SDM 3A 6.8.3).
    fn shadow_stack_load(&mut self) {
        self.interrupt_shadow = true;
        self.system.debug_shadow = true;
        self.leave_block = true;
    }
}

fn mov_from_segment<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let selector = cpu.segment(register(op.src)).selector.0;
    cpu.write_word_operand::<T>(op, u64::from(selector))
}

fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let target = register(op.dst);
    if target == SegmentRegister::Cs {
        return Err(Exception::UD);
    }
    let value = cpu.read_word_operand(op, op.src)?;
    cpu.load_segment(target, value)?;
    if target == SegmentRegister::Ss {
        cpu.shadow_stack_load();
    }
    Ok(())
}

fn push_segment<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let selector = cpu.segment(register(op.dst)).selector.0;
    if T::SIZE == 4 && cpu.features.is_intel() {
        // Intel processors write 16 bits and leave the rest of the slot as it is; 64 bits are extended (SDM 2B, PUSH).
        let top = cpu.stack_pointer().wrapping_sub(T::SIZE as u64) & cpu.stack_mask;
        let ss = SegmentRegister::Ss as u8;
        let linear = cpu.linear(ss, top, 2, true)?;
        cpu.store(ss, linear, selector)?;
        cpu.set_stack_pointer(top);
        return Ok(());
    }
    cpu.push(T::truncate(u64::from(selector)))
}

fn pop_segment<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let target = register(op.dst);
    let selector = if cpu.features.is_intel() {
        // Intel processors do not look at the rest of the slot.
        cpu.peek::<u16>(0)?
    } else {
        cpu.peek::<T>(0)?.widen() as u16
    };
    // The pointer moves by the width that the old stack segment has.
    let pointer = cpu.stack_pointer().wrapping_add(T::SIZE as u64);
    let (old, mask) = (cpu.regs[4], cpu.stack_mask);
    cpu.load_segment(target, selector)?;
    cpu.regs[4] = if mask == 0xffff { old & !0xffff | pointer & 0xffff } else { pointer & mask };
    if target == SegmentRegister::Ss {
        cpu.shadow_stack_load();
    }
    Ok(())
}

/// Reads a far pointer: offset, then selector.
pub(super) fn read_far<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(T, u16), Exception> {
    let offset: T = cpu.read(op)?;
    let at = cpu.effective_address(op).wrapping_add(T::SIZE as u64) & op.address_mask;
    let linear = cpu.linear(op.segment, at, 2, false)?;
    Ok((offset, cpu.load(op.segment, linear)?))
}

fn load_far<T: Scalar>(cpu: &mut Cpu, op: &Op, target: SegmentRegister) -> Result<(), Exception> {
    let (offset, selector) = read_far::<T>(cpu, op)?;
    cpu.load_segment(target, selector)?;
    cpu.set_reg(op.dst, offset);
    cpu.leave_block |= target == SegmentRegister::Ss;
    Ok(())
}

fn les<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    load_far::<T>(cpu, op, SegmentRegister::Es)
}

fn lds<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    load_far::<T>(cpu, op, SegmentRegister::Ds)
}

fn lss<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    load_far::<T>(cpu, op, SegmentRegister::Ss)
}

fn lfs<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    load_far::<T>(cpu, op, SegmentRegister::Fs)
}

fn lgs<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    load_far::<T>(cpu, op, SegmentRegister::Gs)
}

/// The descriptor of a selector if the program may look at it (SDM 3A 5.10): not null, inside its table, of a
/// type that `accepts` (given the type and whether the mode is long), and not more privileged.
fn visible(
    cpu: &mut Cpu,
    selector: Selector,
    accepts: fn(u8, bool) -> bool,
) -> Result<Option<u64>, Exception> {
    if selector.is_null() {
        return Ok(None);
    }
    let raw = match cpu.fetch_descriptor(selector, Vector::GeneralProtection, 0) {
        Ok(raw) => raw,
        Err(e) if e.vector == Vector::GeneralProtection && e.error_code != 0 => return Ok(None),
        Err(e) => return Err(e),
    };
    if descriptor::is_memory(raw) {
        if descriptor::is_code(raw) && descriptor::is_conforming(raw) {
            return Ok(Some(raw));
        }
    } else if !accepts(descriptor::kind(raw), cpu.long_mode()) {
        return Ok(None);
    }
    let dpl = descriptor::dpl(raw);
    Ok((cpu.cpl <= dpl && selector.rpl() <= dpl).then_some(raw))
}

fn set_zf(cpu: &mut Cpu, value: bool) {
    cpu.status = cpu.status.with(Rflags::ZF, if value { Rflags::ZF } else { Rflags::empty() });
}

fn lar<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    use system_type as t;
    cpu.require_protected()?;
    let selector = Selector(cpu.read_word_operand(op, op.src)?);
    let found = visible(cpu, selector, |kind, long| match kind {
        t::LDT | t::TSS_AVAILABLE | t::TSS_BUSY | t::CALL_GATE => true,
        t::TSS16_AVAILABLE | t::TSS16_BUSY | t::CALL_GATE16 | t::TASK_GATE => !long,
        _ => false,
    })?;
    if let Some(raw) = found {
        cpu.set_reg(op.dst, T::truncate(raw >> 32 & 0x00ff_ff00));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn lsl<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    use system_type as t;
    cpu.require_protected()?;
    let selector = Selector(cpu.read_word_operand(op, op.src)?);
    let found = visible(cpu, selector, |kind, long| match kind {
        t::LDT | t::TSS_AVAILABLE | t::TSS_BUSY => true,
        t::TSS16_AVAILABLE | t::TSS16_BUSY => !long,
        _ => false,
    })?;
    if let Some(raw) = found {
        let limit = Segment::from_descriptor(selector, raw).limit;
        cpu.set_reg(op.dst, T::truncate(u64::from(limit)));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn verr(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    verify(cpu, op, |segment| segment.is_readable())
}

fn verw(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    verify(cpu, op, |segment| segment.is_writable())
}

fn verify(cpu: &mut Cpu, op: &Op, good: fn(&Segment) -> bool) -> Result<(), Exception> {
    cpu.require_protected()?;
    let selector = Selector(cpu.read_word_operand(op, op.dst)?);
    let found = visible(cpu, selector, |_, _| false)?;
    let verified = found.is_some_and(|raw| good(&Segment::from_descriptor(selector, raw)));
    set_zf(cpu, verified);
    Ok(())
}

fn arpl(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_protected()?;
    let rpl = cpu.reg::<u16>(op.src) & 3;
    let old = cpu.read_word_operand(op, op.dst)?;
    let raised = old & 3 < rpl;
    if raised {
        // Memory is written only if it changes.
        cpu.write_word_operand::<u16>(op, u64::from(old & !3 | rpl))?;
    }
    set_zf(cpu, raised);
    Ok(())
}

fn sldt<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_protected()?;
    cpu.require_umip()?;
    cpu.write_word_operand::<T>(op, u64::from(cpu.ldtr.selector.0))
}

fn str_<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_protected()?;
    cpu.require_umip()?;
    cpu.write_word_operand::<T>(op, u64::from(cpu.tr.selector.0))
}

impl Cpu {
    /// What LDTR becomes with a selector.
    ///
    /// # Errors
    /// `invalid` with the selector; #NP; #PF.
    pub(super) fn resolve_ldt(
        &mut self,
        selector: Selector,
        invalid: Vector,
        ext: u16,
    ) -> Result<Segment, Exception> {
        if selector.is_null() {
            return Ok(descriptor::null_segment(selector, 0));
        }
        let fault = selector_fault(invalid, selector, ext);
        if selector.is_local() {
            return Err(fault);
        }
        let low = self.fetch_descriptor(selector, invalid, ext)?;
        if descriptor::is_memory(low) || descriptor::kind(low) != system_type::LDT {
            return Err(fault);
        }
        if !descriptor::is_present(low) {
            let vector = if invalid == Vector::InvalidTss { invalid } else { Vector::SegmentNotPresent };
            return Err(selector_fault(vector, selector, ext));
        }
        let upper = self.fetch_upper(selector, invalid, ext)?;
        let segment = self.system_segment(selector, low, upper);
        if is_canonical(segment.base) { Ok(segment) } else { Err(fault) }
    }
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = Selector(cpu.read_word_operand(op, op.dst)?);
    cpu.ldtr = cpu.resolve_ldt(selector, Vector::GeneralProtection, 0)?;
    Ok(())
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = Selector(cpu.read_word_operand(op, op.dst)?);
    if selector.is_null() {
        return Err(Exception::GP0);
    }
    let gp = Vector::GeneralProtection;
    let fault = selector_fault(gp, selector, 0);
    if selector.is_local() {
        return Err(fault);
    }
    let low = cpu.fetch_descriptor(selector, gp, 0)?;
    let good = match descriptor::kind(low) {
        system_type::TSS_AVAILABLE => true,
        system_type::TSS16_AVAILABLE => !cpu.long_mode(),
        _ => false,
    };
    if descriptor::is_memory(low) || !good {
        return Err(fault);
    }
    if !descriptor::is_present(low) {
        return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
    }
    let upper = cpu.fetch_upper(selector, gp, 0)?;
    let mut segment = cpu.system_segment(selector, low, upper);
    if !is_canonical(segment.base) {
        return Err(fault);
    }
    cpu.write_busy(selector, true)?;
    segment.attributes |= u16::from(system_type::TSS_BUSY ^ system_type::TSS_AVAILABLE);
    cpu.tr = segment;
    Ok(())
}

/// Stores a table register: limit, then base.
fn store_table<T: Scalar>(cpu: &mut Cpu, op: &Op, table: DescriptorTable) -> Result<(), Exception> {
    cpu.require_umip()?;
    let size = 2 + T::SIZE;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..size].copy_from_slice(&table.base.to_le_bytes()[..T::SIZE]);
    let linear = cpu.linear(op.segment, cpu.effective_address(op), size as u64, true)?;
    cpu.store_bytes(op.segment, linear, &bytes[..size])
}

/// Loads a table register. `mask` is what the base keeps.
fn load_table<T: Scalar>(cpu: &mut Cpu, op: &Op, mask: u64) -> Result<DescriptorTable, Exception> {
    cpu.require_cpl0()?;
    let size = 2 + T::SIZE;
    let mut bytes = [0; 10];
    let linear = cpu.linear(op.segment, cpu.effective_address(op), size as u64, false)?;
    cpu.load_bytes(op.segment, linear, &mut bytes[..size])?;
    let [l0, l1, base @ ..] = bytes;
    let base = u64::from_le_bytes(base) & mask;
    if !is_canonical(base) {
        return Err(Exception::GP0);
    }
    Ok(DescriptorTable { base, limit: u16::from_le_bytes([l0, l1]) })
}

fn sgdt<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    store_table::<T>(cpu, op, cpu.gdtr)
}

fn sidt<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    store_table::<T>(cpu, op, cpu.idtr)
}

/// With a 16-bit operand size the base has 24 bits (SDM 2A, LGDT).
const BASE24: u64 = 0xff_ffff;

fn lgdt16(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.gdtr = load_table::<u32>(cpu, op, BASE24)?;
    Ok(())
}

fn lgdt<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.gdtr = load_table::<T>(cpu, op, u64::MAX)?;
    Ok(())
}

fn lidt16(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.idtr = load_table::<u32>(cpu, op, BASE24)?;
    Ok(())
}

fn lidt<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.idtr = load_table::<T>(cpu, op, u64::MAX)?;
    Ok(())
}

/// The handler for one of this family.
#[rustfmt::skip]
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match instruction.code() {
        C::Mov_rm16_Sreg => mov_from_segment::<u16>,
        C::Mov_r32m16_Sreg => mov_from_segment::<u32>,
        C::Mov_r64m16_Sreg => mov_from_segment::<u64>,
        C::Mov_Sreg_rm16 | C::Mov_Sreg_r32m16 | C::Mov_Sreg_r64m16 => mov_to_segment,
        C::Pushw_ES | C::Pushw_CS | C::Pushw_SS | C::Pushw_DS | C::Pushw_FS | C::Pushw_GS => push_segment::<u16>,
        C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS => push_segment::<u32>,
        C::Pushq_FS | C::Pushq_GS => push_segment::<u64>,
        C::Popw_ES | C::Popw_SS | C::Popw_DS | C::Popw_FS | C::Popw_GS => pop_segment::<u16>,
        C::Popd_ES | C::Popd_SS | C::Popd_DS | C::Popd_FS | C::Popd_GS => pop_segment::<u32>,
        C::Popq_FS | C::Popq_GS => pop_segment::<u64>,
        C::Les_r16_m1616 => les::<u16>,
        C::Les_r32_m1632 => les::<u32>,
        C::Lds_r16_m1616 => lds::<u16>,
        C::Lds_r32_m1632 => lds::<u32>,
        C::Lss_r16_m1616 => lss::<u16>,
        C::Lss_r32_m1632 => lss::<u32>,
        C::Lss_r64_m1664 => lss::<u64>,
        C::Lfs_r16_m1616 => lfs::<u16>,
        C::Lfs_r32_m1632 => lfs::<u32>,
        C::Lfs_r64_m1664 => lfs::<u64>,
        C::Lgs_r16_m1616 => lgs::<u16>,
        C::Lgs_r32_m1632 => lgs::<u32>,
        C::Lgs_r64_m1664 => lgs::<u64>,
        C::Lar_r16_rm16 => lar::<u16>,
        C::Lar_r32_r32m16 => lar::<u32>,
        C::Lar_r64_r64m16 => lar::<u64>,
        C::Lsl_r16_rm16 => lsl::<u16>,
        C::Lsl_r32_r32m16 => lsl::<u32>,
        C::Lsl_r64_r64m16 => lsl::<u64>,
        C::Arpl_rm16_r16 | C::Arpl_r32m16_r32 => arpl,
        C::Sldt_rm16 => sldt::<u16>,
        C::Sldt_r32m16 => sldt::<u32>,
        C::Sldt_r64m16 => sldt::<u64>,
        C::Str_rm16 => str_::<u16>,
        C::Str_r32m16 => str_::<u32>,
        C::Str_r64m16 => str_::<u64>,
        C::Sgdt_m1632_16 | C::Sgdt_m1632 => sgdt::<u32>,
        C::Sgdt_m1664 => sgdt::<u64>,
        C::Sidt_m1632_16 | C::Sidt_m1632 => sidt::<u32>,
        C::Sidt_m1664 => sidt::<u64>,
        C::Lgdt_m1632_16 => lgdt16,
        C::Lgdt_m1632 => lgdt::<u32>,
        C::Lgdt_m1664 => lgdt::<u64>,
        C::Lidt_m1632_16 => lidt16,
        C::Lidt_m1632 => lidt::<u32>,
        C::Lidt_m1664 => lidt::<u64>,
        _ => match instruction.mnemonic() {
            Mnemonic::Verr => verr,
            Mnemonic::Verw => verw,
            Mnemonic::Lldt => lldt,
            Mnemonic::Ltr => ltr,
            _ => return None,
        },
    })
}

/// A flat segment of the kind that SYSCALL and SYSENTER load (SDM 2B, SYSCALL): base 0, limit 4 GiB.
pub(crate) fn flat_code(selector: u16, cpl: u8, long: bool) -> Segment {
    let size = if long { attribute::LONG } else { attribute::DB };
    Segment {
        selector: Selector(selector & !3 | u16::from(cpl)),
        base: 0,
        limit: u32::MAX,
        attributes: 0x9b | u16::from(cpl) << 5 | attribute::GRANULARITY | size,
    }
}

/// As [`flat_code`], for the stack.
pub(crate) fn flat_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector: Selector(selector & !3 | u16::from(cpl)),
        base: 0,
        limit: u32::MAX,
        attributes: 0x93 | u16::from(cpl) << 5 | attribute::GRANULARITY | attribute::DB,
    }
}
