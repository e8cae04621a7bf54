//! The ACPI fixed hardware: PM1a event and control blocks, the power-management timer, GPE block 0 and the SMI
//! command port.
//!
//! Source: ACPI 6.5 chapter 4.8 (the ACPI hardware register model). Addresses and lengths are in
//! [`crate::platform`]. The system control interrupt is a level: asserted while an enabled status bit is set.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};

use ringfence_engine::{
    BusDevice, IrqLine, Placement, SavedState, StateError, Stateful, Timer, TimerQueue, VirtualClock,
    VirtualTime,
};
use serde::{Deserialize, Serialize};

use crate::device::{Wire, lock, ports, read_bytes, write_bytes};
use crate::platform::{
    ACPI_DISABLE, ACPI_ENABLE, ACPI_PORT, ACPI_PORT_COUNT, GPE0_PORT, PM_TIMER_HZ, S5_SLEEP_TYPE,
    SMI_COMMAND_PORT,
};
use crate::rate::Rate;
use crate::{PowerControl, PowerEvent};

const NAME: &str = "acpi-pm";
const VERSION: u32 = 1;

/// Bits of the PM1 status and enable registers (ACPI 6.5 tables 4.11 and 4.12).
mod event {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    pub(super) const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// Bits of the PM1 control register (table 4.13).
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub(super) const SLEEP_TYPE: u16 = 7 << 10;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
    /// What is kept; GBL_RLS and SLP_EN are write-only.
    pub(super) const KEPT: u16 = SCI_ENABLE | BUS_MASTER_RELOAD | SLEEP_TYPE;
}

const TIMER_RATE: Rate = Rate(PM_TIMER_HZ);
const GPE0: u64 = (GPE0_PORT - ACPI_PORT) as u64;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u32,
    gpe_enable: u32,
    /// The SMI command port's scratch register.
    smi_scratch: u8,
    /// Flips of the timer's top bit up to this one are in `status`.
    flips_seen: u64,
}

impl State {
    fn interrupts(&self) -> bool {
        let fixed = self.status & self.enable & event::ENABLES != 0;
        let general = self.gpe_status & self.gpe_enable != 0;
        (fixed || general) && self.control & control::SCI_ENABLE != 0
    }
}

/// The fixed hardware.
pub struct AcpiPm {
    clock: Arc<VirtualClock>,
    sci: Wire,
    overflow: Timer,
    power: Arc<dyn PowerControl>,
    state: Mutex<State>,
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AcpiPm").field(&*lock(&self.state)).finish()
    }
}

