//! The 16550A serial port.
//!
//! Source: National Semiconductor PC16550D data sheet, section 8 (registers). On a PC the interrupt passes a gate
//! that is modem control output OUT2, which loopback closes.
//!
//! Characters take no time: one written is out before the next instruction. What a driver can tell by interrupts
//! is kept: every transmitted character empties the transmitter again, which is an interrupt of its own, and a
//! receive FIFO that was read empty lets the interrupt line fall before more input raises it. A character timeout
//! follows at once when the FIFO holds less than its trigger level.
//!
//! The far end is a terminal with hardware handshake: it sends only while RTS is on, so that what is typed before
//! a driver has opened the port waits in a queue instead of being thrown away with the FIFO. Output goes to a
//! [`SerialOutput`]; one that takes no more leaves characters in the transmit FIFO, as a held line would.

mod input;
mod output;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, OnceLock};

use ringfence_engine::{BusDevice, IrqLine, Placement, SavedState, StateError, Stateful};

pub use input::SerialInput;
pub(crate) use output::Wakers;
pub use output::{BufferedOutput, SerialOutput};

use crate::device::{Wire, lock, ports, read_bytes, write_bytes};
use crate::platform::SERIAL_PORTS;
use state::{Received, State};

const VERSION: u32 = 1;
const PORT_COUNT: u16 = 8;
const FIFO: usize = 16;
/// Input that waits for room in the FIFO.
const INPUT_QUEUE: usize = 4096;

/// Register offsets (table II of the data sheet); 0 and 1 are the divisor latch while DLAB is set.
mod register {
    pub(super) const DATA: u64 = 0;
    pub(super) const INTERRUPT_ENABLE: u64 = 1;
    pub(super) const INTERRUPT_ID: u64 = 2;
    pub(super) const FIFO_CONTROL: u64 = 2;
    pub(super) const LINE_CONTROL: u64 = 3;
    pub(super) const MODEM_CONTROL: u64 = 4;
    pub(super) const LINE_STATUS: u64 = 5;
    pub(super) const MODEM_STATUS: u64 = 6;
    pub(super) const SCRATCH: u64 = 7;
}

mod enable {
    pub(super) const RECEIVED: u8 = 1;
    pub(super) const TRANSMITTER: u8 = 2;
    pub(super) const LINE: u8 = 4;
    pub(super) const MODEM: u8 = 8;
    pub(super) const ALL: u8 = 15;
}

/// Interrupt identification, in order of priority (table IV).
mod cause {
    pub(super) const LINE: u8 = 0x06;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const TRANSMITTER: u8 = 0x02;
    pub(super) const MODEM: u8 = 0x00;
    pub(super) const NONE: u8 = 0x01;
    pub(super) const FIFOS_ENABLED: u8 = 0xc0;
}

mod fifo_control {
    pub(super) const ENABLE: u8 = 1;
    pub(super) const CLEAR_RECEIVER: u8 = 2;
    pub(super) const CLEAR_TRANSMITTER: u8 = 4;
    pub(super) const TRIGGER: u8 = 0xc0;
}

mod line_control {
    pub(super) const BREAK: u8 = 0x40;
    pub(super) const DIVISOR: u8 = 0x80;
}

mod modem_control {
    pub(super) const DTR: u8 = 1;
    pub(super) const RTS: u8 = 2;
    pub(super) const OUT1: u8 = 4;
    pub(super) const OUT2: u8 = 8;
    pub(super) const LOOP: u8 = 16;
    pub(super) const ALL: u8 = 31;
}

mod line_status {
    pub(super) const DATA_READY: u8 = 0x01;
    pub(super) const OVERRUN: u8 = 0x02;
    pub(super) const BREAK: u8 = 0x10;
    pub(super) const ERRORS: u8 = 0x1e;
    pub(super) const TRANSMITTER_EMPTY: u8 = 0x60;
    pub(super) const ERROR_IN_FIFO: u8 = 0x80;
}

mod modem_status {
    pub(super) const CTS: u8 = 0x10;
    pub(super) const DSR: u8 = 0x20;
    pub(super) const RI: u8 = 0x40;
    pub(super) const DCD: u8 = 0x80;
    pub(super) const LINES: u8 = 0xf0;
}

/// A serial port.
pub struct Serial {
    index: usize,
    irq: Wire,
    output: Arc<dyn SerialOutput>,
    input_room: OnceLock<Box<dyn Fn() + Send + Sync>>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("index", &self.index).field("state", &*lock(&self.state)).finish()
    }
}

impl Serial {
    /// The first (`index` 0) or second (1) serial port, at the PC's usual place; what it sends goes to `output`.
    pub fn new(index: usize, irq: IrqLine, output: Arc<dyn SerialOutput>) -> Arc<Self> {
        let serial = Arc::new(Self {
            index: index.min(SERIAL_PORTS.len() - 1),
            irq: Wire::new(irq),
            output,
            input_room: OnceLock::new(),
            state: Mutex::default(),
        });
        let weak = Arc::downgrade(&serial);
        serial.output.on_room(Box::new(move || {
            if let Some(serial) = weak.upgrade() {
                serial.with_state(|this, state| this.transmit(state));
            }
        }));
        serial
    }

    fn name(&self) -> String {
        format!("serial.{}", self.index)
    }

