//! Control registers and what acts on translations and caches (SDM 3A 2.5, 4.1.2, 4.10, 9.8.5).

use iced_x86::{Code, Instruction, Mnemonic};
use ringfence_memory::{GuestAddress, Scalar};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{attribute, system_type};
use ringfence_x86::{Cr0, Cr4, Efer, Exception, SegmentRegister};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::mmu::tlb::Space;

/// Bits of CR0 that exist. Writing others in the lower half has no effect.
const CR0_BITS: u64 = 0xe005_003f;
/// CR3 bit 63: keep the translations of the new PCID (SDM 3A 4.10.4.1).
const CR3_KEEP: u64 = 1 << 63;

impl Cpu {
    /// Writes CR0.
    ///
    /// # Errors
    /// #GP(0) for a combination that does not exist or a change of mode that is not allowed; #PF never.
    pub(super) fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.cr0;
        let new = Cr0::from_bits_retain(value & CR0_BITS | Cr0::ET.bits());
        let on = |bit: Cr0| new.contains(bit);
        if value >> 32 != 0 || (on(Cr0::PG) && !on(Cr0::PE)) || (on(Cr0::NW) && !on(Cr0::CD)) {
            return Err(Exception::GP0);
        }
        let long = self.efer.contains(Efer::LME);
        let turned = (old ^ new).contains(Cr0::PG);
        if turned && on(Cr0::PG) && long {
            // 16-bit task-state segments have no meaning in long mode (SDM 3A 9.8.5).
            let narrow = self.tr.kind() < system_type::TSS_AVAILABLE;
            let code64 = self.segment(SegmentRegister::Cs).has(attribute::LONG);
            if !self.cr4.contains(Cr4::PAE) || code64 || narrow {
                return Err(Exception::GP0);
            }
        }
        if turned && !on(Cr0::PG) && (self.is_64bit() || self.cr4.contains(Cr4::PCIDE)) {
            return Err(Exception::GP0);
        }
        let reload = (old ^ new).intersects(Cr0::PG | Cr0::CD | Cr0::NW);
        if reload && on(Cr0::PG) && !long && self.cr4.contains(Cr4::PAE) {
            self.pdpte = self.read_pdptes(self.cr3)?;
        }
        self.cr0 = new;
        if turned && long {
            self.efer.set(Efer::LMA, on(Cr0::PG));
        }
        if (old ^ new).intersects(Cr0::PG | Cr0::PE | Cr0::WP) {
            self.tlb.flush();
        }
        if !on(Cr0::PE) {
            self.cpl = 0;
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3.
    ///
    /// # Errors
    /// #GP(0) for reserved bits.
    pub(super) fn write_cr3(&mut self, value: u64) -> Result<(), Exception> {
        let pcid = self.cr4.contains(Cr4::PCIDE);
        let keep = pcid && value & CR3_KEEP != 0;
        let value = if pcid { value & !CR3_KEEP } else { value };
        if self.long_mode() && value >> self.physical_bits != 0 {
            return Err(Exception::GP0);
        }
        if self.pae_paging() {
            self.pdpte = self.read_pdptes(value)?;
        }
        let leaving = self.address_space();
        self.cr3 = value;
        self.tlb.switch(leaving, self.address_space(), keep);
        self.select_tables();
        self.leave_block = true;
        Ok(())
    }

    /// The address space that CR3 names (SDM 3A 4.10.1).
    fn address_space(&self) -> Space {
        let pcid = if self.cr4.contains(Cr4::PCIDE) { (self.cr3 & 0xfff) as u16 } else { 0 };
        Space { pcid, base: self.cr3 & !0xfff }
    }

    fn pae_paging(&self) -> bool {
        self.cr0.contains(Cr0::PG) && self.cr4.contains(Cr4::PAE) && !self.long_mode()
    }

    /// The four PAE page-directory pointers at CR3 (SDM 3A 4.4.1).
    ///
    /// # Errors
    /// #GP(0) if a present one has a reserved bit set.
    pub(in crate::interp) fn read_pdptes(&self, cr3: u64) -> Result<[u64; 4], Exception> {
        let table = cr3 & 0xffff_ffe0;
        let reserved = !((1_u64 << self.physical_bits) - 1) | 0x1e6;
        let mut entries = [0; 4];
        for (i, entry) in entries.iter_mut().enumerate() {
            let at = GuestAddress((table + 8 * i as u64) & self.memory.a20_mask());
            *entry = self.memory.read::<u64>(at).unwrap_or(0);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(Exception::GP0);
            }
        }
        Ok(entries)
    }

