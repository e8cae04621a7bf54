//! The saved state of a local APIC.

use ringfence_engine::VirtualTime;
use serde::{Deserialize, Serialize};

use super::inbox::{LapicInbox, pending, sipi_vector};
use super::registers::{LVT_REMOTE_IRR, LVT_STORED, Lvt, Registers, base};
use super::timer::{ApicTimer, TimerMode};

/// The local vector table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LvtState {
    /// The timer.
    pub timer: u32,
    /// Thermal sensor.
    pub thermal: u32,
    /// Performance counters.
    pub performance: u32,
    /// LINT0.
    pub lint0: u32,
    /// LINT1.
    pub lint1: u32,
    /// Errors.
    pub error: u32,
}

/// Everything a local APIC remembers, version 1 of the section `lapic.N`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// APIC id.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination (xAPIC mode).
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// Error status as software reads it.
    pub esr: u32,
    /// Errors since software last wrote the error status.
    pub errors: u32,
    /// Interrupt command; the destination in bits 63:32 in x2APIC mode, in bits 63:56 in xAPIC mode.
    pub icr: u64,
    /// Local vector table.
    pub lvt: LvtState,
    /// In-service register, vector 0 in bit 0 of word 0.
    pub isr: [u32; 8],
    /// Trigger mode register.
    pub tmr: [u32; 8],
    /// Interrupt request register.
    pub irr: [u32; 8],
    /// Initial count.
    pub initial_count: u32,
    /// Divide configuration.
    pub divide: u32,
    /// Nanoseconds until the counting timer expires; `None` if it stands still or is in TSC-deadline mode.
    pub remaining_ns: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 is disarmed.
    pub tsc_deadline: u64,
    /// An NMI is pending.
    pub nmi: bool,
    /// An INIT is pending.
    pub init: bool,
    /// A start-up IPI with this vector is pending.
    pub sipi: Option<u8>,
    /// An ExtINT message is pending.
    pub extint: bool,
}

impl LapicState {
    /// The state after power-on, with the APIC id `id`.
    pub fn reset(id: u32) -> Self {
        Self::capture(&Registers::reset(id), &LapicInbox::new(id), VirtualTime(0))
    }

    pub(crate) fn capture(registers: &Registers, inbox: &LapicInbox, now: VirtualTime) -> Self {
        let (word, extint) = inbox.snapshot();
        let timer = &registers.timer;
        let counting = timer.mode != TimerMode::TscDeadline && timer.deadline != VirtualTime::NEVER;
        let [lvt_timer, thermal, performance, lint0, lint1, error] = registers.lvt;
        Self {
            id: inbox.id(),
            apic_base: registers.apic_base,
            tpr: registers.tpr,
            ldr: registers.ldr,
            dfr: registers.dfr,
            svr: registers.svr,
            esr: registers.esr,
            errors: registers.errors,
            icr: registers.icr,
            lvt: LvtState { timer: lvt_timer, thermal, performance, lint0, lint1, error },
            isr: registers.isr,
            tmr: inbox.trigger_modes(),
            irr: inbox.requests(),
            initial_count: timer.initial,
            divide: timer.divide,
            remaining_ns: counting.then(|| timer.deadline.since(now)),
            tsc_deadline: timer.tsc_deadline,
            nmi: word & pending::NMI != 0,
            init: word & pending::INIT != 0,
            sipi: sipi_vector(word),
            extint,
        }
    }

    /// The registers that this state describes, with the TSC deadline not yet armed; or what cannot be.
    pub(crate) fn registers(
        &self,
        id: u32,
        address_mask: u64,
        now: VirtualTime,
    ) -> Result<Registers, &'static str> {
        const FLAGS: u64 = base::BSP | base::X2APIC | base::ENABLE;
        if self.id != id {
            return Err("the APIC id is another one");
        }
        if self.apic_base & !(address_mask & !0xfff | FLAGS) != 0 {
            return Err("the APIC base has reserved bits set");
        }
        if self.apic_base & (base::X2APIC | base::ENABLE) == base::X2APIC {
            return Err("the APIC is in no mode that exists");
        }
        if (self.isr[0] | self.irr[0]) & 0xffff != 0 {
            return Err("a vector below 16 is requested or in service");
        }
        let stored = self.lvt.array();
        let mut lvt: [u32; 6] = std::array::from_fn(|i| stored[i] & LVT_STORED[i]);
        lvt[Lvt::Lint0 as usize] |= self.lvt.lint0 & LVT_REMOTE_IRR;
        // No count lasts longer than 2^32 times 128.
        let deadline = match self.remaining_ns {
            Some(ns) if ns <= 1 << 39 => now.after(ns),
            Some(_) => return Err("the timer runs longer than it can"),
            None => VirtualTime::NEVER,
        };
        let timer = ApicTimer {
            mode: TimerMode::from_lvt(lvt[Lvt::Timer as usize]),
            initial: self.initial_count,
            divide: self.divide & 0xb,
            deadline,
            tsc_deadline: self.tsc_deadline,
            tsc_offset: 0,
        };
        Ok(Registers {
            apic_base: self.apic_base,
            tpr: self.tpr,
            ldr: self.ldr & 0xff00_0000,
            dfr: self.dfr | 0x0fff_ffff,
            svr: self.svr & 0x3ff,
            esr: self.esr & 0xff,
            errors: self.errors & 0xff,
            icr: self.icr,
            lvt,
            isr: self.isr,
            timer,
        })
    }

    /// Posts what is pending. Everything is to be looked at again.
    pub(crate) fn load_inbox(&self, inbox: &LapicInbox) {
        inbox.load_requests(self.irr, self.tmr);
        let bits =
            [(self.nmi, pending::NMI), (self.init, pending::INIT), (self.sipi.is_some(), pending::SIPI)];
        let bits =
            bits.iter().fold(pending::INTERRUPT, |word, (set, bit)| if *set { word | bit } else { word });
        inbox.load_pending(bits, self.sipi.unwrap_or(0), self.extint);
    }
}

impl LvtState {
    /// The entries in the order of the registers.
    pub(super) fn array(&self) -> [u32; 6] {
        [self.timer, self.thermal, self.performance, self.lint0, self.lint1, self.error]
    }
}
