//! Model-specific registers: IA32_APIC_BASE, IA32_TSC_DEADLINE and those of x2APIC mode.

use ringfence_x86::msr;

use super::LocalApic;
use super::registers::{LVT_MASKED, Lvt, Registers, base, number, register};

/// The access raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access to the local APIC's MSR raises #GP(0)")]
pub struct MsrFault;

impl LocalApic {
    /// Whether an MSR is one of the local APIC's.
    pub const fn has_msr(index: u32) -> bool {
        matches!(index, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST)
    }

    /// Reads an MSR of the local APIC.
    ///
    /// # Errors
    /// [`MsrFault`] if it does not exist in the present mode or is write-only (SDM 3A 10.12.1.2).
    pub fn msr_read(&mut self, index: u32) -> Result<u64, MsrFault> {
        match index {
            msr::APIC_BASE => Ok(self.registers.apic_base),
            msr::TSC_DEADLINE if self.chip.config().tsc_deadline => Ok(self.registers.timer.tsc_deadline),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let index = index - msr::X2APIC_FIRST;
                if !self.registers.x2apic() || !register(index).x2apic.reads() {
                    return Err(MsrFault);
                }
                Ok(self.read_register(index))
            }
            _ => Err(MsrFault),
        }
    }

    /// Writes an MSR of the local APIC.
    ///
    /// # Errors
    /// [`MsrFault`] if it does not exist in the present mode or is read-only, if a reserved bit is set, or if
    /// the change of mode is not allowed; nothing has changed then.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        match index {
            msr::APIC_BASE => self.write_apic_base(value),
            msr::TSC_DEADLINE if self.chip.config().tsc_deadline => {
                self.registers.timer.write_tsc_deadline(&self.clock, value);
                Ok(())
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let index = index - msr::X2APIC_FIRST;
                let register = register(index);
                let bits = match index {
                    number::ICR => u64::from(register.bits) | 0xffff_ffff_0000_0000,
                    _ => u64::from(register.bits),
                };
                if !self.registers.x2apic() || !register.x2apic.writes() || value & !bits != 0 {
                    return Err(MsrFault);
                }
                self.write_register(index, value);
                Ok(())
            }
            _ => Err(MsrFault),
        }
    }

    /// SDM 3A 10.4.4, 10.12.1 and the transitions of 10.12.5.
    fn write_apic_base(&mut self, value: u64) -> Result<(), MsrFault> {
        const MODE: u64 = base::ENABLE | base::X2APIC;
        const DISABLED: u64 = 0;
        const XAPIC: u64 = base::ENABLE;
        let config = self.chip.config();
        let mut bits = config.address_mask() & !0xfff | base::BSP | base::ENABLE;
        if config.x2apic {
            bits |= base::X2APIC;
        }
        if value & !bits != 0 {
            return Err(MsrFault);
        }
        let old = self.registers.apic_base & MODE;
        match (old, value & MODE) {
            (old, new) if old == new => {}
            (DISABLED, XAPIC) => {}
            (XAPIC, MODE) => self.registers.icr &= 0xffff_ffff,
            (_, DISABLED) => self.switch_off(),
            _ => return Err(MsrFault),
        }
        // Which processor is the bootstrap processor was settled at power-on.
        let bootstrap = self.registers.apic_base & base::BSP;
        self.registers.apic_base = value & !base::BSP | bootstrap;
        self.publish();
        self.sample_lint0();
        self.reconsider();
        Ok(())
    }

    /// A local APIC that is disabled loses its state (10.4.3, 10.12.5.1).
    fn switch_off(&mut self) {
        let tsc_offset = self.registers.timer.tsc_offset;
        self.registers = Registers { apic_base: self.registers.apic_base, ..Registers::reset(self.id()) };
        self.registers.lvt[Lvt::Lint0 as usize] = LVT_MASKED;
        self.registers.timer.tsc_offset = tsc_offset;
        self.inbox.load_requests([0; 8], [0; 8]);
    }
}
