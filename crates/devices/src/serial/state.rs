//! The registers and FIFOs of a serial port, without its surroundings.

use std::collections::VecDeque;

use ringfence_engine::StateError;
use serde::{Deserialize, Serialize};

use super::{
    FIFO, INPUT_QUEUE, cause, enable, fifo_control, line_control, line_status, modem_control, modem_status,
};
use crate::device::invalid;

/// A character and the line status bits that came with it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Received {
    pub(super) byte: u8,
    pub(super) errors: u8,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) interrupt_enable: u8,
    pub(super) fifo_control: u8,
    pub(super) line_control: u8,
    pub(super) modem_control: u8,
    /// Low half of the modem status register.
    pub(super) modem_deltas: u8,
    pub(super) scratch: u8,
    pub(super) divisor: [u8; 2],
    /// Errors that wait for the line status register to be read.
    pub(super) errors: u8,
    /// The transmitter became empty and nobody has looked yet.
    pub(super) transmitter_pending: bool,
    pub(super) receiver: VecDeque<Received>,
    pub(super) transmitter: VecDeque<u8>,
    /// Input that the far end has not sent yet.
    pub(super) input: VecDeque<Received>,
    /// The source of input was told that there is no room.
    pub(super) input_refused: bool,
}

impl State {
    pub(super) fn check(&self, name: &str) -> Result<(), StateError> {
        if self.receiver.len() > FIFO || self.transmitter.len() > FIFO || self.input.len() > INPUT_QUEUE {
            return Err(invalid(name, "more characters than a queue holds"));
        }
        let errors = self.receiver.iter().chain(&self.input).fold(self.errors, |all, r| all | r.errors);
        if self.interrupt_enable & !enable::ALL != 0
            || self.modem_control & !modem_control::ALL != 0
            || errors & !line_status::ERRORS != 0
        {
            return Err(invalid(name, "a register has bits that do not exist"));
        }
        Ok(())
    }

    /// Master reset (table III). Scratch, divisor and what the far end holds are not touched by it.
    pub(super) fn reset(&mut self) {
        *self = Self {
            scratch: self.scratch,
            divisor: self.divisor,
            input: std::mem::take(&mut self.input),
            input_refused: self.input_refused,
            ..Self::default()
        };
    }

