//! What a user says of the watchdog.

use std::str::FromStr;

/// What happens when a guest neglects its watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogAction {
    /// The machine is reset, and boots again unless resets end it.
    Reset,
    /// The machine ends.
    PowerOff,
    /// The user is told, and the machine goes on.
    Tell,
}

/// Not an action of a watchdog.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("choose what happens when the guest neglects its watchdog: reset, poweroff or none (you are told)")]
pub struct UnknownAction;

impl FromStr for WatchdogAction {
    type Err = UnknownAction;

    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        match text {
            "reset" => Ok(Self::Reset),
            "poweroff" => Ok(Self::PowerOff),
            "none" => Ok(Self::Tell),
            _ => Err(UnknownAction),
        }
    }
}
