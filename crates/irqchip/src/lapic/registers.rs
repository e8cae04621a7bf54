//! The registers of a local APIC: where they are and who may write which bits.

use super::inbox::address;
use super::timer::ApicTimer;

/// Bits of IA32_APIC_BASE (SDM 3A figure 10-5 and 10-26).
pub(crate) mod base {
    pub(crate) const BSP: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLE: u64 = 1 << 11;
    /// Where the registers are after reset.
    pub(crate) const DEFAULT: u64 = 0xfee0_0000;
}

/// Version register: integrated APIC, six LVT entries, end-of-interrupt broadcasts cannot be suppressed.
pub(crate) const VERSION: u32 = 0x0005_0014;
/// Bit 8 of the spurious-interrupt vector register.
pub(crate) const SVR_ENABLE: u32 = 1 << 8;
/// Mask bit of an LVT entry.
pub(crate) const LVT_MASKED: u32 = 1 << 16;
/// Remote IRR of LINT0 and LINT1.
pub(crate) const LVT_REMOTE_IRR: u32 = 1 << 14;
/// Level trigger of LINT0 and LINT1.
pub(crate) const LVT_LEVEL: u32 = 1 << 15;

/// An entry of the local vector table (SDM 3A 10.5.1), in the order of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lvt {
    /// The timer.
    Timer,
    /// Thermal sensor.
    Thermal,
    /// Performance counters.
    Performance,
    /// Wired to the 8259 pair.
    Lint0,
    /// Wired to the NMI line.
    Lint1,
    /// Errors of the local APIC itself.
    Error,
}

/// Numbers of registers: offset in the page divided by 16, MSR number less 800H.
pub(crate) mod number {
    pub(crate) const ID: u32 = 0x02;
    pub(crate) const VERSION: u32 = 0x03;
    pub(crate) const TPR: u32 = 0x08;
    pub(crate) const APR: u32 = 0x09;
    pub(crate) const PPR: u32 = 0x0a;
    pub(crate) const EOI: u32 = 0x0b;
    pub(crate) const LDR: u32 = 0x0d;
    pub(crate) const DFR: u32 = 0x0e;
    pub(crate) const SVR: u32 = 0x0f;
    pub(crate) const ISR: u32 = 0x10;
    pub(crate) const TMR: u32 = 0x18;
    pub(crate) const IRR: u32 = 0x20;
    pub(crate) const ESR: u32 = 0x28;
    pub(crate) const ICR: u32 = 0x30;
    pub(crate) const ICR_HIGH: u32 = 0x31;
    pub(crate) const LVT: u32 = 0x32;
    pub(crate) const INITIAL_COUNT: u32 = 0x38;
    pub(crate) const CURRENT_COUNT: u32 = 0x39;
    pub(crate) const DIVIDE: u32 = 0x3e;
    pub(crate) const SELF_IPI: u32 = 0x3f;
}

/// How a register can be used in one of the two modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    None,
    Read,
    Write,
    ReadWrite,
}

impl Access {
    pub(crate) fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }
}

/// What a register allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Register {
    /// In the register page (SDM 3A table 10-1).
    pub(crate) xapic: Access,
    /// Through an MSR (SDM 3A table 10-6).
    pub(crate) x2apic: Access,
    /// Bits that are not reserved: setting another raises #GP in x2APIC mode and is ignored in xAPIC mode.
    pub(crate) bits: u32,
}

/// Writable bits of the LVT entries. Read-only bits (12, 14) may be written without effect.
pub(crate) const LVT_BITS: [u32; 6] = [0x7_10ff, 0x1_17ff, 0x1_17ff, 0x1_f7ff, 0x1_f7ff, 0x1_10ff];
/// Bits of the LVT entries that keep what is written.
pub(crate) const LVT_STORED: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

