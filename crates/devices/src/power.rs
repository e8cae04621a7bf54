//! How devices end a run.

/// Something a device asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest pulled the reset line.
    Reset,
    /// The guest's kernel has panicked, says the guest, with its last message out.
    GuestPanic,
    /// The guest has neglected its watchdog.
    Watchdog,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
}

impl PowerEvent {
    /// The exit status the guest asked for, if it asked for one: the low byte of `(value << 1) | 1`.
    pub const fn exit_status(self) -> Option<u8> {
        match self {
            Self::DebugExit(value) => Some(((value << 1) | 1) as u8),
            Self::PowerOff | Self::Reset | Self::GuestPanic | Self::Watchdog => None,
        }
    }
}

/// The machine, as devices see it. Called on a vCPU's thread, possibly with the device locked: note the event,
/// make the vCPUs stop, and return.
pub trait PowerControl: Send + Sync {
    /// Asks for `event`. The guest may ask again before the machine has stopped.
    fn request(&self, event: PowerEvent);
}
