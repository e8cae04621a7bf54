//! Where the CPU meets its local APIC: MSRs, CR8 and the APIC id.

use ringfence_irqchip::LocalApic;
use ringfence_x86::{Exception, msr};

use crate::interp::cpu::Cpu;

impl Cpu {
    /// Gives the vCPU its local APIC. Without one (as in tests of single instructions) its MSRs do not exist and CR8
    /// reads as zero.
    pub fn connect_apic(&mut self, apic: LocalApic) {
        self.apic = Some(apic);
    }

    /// The APIC id, which CPUID shows.
    pub fn apic_id(&self) -> u32 {
        self.apic.as_ref().map_or(0, LocalApic::id)
    }

    /// Whether the local APIC is enabled in IA32_APIC_BASE, which CPUID shows (SDM 3A 10.4.3).
    pub(super) fn apic_enabled(&self) -> bool {
        self.apic.as_ref().is_some_and(|apic| apic.apic_base() & 1 << 11 != 0)
    }

    /// CR8: the task priority.
    pub(super) fn apic_cr8(&self) -> u64 {
        self.apic.as_ref().map_or(0, LocalApic::cr8)
    }

    /// Writes CR8; `value` is at most 15.
    pub(super) fn set_apic_cr8(&mut self, value: u64) {
        if let Some(apic) = &mut self.apic {
            apic.set_cr8(value);
        }
    }

    /// Whether an MSR is the local APIC's business.
    pub(super) fn is_apic_msr(number: u32) -> bool {
        matches!(number, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST)
    }

    /// Reads one of those.
    ///
    /// # Errors
    /// #GP(0).
    pub(super) fn apic_msr_read(&mut self, number: u32) -> Result<u64, Exception> {
        self.sync_clock();
        let apic = self.apic.as_mut().ok_or(Exception::GP0)?;
        apic.msr_read(number).map_err(|_| Exception::GP0)
    }

    /// Writes one of those.
    ///
    /// # Errors
    /// #GP(0).
    pub(super) fn apic_msr_write(&mut self, number: u32, value: u64) -> Result<(), Exception> {
        self.sync_clock();
        let apic = self.apic.as_mut().ok_or(Exception::GP0)?;
        apic.msr_write(number, value).map_err(|_| Exception::GP0)?;
        if number == msr::APIC_BASE {
            // The register page may have moved.
            self.tlb.flush();
        }
        self.leave_block = true;
        Ok(())
    }

    /// Tells the local APIC how far the guest's TSC is ahead, which its deadline timer counts by.
    pub(in crate::interp) fn publish_tsc_offset(&mut self) {
        let offset = self.tsc_offset() as i64;
        if let Some(apic) = &mut self.apic {
            apic.set_tsc_offset(offset);
        }
    }
}