/// What register `number` allows.
pub(crate) const fn register(number: u32) -> Register {
    use Access::{None, Read, ReadWrite, Write};
    let (xapic, x2apic, bits) = match number {
        // Writing the id is model specific (10.4.6); here it is fixed, but writing it is no error.
        number::ID => (ReadWrite, Read, 0),
        number::VERSION => (Read, Read, 0),
        number::TPR => (ReadWrite, ReadWrite, 0xff),
        number::APR => (Read, None, 0),
        number::PPR => (Read, Read, 0),
        number::EOI => (Write, Write, 0),
        number::LDR => (ReadWrite, Read, 0xff00_0000),
        number::DFR => (ReadWrite, None, 0xf000_0000),
        number::SVR => (ReadWrite, ReadWrite, 0x3ff),
        number::ISR..=0x27 => (Read, Read, 0),
        number::ESR => (ReadWrite, ReadWrite, 0),
        number::ICR => (ReadWrite, ReadWrite, 0x000c_dfff),
        number::ICR_HIGH => (ReadWrite, None, 0xff00_0000),
        number::LVT..=0x37 => (ReadWrite, ReadWrite, LVT_BITS[(number - number::LVT) as usize]),
        number::INITIAL_COUNT => (ReadWrite, ReadWrite, u32::MAX),
        number::CURRENT_COUNT => (Read, Read, 0),
        number::DIVIDE => (ReadWrite, ReadWrite, 0xb),
        number::SELF_IPI => (None, Write, 0xff),
        _ => (None, None, 0),
    };
    Register { xapic, x2apic, bits }
}

/// The registers that only the owner changes. Requests and trigger modes are in the inbox.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(super) apic_base: u64,
    pub(super) tpr: u8,
    pub(super) ldr: u32,
    pub(super) dfr: u32,
    pub(super) svr: u32,
    /// What a read of the error status register gives: the errors up to the last write to it.
    pub(super) esr: u32,
    /// Errors since then.
    pub(super) errors: u32,
    /// Interrupt command register; the destination in bits 63:32 in x2APIC mode, 63:56 in xAPIC mode.
    pub(super) icr: u64,
    pub(super) lvt: [u32; 6],
    pub(super) isr: [u32; 8],
    pub(super) timer: ApicTimer,
}

impl Registers {
    /// After power-on (SDM 3A 10.4.7.1).
    ///
    /// The bootstrap processor's LINT0 is as firmware leaves it, in virtual wire mode (MP specification
    /// 3.6.2.2), because a kernel that is entered directly never meets a firmware.
    pub(super) fn reset(id: u32) -> Self {
        let bootstrap = id == 0;
        let mut lvt = [LVT_MASKED; 6];
        if bootstrap {
            lvt[Lvt::Lint0 as usize] = 0x700;
        }
        Self {
            apic_base: base::DEFAULT | base::ENABLE | if bootstrap { base::BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt,
            isr: [0; 8],
            timer: ApicTimer::default(),
        }
    }

    pub(crate) fn tpr(&self) -> u8 {
        self.tpr
    }

    pub(super) fn enabled(&self) -> bool {
        self.apic_base & base::ENABLE != 0
    }

    pub(super) fn x2apic(&self) -> bool {
        self.apic_base & base::X2APIC != 0
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    pub(super) fn lvt(&self, entry: Lvt) -> u32 {
        self.lvt[entry as usize]
    }

    /// Whether the INTR output of the 8259 pair reaches the CPU: through LINT0 as ExtINT, or straight if the
    /// local APIC is disabled (SDM 3A 10.4.3).
    pub(super) fn accepts_pic(&self) -> bool {
        let lint0 = self.lvt(Lvt::Lint0);
        !self.enabled() || (lint0 & LVT_MASKED == 0 && (lint0 >> 8) & 7 == 7)
    }

    /// In x2APIC mode the logical id follows from the id (SDM 3A 10.12.10.2).
    pub(super) fn logical_id(&self, id: u32) -> u32 {
        if self.x2apic() { (id >> 4) << 16 | 1 << (id & 0xf) } else { self.ldr }
    }

    /// What senders must know.
    pub(crate) fn address(&self, id: u32) -> u64 {
        let logical = self.logical_id(id) >> if self.x2apic() { 0 } else { 24 };
        let lint0_open = !self.enabled() || self.lvt(Lvt::Lint0) & LVT_MASKED == 0;
        let flags = [
            (self.enabled(), address::ENABLED),
            (self.software_enabled(), address::SOFTWARE_ENABLED),
            (self.x2apic(), address::X2APIC),
            (self.dfr >> 28 == 0, address::CLUSTER),
            (lint0_open, address::LINT0_OPEN),
        ];
        flags.iter().fold(u64::from(logical), |word, (set, flag)| if *set { word | flag } else { word })
    }

    /// The highest vector in service.
    pub(super) fn highest_in_service(&self) -> Option<u8> {
        highest(&self.isr)
    }

    /// Processor priority (SDM 3A 10.8.3.1).
    pub(super) fn ppr(&self) -> u8 {
        let in_service = self.highest_in_service().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }
}

/// The highest vector in a 256-bit register.
pub(super) fn highest(words: &[u32; 8]) -> Option<u8> {
    let (index, word) = words.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
    Some((index as u32 * 32 + 31 - word.leading_zeros()) as u8)
}