    pub(super) fn fifo_enabled(&self) -> bool {
        self.fifo_control & fifo_control::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    /// How many characters make a received-data interrupt.
    fn trigger(&self) -> usize {
        if !self.fifo_enabled() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fifo_control >> 6)]
    }

    /// The interrupt cause of the highest priority.
    pub(super) fn cause(&self) -> u8 {
        let on = |bit| self.interrupt_enable & bit != 0;
        if on(enable::LINE) && self.line_errors() != 0 {
            cause::LINE
        } else if on(enable::RECEIVED) && self.receiver.len() >= self.trigger() {
            cause::RECEIVED
        } else if on(enable::RECEIVED) && !self.receiver.is_empty() {
            cause::TIMEOUT
        } else if on(enable::TRANSMITTER) && self.transmitter_pending {
            cause::TRANSMITTER
        } else if on(enable::MODEM) && self.modem_deltas != 0 {
            cause::MODEM
        } else {
            cause::NONE
        }
    }

    /// Whether the interrupt line is high: OUT2 opens its gate, loopback closes it.
    pub(super) fn interrupts(&self) -> bool {
        let gate = modem_control::OUT2 | modem_control::LOOP;
        self.modem_control & gate == modem_control::OUT2 && self.cause() != cause::NONE
    }

    /// Errors as the line status register shows them: those of a character appear when it is at the top.
    fn line_errors(&self) -> u8 {
        self.errors | self.receiver.front().map_or(0, |top| top.errors)
    }

    pub(super) fn read_line_status(&mut self) -> u8 {
        let mut status = self.line_errors();
        if !self.receiver.is_empty() {
            status |= line_status::DATA_READY;
        }
        if self.transmitter.is_empty() {
            status |= line_status::TRANSMITTER_EMPTY;
        }
        if self.fifo_enabled() && self.receiver.iter().any(|r| r.errors != 0) {
            status |= line_status::ERROR_IN_FIFO;
        }
        self.errors = 0;
        if let Some(top) = self.receiver.front_mut() {
            top.errors = 0;
        }
        status
    }

    pub(super) fn read_data(&mut self) -> u8 {
        match self.receiver.pop_front() {
            Some(received) => {
                // An error nobody read the status for stays to be read.
                self.errors |= received.errors;
                received.byte
            }
            None => 0,
        }
    }

    /// A character arrives on the line, room or not.
    pub(super) fn receive(&mut self, received: Received) {
        if self.receiver.len() < self.capacity() {
            self.receiver.push_back(received);
            return;
        }
        self.errors |= line_status::OVERRUN;
        // A full FIFO is kept and the character in the shift register is lost; without FIFOs it is the character
        // in the buffer register that is lost.
        if !self.fifo_enabled()
            && let Some(last) = self.receiver.back_mut()
        {
            *last = received;
        }
    }

    /// Lets the far end send into an empty receiver while it is asked to (RTS).
    pub(super) fn admit_input(&mut self) {
        let asked = self.modem_control & (modem_control::RTS | modem_control::LOOP) == modem_control::RTS;
        if asked && self.receiver.is_empty() {
            let n = self.capacity().min(self.input.len());
            self.receiver.extend(self.input.drain(..n));
        }
    }

    /// A character is written to the transmitter. One too many is lost, as in the chip.
    pub(super) fn hold(&mut self, byte: u8) {
        // A break holds the line: what is sent meanwhile reaches nobody.
        if self.line_control & line_control::BREAK != 0 {
            self.transmitter_pending = true;
        } else if self.transmitter.len() < self.capacity() {
            self.transmitter.push_back(byte);
        }
    }

    pub(super) fn enable_interrupts(&mut self, value: u8) {
        let rising = value & !self.interrupt_enable;
        self.interrupt_enable = value & enable::ALL;
        // Enabling the transmitter's interrupt while it is empty causes one.
        if rising & enable::TRANSMITTER != 0 {
            self.transmitter_pending = self.transmitter.is_empty();
        }
    }

    pub(super) fn control_fifos(&mut self, value: u8) {
        let on = value & fifo_control::ENABLE != 0;
        let switched = on != self.fifo_enabled();
        // Clear bits work only in a write that has the enable bit set; switching either way clears both FIFOs.
        if switched || on && value & fifo_control::CLEAR_RECEIVER != 0 {
            self.receiver.clear();
        }
        if switched || on && value & fifo_control::CLEAR_TRANSMITTER != 0 {
            self.transmitter_pending |= !self.transmitter.is_empty();
            self.transmitter.clear();
        }
        self.fifo_control = if on { value & (fifo_control::ENABLE | fifo_control::TRIGGER) } else { 0 };
    }

    pub(super) fn control_line(&mut self, value: u8) {
        let starts_break = value & !self.line_control & line_control::BREAK != 0;
        self.line_control = value;
        if starts_break && self.modem_control & modem_control::LOOP != 0 {
            self.receive(Received { byte: 0, errors: line_status::BREAK });
        }
    }

    /// High half of the modem status register: the far end is ready, or in loopback the port's own outputs.
    pub(super) fn modem_lines(&self) -> u8 {
        if self.modem_control & modem_control::LOOP == 0 {
            return modem_status::CTS | modem_status::DSR | modem_status::DCD;
        }
        let pairs = [
            (modem_control::RTS, modem_status::CTS),
            (modem_control::DTR, modem_status::DSR),
            (modem_control::OUT1, modem_status::RI),
            (modem_control::OUT2, modem_status::DCD),
        ];
        pairs.iter().filter(|(out, _)| self.modem_control & out != 0).fold(0, |lines, (_, line)| lines | line)
    }

    pub(super) fn control_modem(&mut self, value: u8) {
        let before = self.modem_lines();
        self.modem_control = value & modem_control::ALL;
        let after = self.modem_lines();
        // Any change of CTS, DSR and DCD counts, of RI only its end.
        let changed = (before ^ after) & (modem_status::LINES & !modem_status::RI);
        let ended = before & !after & modem_status::RI;
        self.modem_deltas |= (changed | ended) >> 4;
    }
}