impl AcpiPm {
    /// The fixed hardware in legacy mode: until the operating system enables ACPI, `sci` stays silent.
    pub fn new(
        clock: Arc<VirtualClock>,
        timers: &Arc<TimerQueue>,
        sci: IrqLine,
        power: Arc<dyn PowerControl>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = Weak::clone(weak);
            let overflow = timers.add(move |_| {
                if let Some(pm) = weak.upgrade() {
                    pm.with_state(|_| ());
                }
            });
            Self { clock, sci: Wire::new(sci), overflow, power, state: Mutex::default() }
        })
    }

    /// A press of the power button. The operating system decides what it means; one that has not enabled the
    /// button's event takes no notice. Returns whether it takes any.
    pub fn press_power_button(&self) -> bool {
        self.with_state(|state| {
            state.status |= event::POWER_BUTTON;
            state.enable & event::POWER_BUTTON != 0 && state.control & control::SCI_ENABLE != 0
        })
    }

    /// Sets the status of general-purpose event `number`, 0 to 31.
    pub fn raise_gpe(&self, number: u32) {
        self.with_state(|state| state.gpe_status |= 1_u32.checked_shl(number).unwrap_or_default());
    }

    /// How often the timer's top bit has changed.
    fn flips(time: VirtualTime) -> u64 {
        TIMER_RATE.ticks(time) >> 31
    }

    /// Brings the timer's status up to date, calls `f`, and then drives the interrupt and arms the timer by what
    /// the registers say.
    fn with_state<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.state);
        let flips = Self::flips(self.clock.now());
        if flips > state.flips_seen {
            // TMR_STS is set whenever the top bit changes, either way (4.8.3.1.1).
            state.status |= event::TIMER;
            state.flips_seen = flips;
        }
        let result = f(&mut state);
        self.sci.set(state.interrupts());
        if state.enable & event::TIMER != 0 && state.status & event::TIMER == 0 {
            self.overflow.arm(TIMER_RATE.time((flips + 1) << 31));
        } else {
            self.overflow.cancel();
        }
        result
    }

    fn read_register(&self, state: &State, offset: u64) -> u8 {
        let byte16 = |value: u16, at: u64| value.to_le_bytes()[(offset - at) as usize & 1];
        let byte32 = |value: u32, at: u64| value.to_le_bytes()[(offset - at) as usize & 3];
        match offset {
            0..=1 => byte16(state.status, 0),
            2..=3 => byte16(state.enable, 2),
            4..=5 => byte16(state.control, 4),
            8..=11 => byte32(TIMER_RATE.ticks(self.clock.now()) as u32, 8),
            GPE0..0x24 => byte32(state.gpe_status, GPE0),
            0x24..0x28 => byte32(state.gpe_enable, 0x24),
            _ => 0,
        }
    }

    fn write_register(&self, state: &mut State, offset: u64, value: u8) {
        let word = |at: u64| u16::from(value) << (8 * (offset - at));
        let double = |at: u64| u32::from(value) << (8 * (offset - at));
        let byte_mask = |at: u64| 0xff_u32 << (8 * (offset - at));
        match offset {
            0..=1 => state.status &= !word(0),
            2..=3 => {
                state.enable = (state.enable & !(byte_mask(2) as u16) | word(2)) & event::ENABLES;
            }
            4..=5 => {
                // SCI_EN belongs to the SMI command port.
                let kept = state.control & (control::SCI_ENABLE | !(byte_mask(4) as u16));
                state.control = kept | word(4) & control::KEPT & !control::SCI_ENABLE;
                let sleep_type = ((state.control & control::SLEEP_TYPE) >> 10) as u8;
                if word(4) & control::SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE {
                    self.power.request(PowerEvent::PowerOff);
                }
            }
            GPE0..0x24 => state.gpe_status &= !double(GPE0),
            0x24..0x28 => state.gpe_enable = state.gpe_enable & !byte_mask(0x24) | double(0x24),
            _ => (),
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A read of the timer as a whole is one point in time: the clock of a running machine moves on.
        if offset == 8 && data.len() == 4 {
            data.copy_from_slice(&(TIMER_RATE.ticks(self.clock.now()) as u32).to_le_bytes());
            return;
        }
        self.with_state(|state| read_bytes(offset, data, |offset| self.read_register(state, offset)));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with_state(|state| {
            write_bytes(offset, data, |offset, value| self.write_register(state, offset, value));
        });
    }
}

/// The SMI command port (FADT SMI_CMD): there is no system-management mode, only its answer.
struct SmiCommand(Arc<AcpiPm>);

impl BusDevice for SmiCommand {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.with_state(|state| {
            read_bytes(offset, data, |offset| if offset == 1 { state.smi_scratch } else { 0 });
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.with_state(|state| {
            write_bytes(offset, data, |offset, value| match (offset, value) {
                (0, ACPI_ENABLE) => state.control |= control::SCI_ENABLE,
                (0, ACPI_DISABLE) => state.control &= !control::SCI_ENABLE,
                (1, _) => state.smi_scratch = value,
                _ => (),
            });
        });
    }
}

impl crate::Device for AcpiPm {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![
            ports(NAME, ACPI_PORT, ACPI_PORT_COUNT, Arc::clone(&self) as _),
            ports("smi-command", SMI_COMMAND_PORT, 2, Arc::new(SmiCommand(self))),
        ]
    }

    fn reset(&self) {
        self.with_state(|state| *state = State { flips_seen: state.flips_seen, ..State::default() });
    }
}

impl Stateful for AcpiPm {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        self.with_state(|state| SavedState::pack(NAME, VERSION, state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let mut new: State = saved.unpack(NAME, VERSION)?;
        new.enable &= event::ENABLES;
        new.control &= control::KEPT;
        let mut state = lock(&self.state);
        *state = new;
        self.sci.drive(state.interrupts());
        drop(state);
        self.with_state(|_| ());
        Ok(())
    }
}
