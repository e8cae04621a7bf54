//! Where the CPU meets its local APIC: MSRs, the register page, CR8 and the APIC id.

use ringfence_irqchip::LocalApic;
use ringfence_x86::{Exception, msr};

use crate::interp::cpu::Cpu;

/// One thing that a vCPU asks of its local APIC or tells it, in the course of its instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ApicAccess {
    /// A load from the register page, at this offset.
    PageRead(u64),
    /// A store to it.
    PageWrite(u64),
    /// RDMSR.
    MsrRead(u32),
    /// WRMSR.
    MsrWrite(u32),
    /// A read of CR8.
    PriorityRead,
    /// A write of CR8.
    PriorityWrite,
    /// Whether KVM's PV EOI can be offered.
    PvEoiPossible,
}

/// Who listens to what goes on between a vCPU and its local APIC, or stands in for it: lock-step records it on one vCPU
/// and plays it back to another.
pub(crate) trait ApicTap: Send + Sync {
    /// Answers in the local APIC's place: `data` is what is written, or becomes what is read; #GP(0) where it says so.
    /// `None`: the local APIC is to be asked, and [`ApicTap::note`] told.
    fn answer(&self, access: ApicAccess, data: &mut [u8]) -> Option<Result<(), Exception>>;
    /// What the local APIC was asked or told, and what became of it.
    fn note(&self, access: ApicAccess, data: &[u8], good: bool);
    /// IA32_APIC_BASE and where the register page is, if the tap stands in for the local APIC.
    fn base(&self) -> Option<(u64, Option<u64>)>;
}

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

    /// IA32_APIC_BASE and where the register page is, if anywhere.
    fn apic_base(&self) -> (u64, Option<u64>) {
        let stand_in = self.apic_tap.as_ref().and_then(|tap| tap.base());
        let own = || self.apic.as_ref().map_or((0, None), |apic| (apic.apic_base(), apic.mmio_base()));
        stand_in.unwrap_or_else(own)
    }

    /// Whether the local APIC is enabled in IA32_APIC_BASE, which CPUID shows (SDM 3A 10.4.3).
    pub(super) fn apic_enabled(&self) -> bool {
        self.apic_base().0 & 1 << 11 != 0
    }

    /// Physical address of the register page, if there is one.
    pub(in crate::interp) fn apic_page(&self) -> Option<u64> {
        self.apic_base().1
    }

    /// Asks the local APIC, or whoever stands in for it.
    fn ask_apic(
        &mut self,
        access: ApicAccess,
        data: &mut [u8],
        ask: impl FnOnce(&mut LocalApic, &mut [u8]) -> Result<(), Exception>,
    ) -> Result<(), Exception> {
        if let Some(answer) = self.apic_tap.as_ref().and_then(|tap| tap.answer(access, data)) {
            return answer;
        }
        let apic = self.apic.as_mut().ok_or(Exception::GP0)?;
        let result = ask(apic, data);
        if let Some(tap) = &self.apic_tap {
            tap.note(access, data, result.is_ok());
        }
        result
    }

    /// Likewise where it cannot fail: without a local APIC, reads give zero.
    fn ask_apic_always(
        &mut self,
        access: ApicAccess,
        data: &mut [u8],
        ask: impl FnOnce(&mut LocalApic, &mut [u8]),
    ) {
        // A failure means that there is none.
        let _ = self.ask_apic(access, data, |apic, data| {
            ask(apic, data);
            Ok(())
        });
    }

    /// Reads the register page.
    pub(in crate::interp) fn apic_page_read(&mut self, offset: u64, into: &mut [u8]) {
        self.ask_apic_always(ApicAccess::PageRead(offset), into, |apic, into| apic.mmio_read(offset, into));
    }

    /// Writes to it.
    pub(in crate::interp) fn apic_page_write(&mut self, offset: u64, from: &[u8]) {
        let mut data = from.to_vec();
        self.ask_apic_always(ApicAccess::PageWrite(offset), &mut data, |apic, data| {
            apic.mmio_write(offset, data);
        });
    }

    /// CR8: the task priority.
    pub(super) fn apic_cr8(&mut self) -> u64 {
        let mut data = [0];
        self.ask_apic_always(ApicAccess::PriorityRead, &mut data, |apic, data| data[0] = apic.cr8() as u8);
        u64::from(data[0])
    }

    /// Writes CR8; `value` is at most 15.
    pub(super) fn set_apic_cr8(&mut self, value: u64) {
        let mut data = [value as u8];
        self.ask_apic_always(ApicAccess::PriorityWrite, &mut data, |apic, data| {
            apic.set_cr8(u64::from(data[0]));
        });
    }

    /// Whether KVM's PV EOI can be offered for the interrupt in service.
    pub(super) fn apic_pv_eoi_possible(&mut self) -> bool {
        let mut data = [0];
        self.ask_apic_always(ApicAccess::PvEoiPossible, &mut data, |apic, data| {
            data[0] = u8::from(apic.pv_eoi_possible());
        });
        data[0] != 0
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
        let mut data = [0; 8];
        self.ask_apic(ApicAccess::MsrRead(number), &mut data, |apic, data| {
            data.copy_from_slice(&apic.msr_read(number).map_err(|_| Exception::GP0)?.to_le_bytes());
            Ok(())
        })?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes one of those.
    ///
    /// # Errors
    /// #GP(0).
    pub(super) fn apic_msr_write(&mut self, number: u32, value: u64) -> Result<(), Exception> {
        self.sync_clock();
        self.ask_apic(ApicAccess::MsrWrite(number), &mut value.to_le_bytes(), |apic, _| {
            apic.msr_write(number, value).map_err(|_| Exception::GP0)
        })?;
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
