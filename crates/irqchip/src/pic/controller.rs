//! One 8259A.

use serde::{Deserialize, Serialize};

/// Which initialization command word is expected next at the odd port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitStep {
    /// None: initialized, the odd port is the mask.
    #[default]
    Ready,
    /// The vector base.
    Icw2,
    /// The cascade.
    Icw3,
    /// The modes.
    Icw4,
}

/// Saved state of one 8259A. The registers have one bit for each input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicControllerState {
    /// Interrupt requests.
    pub irr: u8,
    /// Interrupt mask.
    pub imr: u8,
    /// In service.
    pub isr: u8,
    /// Levels of the inputs.
    pub lines: u8,
    /// Level-triggered inputs.
    pub elcr: u8,
    /// Vector of input 0; a multiple of 8.
    pub vector_base: u8,
    /// The input with the highest priority, 0 to 7.
    pub first: u8,
    /// What the odd port expects.
    pub init: InitStep,
    /// ICW1 said that ICW4 follows.
    pub wants_icw4: bool,
    /// ICW1 said that there is no cascade and hence no ICW3.
    pub single: bool,
    /// The even port reads the in-service register.
    pub reads_isr: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Priorities rotate at the automatic end of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_nested: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Controller {
    state: PicControllerState,
    /// Inputs that may be level-triggered.
    elcr_mask: u8,
    master: bool,
}

impl Controller {
    pub(super) fn new(elcr_mask: u8, master: bool) -> Self {
        let mut this = Self { state: PicControllerState::default(), elcr_mask, master };
        this.reset();
        this
    }

    /// The inputs keep their levels; their devices drive them. The data sheet says nothing of the mask before
    /// initialization: everything is masked, so that no kernel gets an interrupt before it asked for any.
    pub(super) fn reset(&mut self) {
        self.state = PicControllerState { lines: self.state.lines, imr: 0xff, ..Default::default() };
    }

    pub(super) fn state(&self) -> PicControllerState {
        self.state
    }

    pub(super) fn load(&mut self, state: &PicControllerState) {
        self.state = PicControllerState {
            elcr: state.elcr & self.elcr_mask,
            vector_base: state.vector_base & 0xf8,
            first: state.first & 7,
            ..*state
        };
    }

    pub(super) fn elcr(&self) -> u8 {
        self.state.elcr
    }

    pub(super) fn set_elcr(&mut self, value: u8) {
        self.state.elcr = value & self.elcr_mask;
        // A level-triggered input requests for as long as it is high.
        let level = self.state.elcr;
        self.state.irr = (self.state.irr & !level) | (self.state.lines & level);
    }

    /// An edge is remembered even if the input falls before it is acknowledged, so that a pulse counts.
    pub(super) fn set_input(&mut self, input: u8, asserted: bool) {
        let state = &mut self.state;
        let bit = 1 << input;
        let level = state.elcr & bit != 0;
        if asserted {
            if level || state.lines & bit == 0 {
                state.irr |= bit;
            }
            state.lines |= bit;
        } else {
            if level {
                state.irr &= !bit;
            }
            state.lines &= !bit;
        }
    }

    /// Place of `input` in the order of priorities, 0 the highest.
    fn place(&self, input: u8) -> u8 {
        input.wrapping_sub(self.state.first) & 7
    }

    fn highest(&self, inputs: u8) -> Option<u8> {
        (0..8).filter(|input| inputs & 1 << input != 0).min_by_key(|input| self.place(*input))
    }

    /// The input to be served next: the highest unmasked request above everything in service.
    fn next(&self) -> Option<u8> {
        let state = &self.state;
        let request = self.highest(state.irr & !state.imr)?;
        let mut in_service = state.isr;
        if state.special_mask {
            in_service &= !state.imr;
        }
        if state.special_nested && self.master {
            // A higher request of the same slave gets through.
            in_service &= !(1 << super::CASCADE);
        }
        let blocked =
            self.highest(in_service).is_some_and(|served| self.place(served) <= self.place(request));
        (!blocked).then_some(request)
    }

    /// The INT output.
    pub(super) fn output(&self) -> bool {
        self.next().is_some()
    }