    /// Writes CR4.
    ///
    /// # Errors
    /// #GP(0) for bits that this model does not have and changes that the mode does not allow.
    pub(super) fn write_cr4(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.cr4;
        let new = Cr4::from_bits_retain(value);
        if value & !self.features.cr4().bits() != 0 {
            return Err(Exception::GP0);
        }
        let changed = old ^ new;
        let long = self.long_mode();
        if long && !new.contains(Cr4::PAE) {
            return Err(Exception::GP0);
        }
        let pcid_on = changed.contains(Cr4::PCIDE) && new.contains(Cr4::PCIDE);
        if pcid_on && (!long || self.cr3 & 0xfff != 0) {
            return Err(Exception::GP0);
        }
        let translation = Cr4::PAE | Cr4::PSE | Cr4::PGE | Cr4::PCIDE | Cr4::SMEP | Cr4::SMAP;
        let reload = changed.intersects(Cr4::PAE | Cr4::PSE | Cr4::PGE | Cr4::SMEP);
        if reload && self.cr0.contains(Cr0::PG) && new.contains(Cr4::PAE) && !long {
            self.pdpte = self.read_pdptes(self.cr3)?;
        }
        self.cr4 = new;
        if changed.intersects(translation) {
            self.tlb.flush();
        }
        self.update_mode();
        Ok(())
    }

    /// Drops the translation of a linear address.
    fn invalidate_page(&mut self, linear: u64) {
        if !self.long_mode() || is_canonical(linear) {
            self.tlb.flush_page(linear);
        }
        self.leave_block = true;
    }
}

fn read_control<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let value = match op.src {
        0 => cpu.cr0.bits(),
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4.bits(),
        8 => cpu.apic_cr8(),
        _ => return Err(Exception::UD),
    };
    cpu.set_reg(op.dst, T::truncate(value));
    Ok(())
}

fn write_control<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    if !matches!(op.dst, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    cpu.require_cpl0()?;
    let value = cpu.reg::<T>(op.src).widen();
    match op.dst {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        _ if value > 0xf => Err(Exception::GP0),
        _ => {
            cpu.set_apic_cr8(value);
            cpu.leave_block = true;
            Ok(())
        }
    }
}

fn smsw<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_umip()?;
    cpu.write_word_operand::<T>(op, cpu.cr0.bits())
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let word = u64::from(cpu.read_word_operand(op, op.dst)?);
    // PE can be set but not cleared; MP, EM and TS follow the operand (SDM 2A, LMSW).
    let kept = cpu.cr0.bits() & !0xe;
    cpu.write_cr0(kept | word & 0xf)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    cpu.cr0.remove(Cr0::TS);
    cpu.leave_block = true;
    Ok(())
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let linear = cpu.segment_base(op.segment).wrapping_add(cpu.effective_address(op));
    cpu.invalidate_page(if cpu.long_mode() { linear } else { linear & 0xffff_ffff });
    Ok(())
}

impl Cpu {
    /// What is added to offsets in a segment.
    fn segment_base(&self, segment: u8) -> u64 {
        self.bases[usize::from(segment) % 6]
    }
}

fn invpcid<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let linear = cpu.linear(op.segment, cpu.effective_address(op), 16, false)?;
    let mut descriptor = [0; 16];
    cpu.load_bytes(op.segment, linear, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    let kind = cpu.reg::<T>(op.dst).widen();
    let bad_pcid = pcid & 0xfff != 0 && !cpu.cr4.contains(Cr4::PCIDE);
    let bad = match kind {
        0 => pcid >> 12 != 0 || bad_pcid || !is_canonical(address),
        1 => pcid >> 12 != 0 || bad_pcid,
        2 | 3 => false,
        _ => true,
    };
    if bad {
        return Err(Exception::GP0);
    }
    let pcid = (pcid & 0xfff) as u16;
    let current = pcid == cpu.address_space().pcid;
    match kind {
        0 if current => cpu.invalidate_page(address),
        0 => cpu.tlb.flush_page_of(pcid, address),
        1 => cpu.tlb.flush_space((!current).then_some(pcid)),
        2 => cpu.tlb.flush(),
        _ => cpu.tlb.flush_all_but_global(),
    }
    cpu.leave_block = true;
    Ok(())
}

