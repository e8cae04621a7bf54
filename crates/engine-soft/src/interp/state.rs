//! The architectural state as a whole: saved, loaded, reset.

use ringfence_engine::{Activity, CpuState, EngineError};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{Segment, Selector, attribute};
use ringfence_x86::{Cr0, Cr4, Efer, Gpr, Rflags, SegmentRegister};

use super::cpu::Cpu;
use super::op::RIP;
use super::system::System;

const CS: usize = SegmentRegister::Cs as usize;
const SS: usize = SegmentRegister::Ss as usize;

impl Cpu {
    /// The architectural state, apart from the local APIC's.
    pub fn save_state(&self) -> CpuState {
        let mut state = CpuState {
            gpr: std::array::from_fn(|i| self.regs[i]),
            rip: self.regs[RIP],
            rflags: self.rflags(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0.bits(),
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4.bits(),
            efer: self.efer.bits(),
            xcr0: 0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            msrs: self.msrs.to_map(),
            vector: ringfence_engine::VectorState::default(),
            x87: ringfence_engine::X87State::default(),
            interrupt_shadow: self.interrupt_shadow,
            nmi_masked: self.nmi_masked,
            activity: self.activity,
        };
        self.vector.save(&mut state);
        state
    }

    /// Loads an architectural state.
    ///
    /// # Errors
    /// [`EngineError::BadState`] if no CPU of this model can be in it; nothing has changed then.
    pub fn load_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.check_state(state).map_err(EngineError::BadState)?;
        let pae = state.cr0 & Cr0::PG.bits() != 0 && state.cr4 & Cr4::PAE.bits() != 0;
        let pdpte = if pae && state.efer & Efer::LMA.bits() == 0 {
            let bad =
                |_| EngineError::BadState("a PAE page-directory pointer has a reserved bit set".to_owned());
            self.read_pdptes(state.cr3).map_err(bad)?
        } else {
            [0; 4]
        };
        self.vector.load(state).map_err(EngineError::BadState)?;
        self.set_registers(state);
        self.msrs = super::msrs::Msrs::from_map(&state.msrs);
        self.pdpte = pdpte;
        self.publish_tsc_offset();
        self.refresh_kvmclock();
        Ok(())
    }

    fn check_state(&self, state: &CpuState) -> Result<(), String> {
        let (cr0, cr4, efer) = (
            Cr0::from_bits_retain(state.cr0),
            Cr4::from_bits_retain(state.cr4),
            Efer::from_bits_retain(state.efer),
        );
        let rflags = Rflags::from_bits_retain(state.rflags);
        let long = efer.contains(Efer::LMA);
        let paging = cr0.contains(Cr0::PG);
        let virtual_8086 = rflags.contains(Rflags::VM);
        let cs = &state.segments[CS];
        let reserved_flags = !(Rflags::WRITABLE | Rflags::FIXED).bits();
        let bases = state.segments.iter().chain([&state.ldtr, &state.tr]).map(|s| s.base);
        let tables = [state.gdtr.base, state.idtr.base];
        let rules = [
            (state.rflags & reserved_flags == 0 && rflags.contains(Rflags::FIXED), "RFLAGS"),
            (state.cr0 >> 32 == 0, "CR0"),
            (!paging || cr0.contains(Cr0::PE), "CR0 (paging without protection)"),
            (!cr0.contains(Cr0::NW) || cr0.contains(Cr0::CD), "CR0 (NW without CD)"),
            (state.cr4 & !self.features.cr4().bits() == 0, "CR4"),
            (state.efer & !self.features.efer().bits() == 0, "EFER"),
            (long == (paging && efer.contains(Efer::LME)), "EFER (LMA must be LME and CR0.PG)"),
            (!long || cr4.contains(Cr4::PAE), "CR4 (long mode without PAE)"),
            (!cr4.contains(Cr4::PCIDE) || long, "CR4 (PCIDE outside long mode)"),
            (state.cr3 >> self.physical_bits == 0, "CR3"),
            (!virtual_8086 || (cr0.contains(Cr0::PE) && !long), "RFLAGS (VM)"),
            (!long || !cs.has(attribute::LONG | attribute::DB), "CS (both 64-bit and 32-bit)"),
            (virtual_8086 || !cr0.contains(Cr0::PE) || cs.has(attribute::S), "CS (a system segment)"),
            (!long || is_canonical(state.rip) || !cs.has(attribute::LONG), "RIP"),
            (bases.chain(tables).all(is_canonical), "the base of a segment or descriptor table"),
            ((state.dr6 | state.dr7) >> 32 == 0, "DR6 or DR7"),
        ];
        if let Some((_, what)) = rules.iter().find(|(holds, _)| !holds) {
            return Err(format!("no CPU of this model can have this value of {what}"));
        }
        for (&number, &value) in &state.msrs {
            if self.check_stored_msr(number, value).is_err() {
                return Err(format!("MSR {number:#x} cannot be {value:#x} on this CPU model"));
            }
        }
        Ok(())
    }