    /// The acknowledge sequence: the input now in service; `None` if there is no request (any more).
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let input = self.next()?;
        let state = &mut self.state;
        let bit = 1 << input;
        if state.elcr & bit == 0 {
            state.irr &= !bit;
        }
        if !state.auto_eoi {
            state.isr |= bit;
        } else if state.rotate_on_auto_eoi {
            state.first = (input + 1) & 7;
        }
        Some(input)
    }

    /// The vector for an acknowledged input. Without a request it is that of input 7, which is then not in
    /// service (data sheet, "interrupt sequence").
    pub(super) fn vector(&self, input: Option<u8>) -> u8 {
        self.state.vector_base | input.unwrap_or(7)
    }

    pub(super) fn polled(&self) -> bool {
        self.state.poll
    }

    pub(super) fn read(&mut self, port: u8) -> u8 {
        if std::mem::take(&mut self.state.poll) {
            return match self.acknowledge() {
                Some(input) => 0x80 | input,
                None => 0,
            };
        }
        match port & 1 {
            0 if self.state.reads_isr => self.state.isr,
            0 => self.state.irr,
            _ => self.state.imr,
        }
    }

    pub(super) fn write(&mut self, port: u8, value: u8) {
        match (port & 1, value) {
            (0, icw1) if icw1 & 0x10 != 0 => self.write_icw1(icw1),
            (0, ocw3) if ocw3 & 0x08 != 0 => self.write_ocw3(ocw3),
            (0, ocw2) => self.write_ocw2(ocw2),
            (_, value) => self.write_odd(value),
        }
    }

    fn write_icw1(&mut self, value: u8) {
        let old = self.state;
        self.state = PicControllerState {
            // The edge sense circuit is reset: an input must rise again to request.
            irr: old.irr & old.elcr,
            lines: old.lines,
            elcr: old.elcr,
            vector_base: old.vector_base,
            init: InitStep::Icw2,
            wants_icw4: value & 1 != 0,
            single: value & 2 != 0,
            ..Default::default()
        };
    }

    /// The odd port: ICW2 to ICW4 during initialization, the mask after it.
    fn write_odd(&mut self, value: u8) {
        let state = &mut self.state;
        let after_cascade = if state.wants_icw4 { InitStep::Icw4 } else { InitStep::Ready };
        match state.init {
            InitStep::Ready => state.imr = value,
            InitStep::Icw2 => {
                state.vector_base = value & 0xf8;
                state.init = if state.single { after_cascade } else { InitStep::Icw3 };
            }
            // The cascade is wired.
            InitStep::Icw3 => state.init = after_cascade,
            InitStep::Icw4 => {
                state.special_nested = value & 0x10 != 0;
                state.auto_eoi = value & 2 != 0;
                state.init = InitStep::Ready;
            }
        }
    }

    /// End of interrupt and rotation: R, SL, EOI in bits 7:5, the input in bits 2:0.
    fn write_ocw2(&mut self, value: u8) {
        let input = value & 7;
        match value >> 5 {
            0b000 => self.state.rotate_on_auto_eoi = false,
            0b100 => self.state.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(ended) = self.end_highest() {
                    self.state.first = (ended + 1) & 7;
                }
            }
            0b011 => self.state.isr &= !(1 << input),
            0b111 => {
                self.state.isr &= !(1 << input);
                self.state.first = (input + 1) & 7;
            }
            0b110 => self.state.first = (input + 1) & 7,
            _ => {}
        }
    }

    /// Non-specific end of interrupt; in special mask mode a masked input is not ended by it.
    fn end_highest(&mut self) -> Option<u8> {
        let mut in_service = self.state.isr;
        if self.state.special_mask {
            in_service &= !self.state.imr;
        }
        let input = self.highest(in_service)?;
        self.state.isr &= !(1 << input);
        Some(input)
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.state.special_mask = value & 0x20 != 0;
        }
        if value & 4 != 0 {
            self.state.poll = true;
        } else if value & 2 != 0 {
            self.state.reads_isr = value & 1 != 0;
        }
    }
}