/// There are no caches of data to write back.
fn cache_maintenance(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()
}

impl Cpu {
    /// EDX:EAX.
    pub(super) fn edx_eax(&self) -> u64 {
        self.regs[2] << 32 | self.regs[0] & 0xffff_ffff
    }

    /// Writes EDX:EAX; the upper halves of RDX and RAX are cleared.
    pub(super) fn set_edx_eax(&mut self, value: u64) {
        self.regs[0] = value & 0xffff_ffff;
        self.regs[2] = value >> 32;
    }
}

fn require_fsgsbase(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4.contains(Cr4::FSGSBASE) { Ok(()) } else { Err(Exception::UD) }
}

fn read_base<T: Scalar>(cpu: &mut Cpu, op: &Op, segment: SegmentRegister) -> Result<(), Exception> {
    require_fsgsbase(cpu)?;
    cpu.set_reg(op.dst, T::truncate(cpu.segment(segment).base));
    Ok(())
}

fn write_base<T: Scalar>(cpu: &mut Cpu, op: &Op, segment: SegmentRegister) -> Result<(), Exception> {
    require_fsgsbase(cpu)?;
    let base = cpu.reg::<T>(op.dst).widen();
    if !is_canonical(base) {
        return Err(Exception::GP0);
    }
    cpu.set_segment_base(segment, base);
    Ok(())
}

impl Cpu {
    /// Sets the base of FS or GS.
    pub(super) fn set_segment_base(&mut self, segment: SegmentRegister, base: u64) {
        self.segments[segment as usize].base = base;
        self.update_segment(segment);
    }
}

fn rdfsbase<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    read_base::<T>(cpu, op, SegmentRegister::Fs)
}

fn rdgsbase<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    read_base::<T>(cpu, op, SegmentRegister::Gs)
}

fn wrfsbase<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    write_base::<T>(cpu, op, SegmentRegister::Fs)
}

fn wrgsbase<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    write_base::<T>(cpu, op, SegmentRegister::Gs)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.require_cpl0()?;
    let other = cpu.stored_msr(ringfence_x86::msr::KERNEL_GS_BASE);
    let base = cpu.segment(SegmentRegister::Gs).base;
    cpu.msrs.insert(ringfence_x86::msr::KERNEL_GS_BASE, base);
    cpu.set_segment_base(SegmentRegister::Gs, other);
    Ok(())
}

/// The handler for one of this family.
#[rustfmt::skip]
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match instruction.code() {
        C::Mov_r32_cr => read_control::<u32>,
        C::Mov_r64_cr => read_control::<u64>,
        C::Mov_cr_r32 => write_control::<u32>,
        C::Mov_cr_r64 => write_control::<u64>,
        C::Smsw_rm16 => smsw::<u16>,
        C::Smsw_r32m16 => smsw::<u32>,
        C::Smsw_r64m16 => smsw::<u64>,
        C::Invpcid_r32_m128 => invpcid::<u32>,
        C::Invpcid_r64_m128 => invpcid::<u64>,
        C::Rdfsbase_r32 => rdfsbase::<u32>,
        C::Rdfsbase_r64 => rdfsbase::<u64>,
        C::Rdgsbase_r32 => rdgsbase::<u32>,
        C::Rdgsbase_r64 => rdgsbase::<u64>,
        C::Wrfsbase_r32 => wrfsbase::<u32>,
        C::Wrfsbase_r64 => wrfsbase::<u64>,
        C::Wrgsbase_r32 => wrgsbase::<u32>,
        C::Wrgsbase_r64 => wrgsbase::<u64>,
        _ => match instruction.mnemonic() {
            Mnemonic::Lmsw => lmsw,
            Mnemonic::Clts => clts,
            Mnemonic::Invlpg => invlpg,
            Mnemonic::Wbinvd | Mnemonic::Wbnoinvd | Mnemonic::Invd => cache_maintenance,
            Mnemonic::Swapgs => swapgs,
            _ => return None,
        },
    })
}
