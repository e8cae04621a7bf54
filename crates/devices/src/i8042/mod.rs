//! The keyboard controller: reset line, A20 gate, and a keyboard on which nobody types.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller" and
//! "Keyboard"; ICH9 data sheet 13.7.2. There is no auxiliary device: its test fails at once, so that a
//! driver's probe is over quickly.

mod keyboard;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use ringfence_engine::{BusDevice, IrqLine, Placement, SavedState, StateError, Stateful};
use ringfence_memory::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::device::{Wire, invalid, lock, more_ports, ports, read_bytes, write_bytes};
use crate::platform::{I8042_COMMAND_PORT, I8042_DATA_PORT};
use crate::{PowerControl, PowerEvent};
use keyboard::Keyboard;

const NAME: &str = "i8042";
const VERSION: u32 = 1;

const DATA: u64 = 0;
const COMMAND: u64 = (I8042_COMMAND_PORT - I8042_DATA_PORT) as u64;

/// Bits of the status register.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 0x01;
    pub(super) const SYSTEM: u8 = 0x04;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const NOT_LOCKED: u8 = 0x10;
    pub(super) const FROM_AUX: u8 = 0x20;
    pub(super) const TIMEOUT: u8 = 0x40;
}

/// Bits of the configuration ("command") byte, which is byte 0 of the controller's memory.
mod config {
    pub(super) const KEYBOARD_IRQ: u8 = 0x01;
    pub(super) const SYSTEM: u8 = 0x04;
    pub(super) const KEYBOARD_OFF: u8 = 0x10;
    pub(super) const AUX_OFF: u8 = 0x20;
    pub(super) const TRANSLATE: u8 = 0x40;
}

/// Bits of the output port.
mod output {
    pub(super) const NOT_RESET: u8 = 0x01;
    pub(super) const A20: u8 = 0x02;
    pub(super) const KEYBOARD_FULL: u8 = 0x10;
    /// Lines to the keyboard, idle.
    pub(super) const LINES: u8 = 0xc0;
}

/// Answers of the controller that wait for the output buffer.
const ANSWERS: usize = 16;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    memory: Vec<u8>,
    /// The command whose parameter the next data byte is.
    awaited: Option<u8>,
    last_was_command: bool,
    /// The output buffer: the byte and the status bits that come with it.
    buffer: Option<(u8, u8)>,
    answers: VecDeque<(u8, u8)>,
    keyboard: Keyboard,
    /// The A20 gate. Shared with port 0x92; filled when saved.
    a20: bool,
}

impl State {
    fn power_on() -> Self {
        let mut memory = vec![0; 32];
        // As firmware leaves it: system flag, translation, keyboard on, no interrupts, no auxiliary device.
        memory[0] = config::SYSTEM | config::TRANSLATE | config::AUX_OFF;
        Self {
            memory,
            awaited: None,
            last_was_command: false,
            buffer: None,
            answers: VecDeque::new(),
            keyboard: Keyboard::default(),
            a20: true,
        }
    }

    fn config(&self) -> u8 {
        self.memory.first().copied().unwrap_or_default()
    }

    fn set_config(&mut self, clear: u8, set: u8) {
        if let Some(config) = self.memory.first_mut() {
            *config = *config & !clear | set;
        }
    }

    fn interrupts(&self) -> bool {
        let from_keyboard = self.buffer.is_some_and(|(_, bits)| bits & status::FROM_AUX == 0);
        from_keyboard && self.config() & config::KEYBOARD_IRQ != 0
    }

    fn answer(&mut self, byte: u8, bits: u8) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back((byte, bits));
        }
    }
}

/// The controller.
pub struct I8042 {
    irq: Wire,
    memory: Arc<GuestMemory>,
    power: Arc<dyn PowerControl>,
    state: Mutex<State>,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("I8042").field(&*lock(&self.state)).finish()
    }
}