    /// Sends `bytes` to the guest. Returns how many were taken, which is fewer than all when the queue is full;
    /// offer the rest when told through [`Serial::on_input_room`]. Never blocks.
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.with_state(|_, state| {
            let taken = bytes.len().min(INPUT_QUEUE - state.input.len().min(INPUT_QUEUE));
            state.input.extend(bytes.iter().take(taken).map(|byte| Received { byte: *byte, errors: 0 }));
            state.input_refused = taken < bytes.len();
            taken
        })
    }

    /// How many bytes [`Serial::input`] would take now.
    pub fn input_room(&self) -> usize {
        INPUT_QUEUE.saturating_sub(lock(&self.state).input.len())
    }

    /// Registers what to call, on a vCPU's thread, when there is room for input again after some was refused.
    /// It must not block. The first registration holds.
    pub fn on_input_room(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.input_room.set(Box::new(wake));
    }

    /// Sends a break to the guest, after the input that waits already. Dropped if the queue is full.
    pub fn send_break(&self) {
        self.with_state(|_, state| {
            if state.input.len() < INPUT_QUEUE {
                state.input.push_back(Received { byte: 0, errors: line_status::BREAK });
            }
        });
    }

    /// Calls `f`, lets waiting input in, drives the interrupt line, and tells the source of input of new room.
    fn with_state<R>(&self, f: impl FnOnce(&Self, &mut State) -> R) -> R {
        let mut state = lock(&self.state);
        let result = f(self, &mut state);
        // A FIFO that was read empty shows in the line before it fills again: the line is edge-triggered.
        if state.receiver.is_empty() && !state.input.is_empty() {
            self.drive(&state);
        }
        state.admit_input();
        self.drive(&state);
        let wake = state.input_refused && state.input.len() <= INPUT_QUEUE / 2;
        if wake {
            state.input_refused = false;
        }
        drop(state);
        if wake && let Some(wake) = self.input_room.get() {
            wake();
        }
        result
    }

    fn drive(&self, state: &State) {
        self.irq.set(state.interrupts());
    }

    /// Sends what the transmitter holds, as far as the other side takes it.
    fn transmit(&self, state: &mut State) {
        if state.transmitter.is_empty() {
            return;
        }
        if state.modem_control & modem_control::LOOP != 0 {
            while let Some(byte) = state.transmitter.pop_front() {
                state.receive(Received { byte, errors: 0 });
            }
        } else {
            let taken = self.output.write(state.transmitter.make_contiguous());
            state.transmitter.drain(..taken.min(state.transmitter.len()));
        }
        state.transmitter_pending |= state.transmitter.is_empty();
    }

    fn read_register(&self, state: &mut State, offset: u64) -> u8 {
        let divisor = state.line_control & line_control::DIVISOR != 0;
        match offset {
            register::DATA if divisor => state.divisor[0],
            register::INTERRUPT_ENABLE if divisor => state.divisor[1],
            register::DATA => state.read_data(),
            register::INTERRUPT_ENABLE => state.interrupt_enable,
            register::INTERRUPT_ID => {
                let cause = state.cause();
                if cause == cause::TRANSMITTER {
                    state.transmitter_pending = false;
                }
                let fifos = if state.fifo_enabled() { cause::FIFOS_ENABLED } else { 0 };
                cause | fifos
            }
            register::LINE_CONTROL => state.line_control,
            register::MODEM_CONTROL => state.modem_control,
            register::LINE_STATUS => state.read_line_status(),
            register::MODEM_STATUS => {
                let status = state.modem_lines() | state.modem_deltas;
                state.modem_deltas = 0;
                status
            }
            register::SCRATCH => state.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&self, state: &mut State, offset: u64, value: u8) {
        let divisor = state.line_control & line_control::DIVISOR != 0;
        match offset {
            register::DATA if divisor => state.divisor[0] = value,
            register::INTERRUPT_ENABLE if divisor => state.divisor[1] = value,
            register::DATA => {
                state.transmitter_pending = false;
                self.drive(state);
                state.hold(value);
                self.transmit(state);
            }
            register::INTERRUPT_ENABLE => state.enable_interrupts(value),
            register::FIFO_CONTROL => state.control_fifos(value),
            register::LINE_CONTROL => state.control_line(value),
            register::MODEM_CONTROL => {
                state.control_modem(value);
                self.transmit(state);
            }
            register::SCRATCH => state.scratch = value,
            _ => (),
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| self.with_state(|this, state| this.read_register(state, offset)));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            self.with_state(|this, state| this.write_register(state, offset, value));
        });
    }
}

impl crate::Device for Serial {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        let (name, port) = match self.index {
            0 => ("serial.0", SERIAL_PORTS[0]),
            _ => ("serial.1", SERIAL_PORTS[1]),
        };
        vec![ports(name, port, PORT_COUNT, self)]
    }

    fn reset(&self) {
        self.with_state(|_, state| state.reset());
    }
}

impl Stateful for Serial {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(&self.name(), VERSION, &*lock(&self.state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let name = self.name();
        let new: State = saved.unpack(&name, VERSION)?;
        new.check(&name)?;
        let mut state = lock(&self.state);
        *state = new;
        self.irq.drive(state.interrupts());
        drop(state);
        self.with_state(|this, state| this.transmit(state));
        Ok(())
    }
}
