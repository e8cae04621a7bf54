//! Reading and writing registers by number, and through the xAPIC page.

use super::LocalApic;
use super::local::error;
use super::registers::{LVT_LEVEL, LVT_MASKED, LVT_REMOTE_IRR, LVT_STORED, Lvt, VERSION, number, register};
use super::timer::TimerMode;

impl LocalApic {
    /// Reads `data.len()` bytes at `offset` (0 to FFFH) of the register page. Each register is 32 bits wide at
    /// a multiple of 16; bytes between registers read as zero (SDM 3A 10.4.1). All ones if the page does not
    /// answer now.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        if self.mmio_base().is_none() {
            data.fill(0xff);
            return;
        }
        let mut present = None;
        for (address, byte) in (offset..).zip(data) {
            let (index, within) = ((address >> 4) as u32, (address & 0xf) as usize);
            let value = match present {
                Some((known, value)) if known == index => value,
                _ => {
                    let value = self.page_read(index);
                    present = Some((index, value));
                    value
                }
            };
            *byte = value.to_le_bytes().get(within).copied().unwrap_or(0);
        }
    }

    fn page_read(&mut self, index: u32) -> u32 {
        let register = register(index);
        if !register.xapic.reads() {
            if !register.xapic.writes() {
                self.record_error(error::ILLEGAL_REGISTER);
            }
            return 0;
        }
        self.read_register(index) as u32
    }

    /// Writes to the register page. Only aligned writes of 32 bits do something (SDM 3A 10.4.1); of a wider
    /// write the first 32 bits count.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let Some(value) = data.first_chunk::<4>() else { return };
        if offset & 0xf != 0 || self.mmio_base().is_none() {
            return;
        }
        let (index, value) = ((offset >> 4) as u32, u32::from_le_bytes(*value));
        let register = register(index);
        if register.xapic.writes() {
            self.write_register(index, u64::from(value & register.bits));
        } else if !register.xapic.reads() {
            self.record_error(error::ILLEGAL_REGISTER);
        }
    }

    /// The value of a readable register. 64 bits wide only for ICR in x2APIC mode.
    pub(super) fn read_register(&mut self, index: u32) -> u64 {
        let registers = &self.registers;
        let x2apic = registers.x2apic();
        let value = match index {
            number::ID => self.id() << if x2apic { 0 } else { 24 },
            number::VERSION => VERSION,
            number::TPR => u32::from(registers.tpr),
            number::PPR => u32::from(registers.ppr()),
            number::LDR => registers.logical_id(self.id()),
            number::DFR => registers.dfr,
            number::SVR => registers.svr,
            number::ISR..number::TMR => registers.isr[(index - number::ISR) as usize],
            number::TMR..number::IRR => self.inbox.trigger_modes()[(index - number::TMR) as usize],
            number::IRR..number::ESR => self.inbox.requests()[(index - number::IRR) as usize],
            number::ESR => {
                self.service();
                self.registers.esr
            }
            number::ICR if x2apic => return registers.icr,
            number::ICR => registers.icr as u32,
            number::ICR_HIGH => (registers.icr >> 32) as u32,
            number::LVT..number::INITIAL_COUNT => registers.lvt[(index - number::LVT) as usize],
            number::INITIAL_COUNT => registers.timer.initial,
            number::CURRENT_COUNT => registers.timer.current(self.clock.now()),
            number::DIVIDE => registers.timer.divide,
            _ => 0,
        };
        u64::from(value)
    }

    /// Writes a writable register; reserved bits are clear. 64 bits wide only for ICR in x2APIC mode.
    pub(super) fn write_register(&mut self, index: u32, wide: u64) {
        let value = wide as u32;
        match index {
            number::TPR => self.set_tpr(value as u8),
            number::EOI => self.eoi(),
            number::LDR => {
                self.registers.ldr = value;
                self.publish();
            }
            number::DFR => {
                self.registers.dfr = value | 0x0fff_ffff;
                self.publish();
            }
            number::SVR => self.write_svr(value),
            number::ESR => {
                self.service();
                self.registers.esr = std::mem::take(&mut self.registers.errors);
            }
            number::ICR => {
                let high = if self.registers.x2apic() { wide } else { self.registers.icr } & !0xffff_ffff;
                // Delivery status: always idle.
                self.registers.icr = high | u64::from(value & !(1 << 12));
                self.send_ipi();
            }
            number::ICR_HIGH => {
                self.registers.icr = self.registers.icr & 0xffff_ffff | u64::from(value) << 32;
            }
            number::LVT..number::INITIAL_COUNT => self.write_lvt((index - number::LVT) as usize, value),
            number::INITIAL_COUNT => self.registers.timer.write_initial(self.clock.now(), value),
            number::DIVIDE => self.registers.timer.write_divide(self.clock.now(), value),
            number::SELF_IPI => self.send_self_ipi(value as u8),
            _ => {}
        }
    }

    /// While the APIC is disabled by software, all entries are masked (SDM 3A 10.4.7.2).
    fn write_svr(&mut self, value: u32) {
        let was_enabled = self.registers.software_enabled();
        self.registers.svr = value;
        if !self.registers.software_enabled() {
            for lvt in &mut self.registers.lvt {
                *lvt |= LVT_MASKED;
            }
        }
        self.publish();
        if !was_enabled && self.registers.software_enabled() {
            self.chip.retry_levels(self.id());
        }
    }

    fn write_lvt(&mut self, entry: usize, value: u32) {
        let mut value = value & LVT_STORED[entry];
        if !self.registers.software_enabled() {
            value |= LVT_MASKED;
        }
        if entry == Lvt::Lint0 as usize && value & LVT_LEVEL != 0 {
            value |= self.registers.lvt[entry] & LVT_REMOTE_IRR;
        }
        self.registers.lvt[entry] = value;
        if entry == Lvt::Timer as usize {
            self.registers.timer.set_mode(TimerMode::from_lvt(value));
        } else if entry == Lvt::Lint0 as usize {
            self.publish();
            self.sample_lint0();
        }
    }
}
