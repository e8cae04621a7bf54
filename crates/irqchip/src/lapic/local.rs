//! Interrupts of the local APIC's own: the local vector table, wires and errors.

use super::LocalApic;
use super::inbox::{event, pending};
use super::registers::{LVT_LEVEL, LVT_MASKED, LVT_REMOTE_IRR, Lvt};
use crate::message::DeliveryMode;

/// Bits of the error status register (SDM 3A 10.5.3).
pub(super) mod error {
    pub(in crate::lapic) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(in crate::lapic) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(in crate::lapic) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

impl LocalApic {
    /// Requests the interrupt of an entry of the local vector table, as its source would. For LINT0 and LINT1
    /// use the wires.
    pub fn local_interrupt(&mut self, entry: Lvt) {
        let lvt = self.registers.lvt(entry);
        if !self.registers.enabled() || lvt & LVT_MASKED != 0 {
            return;
        }
        if entry == Lvt::Performance {
            // SDM 3B 19.6.3: taking the interrupt masks the entry.
            self.registers.lvt[entry as usize] |= LVT_MASKED;
        }
        let mode = match entry {
            Lvt::Timer | Lvt::Error => DeliveryMode::Fixed,
            _ => DeliveryMode::from_register(lvt),
        };
        match mode {
            DeliveryMode::Fixed if lvt as u8 >= 16 => {
                self.inbox.post_vector(lvt as u8, false);
            }
            // An error about the error entry itself cannot be told by an interrupt.
            DeliveryMode::Fixed if entry == Lvt::Error => {
                self.registers.errors |= error::RECEIVE_ILLEGAL_VECTOR
            }
            DeliveryMode::Fixed => self.record_error(error::RECEIVE_ILLEGAL_VECTOR),
            DeliveryMode::Nmi => self.inbox.raise_own(pending::NMI),
            DeliveryMode::Init => {
                self.inbox.post_init();
            }
            DeliveryMode::ExtInt => self.inbox.raise_own(pending::INTERRUPT),
            _ => {}
        }
    }

    /// Notes an error and requests the error interrupt.
    pub(super) fn record_error(&mut self, bit: u32) {
        self.registers.errors |= bit;
        self.local_interrupt(Lvt::Error);
    }

    /// Handles what came in beside vectors.
    pub(super) fn service(&mut self) {
        if self.inbox.pending() & pending::EVENT == 0 {
            return;
        }
        let events = self.inbox.take_events();
        if events & event::ILLEGAL_VECTOR != 0 {
            self.record_error(error::RECEIVE_ILLEGAL_VECTOR);
        }
        if events & event::LINT0_EDGE != 0 {
            self.lint0_rose();
        }
        if events & event::LINT1_EDGE != 0 {
            if self.registers.enabled() {
                self.local_interrupt(Lvt::Lint1);
            } else {
                // SDM 3A 10.4.3: without a local APIC the pin is NMI.
                self.inbox.raise_own(pending::NMI);
            }
        }
    }

    fn lint0_is_level(&self) -> bool {
        let lvt = self.registers.lvt(Lvt::Lint0);
        lvt & LVT_LEVEL != 0 && DeliveryMode::from_register(lvt) == DeliveryMode::Fixed
    }

    fn lint0_rose(&mut self) {
        if self.registers.accepts_pic() || self.lint0_is_level() {
            self.sample_lint0();
        } else {
            self.local_interrupt(Lvt::Lint0);
        }
    }

    /// Looks at the level of LINT0, after it or what it means has changed.
    pub(super) fn sample_lint0(&mut self) {
        if !self.inbox.lint0() {
            return;
        }
        let lvt = self.registers.lvt(Lvt::Lint0);
        if self.registers.accepts_pic() {
            self.inbox.raise_own(pending::INTERRUPT);
        } else if self.lint0_is_level() && lvt & (LVT_MASKED | LVT_REMOTE_IRR) == 0 && lvt as u8 >= 16 {
            self.registers.lvt[Lvt::Lint0 as usize] |= LVT_REMOTE_IRR;
            self.inbox.post_vector(lvt as u8, true);
        }
    }

    /// A level-triggered interrupt is done; if it was LINT0's, the wire may ask again.
    pub(super) fn end_of_lint0(&mut self, vector: u8) {
        let lvt = &mut self.registers.lvt[Lvt::Lint0 as usize];
        if *lvt as u8 == vector && *lvt & LVT_REMOTE_IRR != 0 {
            *lvt &= !LVT_REMOTE_IRR;
            self.sample_lint0();
        }
    }
}
