//! Interprocessor interrupts (SDM 3A 10.6, 10.12.9).

use super::LocalApic;
use super::local::error;
use crate::message::{DeliveryMode, Destination, Message};

/// Bit 14 of the interrupt command register: assert.
const ASSERT: u32 = 1 << 14;
/// Bit 15: level trigger.
const LEVEL: u32 = 1 << 15;

impl LocalApic {
    /// Sends what the interrupt command register says. Combinations that table 10-3 calls invalid are sent as
    /// they stand.
    pub(super) fn send_ipi(&mut self) {
        let low = self.registers.icr as u32;
        let high = (self.registers.icr >> 32) as u32;
        let mode = DeliveryMode::from_register(low);
        let vector = low as u8;
        let sendable = match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if vector < 16 {
                    self.record_error(error::SEND_ILLEGAL_VECTOR);
                    return;
                }
                true
            }
            // INIT level de-assert only synchronised arbitration ids of old (10.6.1).
            DeliveryMode::Init => low & LEVEL == 0 || low & ASSERT != 0,
            DeliveryMode::Nmi | DeliveryMode::StartUp => true,
            DeliveryMode::Smi | DeliveryMode::Reserved | DeliveryMode::ExtInt => false,
        };
        if !sendable || !self.registers.enabled() {
            return;
        }
        let logical = low & 1 << 11 != 0;
        let destination = match (low >> 18) & 3 {
            0 if self.registers.x2apic() => Destination::wide(high, logical),
            0 => Destination::narrow((high >> 24) as u8, logical),
            1 => Destination::Physical(self.id()),
            2 => Destination::Broadcast,
            _ => Destination::AllBut(self.id()),
        };
        // The trigger mode counts only for INIT (10.6.1): other IPIs are edges.
        self.chip.send(&Message { destination, mode, vector, level: false }, Some(self.id()));
    }

    /// Writes the self-IPI register (SDM 3A 10.12.11).
    pub(super) fn send_self_ipi(&mut self, vector: u8) {
        if vector < 16 {
            self.record_error(error::SEND_ILLEGAL_VECTOR);
        } else {
            self.inbox.post_vector(vector, false);
        }
    }
}
