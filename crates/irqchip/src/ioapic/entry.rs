//! A redirection entry (82093AA data sheet 3.2.4).

use crate::message::{DeliveryMode, Destination, Message};

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits of the low half that keep what is written: not delivery status (12) and remote IRR (14).
const WRITABLE_LOW: u64 = 0x1_afff;
const WRITABLE_HIGH: u64 = 0xff << 56;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    /// After reset: masked.
    pub(super) const RESET: Self = Self(MASKED);

    pub(super) fn from_saved(bits: u64) -> Self {
        Self(bits & (WRITABLE_LOW | WRITABLE_HIGH | REMOTE_IRR))
    }

    pub(super) fn low(self) -> u32 {
        self.0 as u32
    }

    pub(super) fn high(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// An entry that becomes edge-triggered forgets its remote IRR; operating systems rely on it to end an
    /// interrupt.
    pub(super) fn set_low(&mut self, value: u32) {
        let kept = self.0 & (WRITABLE_HIGH | REMOTE_IRR);
        self.0 = kept | u64::from(value) & WRITABLE_LOW;
        if !self.is_level() {
            self.set_remote_irr(false);
        }
    }

    pub(super) fn set_high(&mut self, value: u32) {
        self.0 = self.0 & !WRITABLE_HIGH | u64::from(value) << 32 & WRITABLE_HIGH;
    }

    pub(super) fn vector(self) -> u8 {
        self.0 as u8
    }

    pub(super) fn is_masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// Only fixed and lowest-priority interrupts can be level-triggered; the data sheet demands edges for the
    /// other modes.
    pub(super) fn is_level(self) -> bool {
        let mode = DeliveryMode::from_register(self.low());
        self.0 & LEVEL != 0 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority)
    }

    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub(super) fn set_remote_irr(&mut self, set: bool) {
        self.0 = if set { self.0 | REMOTE_IRR } else { self.0 & !REMOTE_IRR };
    }

    pub(super) fn message(self) -> Message {
        let mode = match DeliveryMode::from_register(self.low()) {
            // Start-up is only for IPIs.
            DeliveryMode::StartUp => DeliveryMode::Reserved,
            mode => mode,
        };
        Message {
            destination: Destination::narrow((self.0 >> 56) as u8, self.0 & LOGICAL != 0),
            mode,
            vector: self.vector(),
            level: self.is_level(),
        }
    }
}
