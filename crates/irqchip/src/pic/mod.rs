//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet, order number 231468).
//!
//! The slave's output drives the master's IR2. Which inputs are level-triggered is chosen by the edge/level
//! control registers (PIIX data sheet 2.5.4), not by ICW1.

mod controller;
#[cfg(test)]
mod tests;

use controller::Controller;
pub use controller::{InitStep, PicControllerState};
use serde::{Deserialize, Serialize};

/// The master's input that the slave drives.
const CASCADE: u8 = 2;

/// Saved state of the pair, version 1 of the section `pic`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// IRQ 0 to 7.
    pub master: PicControllerState,
    /// IRQ 8 to 15.
    pub slave: PicControllerState,
}

/// Master and slave.
#[derive(Clone, Debug)]
pub(crate) struct PicPair {
    master: Controller,
    slave: Controller,
}

impl PicPair {
    pub(crate) fn new() -> Self {
        // IRQ 0, 1, 2, 8 and 13 are edges for ever.
        Self { master: Controller::new(0xf8, true), slave: Controller::new(0xde, false) }
    }

    pub(crate) fn reset(&mut self) {
        self.master.reset();
        self.slave.reset();
        self.cascade();
    }

    /// INTR, the master's output.
    pub(crate) fn output(&self) -> bool {
        self.master.output()
    }

    /// Drives IRQ 0 to 15. IRQ 2 is the cascade and not for devices.
    pub(crate) fn set_irq(&mut self, irq: u8, asserted: bool) {
        match irq {
            CASCADE | 16.. => return,
            0..8 => self.master.set_input(irq, asserted),
            _ => self.slave.set_input(irq - 8, asserted),
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        self.master.set_input(CASCADE, self.slave.output());
    }

    /// The CPU's interrupt acknowledge cycle: the vector of the highest request, or the spurious one.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let irq = self.master.acknowledge();
        let vector = if irq == Some(CASCADE) {
            let irq = self.slave.acknowledge();
            // The slave's request is served; if it has another, that is a new edge.
            self.master.set_input(CASCADE, false);
            self.slave.vector(irq)
        } else {
            self.master.vector(irq)
        };
        self.cascade();
        vector
    }

    /// Reads port 20H, 21H (`controller` 0), A0H or A1H (`controller` 1).
    pub(crate) fn read(&mut self, controller: usize, port: u8) -> u8 {
        if controller == 0 {
            return self.master.read(port);
        }
        let polled = self.slave.polled();
        let value = self.slave.read(port);
        if polled {
            // A poll acknowledges like the CPU's cycle.
            self.master.set_input(CASCADE, false);
        }
        self.cascade();
        value
    }

    /// Writes such a port.
    pub(crate) fn write(&mut self, controller: usize, port: u8, value: u8) {
        let controller = if controller == 0 { &mut self.master } else { &mut self.slave };
        controller.write(port, value);
        self.cascade();
    }

    /// Reads edge/level control register 4D0H (0) or 4D1H (1).
    pub(crate) fn read_elcr(&self, controller: usize) -> u8 {
        if controller == 0 { self.master.elcr() } else { self.slave.elcr() }
    }

    /// Writes such a register; inputs that must be edges stay so.
    pub(crate) fn write_elcr(&mut self, controller: usize, value: u8) {
        let controller = if controller == 0 { &mut self.master } else { &mut self.slave };
        controller.set_elcr(value);
        self.cascade();
    }

    pub(crate) fn state(&self) -> PicState {
        PicState { master: self.master.state(), slave: self.slave.state() }
    }

    pub(crate) fn load(&mut self, state: &PicState) {
        self.master.load(&state.master);
        self.slave.load(&state.slave);
    }
}
