//! The I/O APIC (82093AA data sheet, order number 290566; version 20H as in ICH data sheets, which adds the
//! EOI register).
//!
//! The polarity bits are kept but change nothing: wires carry "asserted", not a voltage.

mod entry;
#[cfg(test)]
mod tests;

use entry::Entry;
use serde::{Deserialize, Serialize};

use crate::message::Message;

/// Number of pins.
pub(crate) const PINS: usize = 24;
/// Version 20H, and the number of the last redirection entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Offsets in the memory-mapped page.
mod offset {
    pub(super) const INDEX: u64 = 0x00;
    pub(super) const DATA: u64 = 0x10;
    pub(super) const EOI: u64 = 0x40;
}

/// Saved state of the I/O APIC, version 1 of the section `ioapic`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Index register.
    pub index: u8,
    /// Id, 0 to 15.
    pub id: u8,
    /// Redirection entries; remote IRR in bit 14.
    pub redirection: [u64; PINS],
    /// Levels of the pins, pin 0 in bit 0.
    pub lines: u32,
}

/// Delivers a message; whether a local APIC accepted it.
pub(crate) type Deliver<'a> = &'a mut dyn FnMut(&Message) -> bool;

#[derive(Clone, Debug)]
pub(crate) struct IoApic {
    index: u8,
    id: u8,
    entries: [Entry; PINS],
    lines: u32,
}

impl IoApic {
    pub(crate) fn new() -> Self {
        Self { index: 0, id: 0, entries: [Entry::RESET; PINS], lines: 0 }
    }

    /// The pins keep their levels; their devices drive them.
    pub(crate) fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new() };
    }

    /// Drives a pin.
    pub(crate) fn set_pin(&mut self, pin: usize, asserted: bool, deliver: Deliver<'_>) {
        let Some(entry) = self.entries.get(pin) else { return };
        let bit = 1 << pin;
        let rises = asserted && self.lines & bit == 0;
        self.lines = if asserted { self.lines | bit } else { self.lines & !bit };
        if entry.is_level() {
            self.serve_level(pin, deliver);
        } else if rises && !entry.is_masked() {
            // An edge on a masked pin is lost (data sheet 3.2.4, bit 16).
            deliver(&entry.message());
        }
    }

    /// Requests a level-triggered interrupt if the pin is high and none is under way.
    fn serve_level(&mut self, pin: usize, deliver: Deliver<'_>) {
        let high = self.lines & 1 << pin != 0;
        let Some(entry) = self.entries.get_mut(pin) else { return };
        if high && entry.is_level() && !entry.is_masked() && !entry.remote_irr() && deliver(&entry.message())
        {
            entry.set_remote_irr(true);
        }
    }

    /// A local APIC, or a write to the EOI register, ends `vector`: a pin that is still high asks again.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8, deliver: Deliver<'_>) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if entry.is_level() && entry.remote_irr() && entry.vector() == vector {
                entry.set_remote_irr(false);
                self.serve_level(pin, deliver);
            }
        }
    }

    /// Local APICs have changed, so that a level nobody accepted may be accepted now.
    pub(crate) fn retry(&mut self, deliver: Deliver<'_>) {
        for pin in 0..PINS {
            self.serve_level(pin, deliver);
        }
    }

    /// Reads the 32-bit register at an offset in the page.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        match offset {
            offset::INDEX => u32::from(self.index),
            offset::DATA => self.read_indexed(),
            _ => 0,
        }
    }

    fn read_indexed(&self) -> u32 {
        match self.index {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            index => match self.selected(index) {
                Some((pin, false)) => self.entries[pin].low(),
                Some((pin, true)) => self.entries[pin].high(),
                None => 0,
            },
        }
    }

    /// The pin and half of a redirection entry's register.
    fn selected(&self, index: u8) -> Option<(usize, bool)> {
        let number = usize::from(index.checked_sub(0x10)?);
        (number / 2 < PINS).then_some((number / 2, number & 1 != 0))
    }

    /// Writes the 32-bit register at an offset in the page.
    pub(crate) fn write(&mut self, offset: u64, value: u32, deliver: Deliver<'_>) {
        match offset {
            offset::INDEX => self.index = value as u8,
            offset::DATA => self.write_indexed(value, deliver),
            offset::EOI => self.end_of_interrupt(value as u8, deliver),
            _ => {}
        }
    }

    fn write_indexed(&mut self, value: u32, deliver: Deliver<'_>) {
        match (self.index, self.selected(self.index)) {
            (0, _) => self.id = (value >> 24) as u8 & 0xf,
            (_, Some((pin, false))) => {
                self.entries[pin].set_low(value);
                self.serve_level(pin, deliver);
            }
            (_, Some((pin, true))) => self.entries[pin].set_high(value),
            _ => {}
        }
    }

    pub(crate) fn state(&self) -> IoApicState {
        let redirection = self.entries.map(|entry| entry.0);
        IoApicState { index: self.index, id: self.id, redirection, lines: self.lines }
    }

    pub(crate) fn load(&mut self, state: &IoApicState) {
        self.index = state.index;
        self.id = state.id & 0xf;
        self.entries = state.redirection.map(Entry::from_saved);
        self.lines = state.lines & ((1 << PINS) - 1);
    }
}