impl I8042 {
    /// A controller with the A20 gate of `memory`, and the keyboard's interrupt on `irq`.
    pub fn new(irq: IrqLine, memory: Arc<GuestMemory>, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self { irq: Wire::new(irq), memory, power, state: Mutex::new(State::power_on()) })
    }

    fn a20(&self) -> bool {
        self.memory.a20_mask() == !0
    }

    fn drive(&self, state: &State) {
        self.irq.set(state.interrupts());
    }

    /// Moves the next byte into an empty output buffer.
    fn fill(&self, state: &mut State) {
        let config = state.config();
        if state.buffer.is_none() {
            state.buffer = state.answers.pop_front().or_else(|| {
                let on = config & config::KEYBOARD_OFF == 0;
                on.then(|| state.keyboard.take(config & config::TRANSLATE != 0)).flatten().map(|b| (b, 0))
            });
        }
        self.drive(state);
    }

    fn read_register(&self, offset: u64) -> u8 {
        let mut state = lock(&self.state);
        match offset {
            DATA => {
                let Some((byte, _)) = state.buffer.take() else { return 0 };
                // The line falls in between, so each byte is an edge of its own.
                self.drive(&state);
                self.fill(&mut state);
                byte
            }
            COMMAND => {
                let buffer = state.buffer.map_or(0, |(_, bits)| status::OUTPUT_FULL | bits);
                let system = if state.config() & config::SYSTEM != 0 { status::SYSTEM } else { 0 };
                let command = if state.last_was_command { status::COMMAND } else { 0 };
                buffer | system | command | status::NOT_LOCKED
            }
            _ => 0xff,
        }
    }

    fn write_register(&self, offset: u64, value: u8) {
        let mut state = lock(&self.state);
        state.last_was_command = offset == COMMAND;
        match (offset, state.awaited.take()) {
            (COMMAND, _) => self.command(&mut state, value),
            (DATA, Some(command)) => self.parameter(&mut state, command, value),
            (DATA, None) => {
                // A byte for the keyboard also switches its interface on.
                state.set_config(config::KEYBOARD_OFF, 0);
                state.keyboard.command(value);
            }
            _ => (),
        }
        self.fill(&mut state);
    }

    fn command(&self, state: &mut State, command: u8) {
        match command {
            // Read the controller's memory.
            0x20..=0x3f => {
                let byte = state.memory.get(usize::from(command & 0x1f)).copied().unwrap_or_default();
                state.answer(byte, 0);
            }
            // Commands with a parameter: write memory, write output port, echo as keyboard or auxiliary data,
            // send to the auxiliary device.
            0x60..=0x7f | 0xd1..=0xd4 => state.awaited = Some(command),
            0xa7 => state.set_config(0, config::AUX_OFF),
            0xa8 => state.set_config(config::AUX_OFF, 0),
            // Test of the auxiliary lines: clock stuck low.
            0xa9 => state.answer(0x01, 0),
            // Self-test.
            0xaa => {
                state.set_config(0, config::SYSTEM);
                state.answer(0x55, 0);
            }
            // Test of the keyboard lines: fine.
            0xab => state.answer(0x00, 0),
            0xad => state.set_config(0, config::KEYBOARD_OFF),
            0xae => state.set_config(config::KEYBOARD_OFF, 0),
            // Input port: keyboard not locked.
            0xc0 => state.answer(0x80, 0),
            0xd0 => {
                let a20 = if self.a20() { output::A20 } else { 0 };
                let full = if state.buffer.is_some() { output::KEYBOARD_FULL } else { 0 };
                state.answer(output::NOT_RESET | output::LINES | a20 | full, 0);
            }
            0xdd => self.memory.set_a20(false),
            0xdf => self.memory.set_a20(true),
            // Pulse the output port lines whose bits are clear; line 0 is the reset.
            0xf0..=0xff if command & 1 == 0 => self.power.request(PowerEvent::Reset),
            _ => (),
        }
    }

    fn parameter(&self, state: &mut State, command: u8, value: u8) {
        match command {
            0xd1 => {
                self.memory.set_a20(value & output::A20 != 0);
                if value & output::NOT_RESET == 0 {
                    self.power.request(PowerEvent::Reset);
                }
            }
            // There is no auxiliary side, so its echo comes without the auxiliary flag.
            0xd2 | 0xd3 => state.answer(value, 0),
            0xd4 => state.answer(0xfe, status::FROM_AUX | status::TIMEOUT),
            _ => {
                if let Some(byte) = state.memory.get_mut(usize::from(command & 0x1f)) {
                    *byte = value;
                }
            }
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| self.read_register(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| self.write_register(offset, value));
    }
}

impl crate::Device for I8042 {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![
            ports(NAME, I8042_DATA_PORT, 1, Arc::clone(&self) as _),
            more_ports(NAME, I8042_COMMAND_PORT, 1, self, I8042_DATA_PORT),
        ]
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State::power_on();
        self.drive(&state);
        self.memory.set_a20(true);
    }
}

impl Stateful for I8042 {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        let state = State { a20: self.a20(), ..lock(&self.state).clone() };
        SavedState::pack(NAME, VERSION, &state)
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let new: State = saved.unpack(NAME, VERSION)?;
        if new.memory.len() != 32 || new.answers.len() > ANSWERS || !new.keyboard.is_valid() {
            return Err(invalid(NAME, "memory is not 32 bytes long or a queue is too long"));
        }
        let mut state = lock(&self.state);
        *state = new;
        self.memory.set_a20(state.a20);
        self.irq.drive(state.interrupts());
        Ok(())
    }
}