    /// Loads everything but MSRs, vector and x87 registers.
    fn set_registers(&mut self, state: &CpuState) {
        self.regs[..16].copy_from_slice(&state.gpr);
        self.regs[RIP] = state.rip;
        self.segments = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = Cr0::from_bits_retain(state.cr0) | Cr0::ET;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = Cr4::from_bits_retain(state.cr4);
        self.efer = Efer::from_bits_retain(state.efer);
        self.dr = state.dr;
        self.dr6 = state.dr6;
        self.dr7 = state.dr7;
        self.interrupt_shadow = state.interrupt_shadow;
        self.nmi_masked = state.nmi_masked;
        self.activity = state.activity;
        self.breakpoints_hit = 0;
        let random = self.system.random;
        self.system = System { random, ..System::default() };
        self.set_rflags(state.rflags);
        // SS holds the privilege level, a null one too (SDM 3C 24.4.1).
        self.cpl = if !self.cr0.contains(Cr0::PE) {
            0
        } else if self.flags.contains(Rflags::VM) {
            3
        } else {
            self.segments[SS].dpl()
        };
        self.tlb.flush();
        self.update_mode();
    }

    /// To the state after power-on (SDM 3A table 9-1). The local APIC is reset too.
    pub fn reset(&mut self) {
        self.vector.reset();
        self.msrs.clear();
        self.restart(0);
        if let Some(apic) = &mut self.apic {
            apic.reset();
        }
        self.publish_tsc_offset();
        self.activity = if self.apic_id() == 0 { Activity::Active } else { Activity::WaitForSipi };
    }

    /// What INIT does: vector and x87 registers and most MSRs stay, as do CR0's cache bits. A CPU other than the first
    /// one then waits for a start-up IPI (SDM 3A table 9-1, 8.4.2).
    pub fn init(&mut self) {
        let cache_bits = self.cr0.bits() & (Cr0::CD | Cr0::NW).bits();
        self.restart(cache_bits);
        if let Some(apic) = &mut self.apic {
            apic.init();
        }
        self.activity = if self.apic_id() == 0 { Activity::Active } else { Activity::WaitForSipi };
    }

    fn restart(&mut self, cache_bits: u64) {
        let mut state = CpuState::default();
        if cache_bits != 0 {
            state.cr0 = state.cr0 & !(Cr0::CD | Cr0::NW).bits() | cache_bits;
        }
        // The processor's signature (SDM 3A 9.1.3).
        state.gpr[Gpr::Rdx as usize] = u64::from(self.cpuid.get(1, 0).eax);
        self.set_registers(&state);
    }

    /// Starts at page `page` in real mode: the start-up IPI's effect (SDM 3A 8.4.3).
    pub fn start_up(&mut self, page: u8) {
        let cs = &mut self.segments[CS];
        *cs = Segment {
            selector: Selector(u16::from(page) << 8),
            base: u64::from(page) << 12,
            limit: 0xffff,
            attributes: cs.attributes,
        };
        self.regs[RIP] = 0;
        self.activity = Activity::Active;
        self.update_mode();
    }
}
