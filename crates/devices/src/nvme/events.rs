//! Asynchronous events: what the controller has to say of itself (5.2).

use serde::{Deserialize, Serialize};

use super::log::page;
use super::spec::MAX_EVENT_REQUESTS;

/// A kind of event, by its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The controller or the host did something wrong.
    Error = 0,
    /// SMART and health.
    Health = 1,
}

/// Error events: what happened (figure 147).
pub(super) const INVALID_DOORBELL: u8 = 0;
/// See [`INVALID_DOORBELL`].
pub(super) const INVALID_DOORBELL_VALUE: u8 = 1;
/// Health events: a temperature threshold was passed (figure 148).
pub(super) const TEMPERATURE_THRESHOLD: u8 = 1;

/// The log page that tells more of a kind.
fn log_of(kind: usize) -> u8 {
    if kind == Kind::Error as usize { page::ERRORS } else { page::HEALTH }
}

/// Requests that wait for an event, and events that wait for a request. Of each kind one is enough: after it has
/// been reported, no more of its kind are until the guest has read the log page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Events {
    /// Identifiers of the requests.
    requests: Vec<u16>,
    waiting: [Option<u8>; 2],
    reported: [bool; 2],
}

impl Events {
    /// Keeps a request. Returns whether there was room.
    pub(super) fn hold(&mut self, id: u16) -> bool {
        let room = self.requests.len() < MAX_EVENT_REQUESTS;
        if room {
            self.requests.push(id);
        }
        room
    }

    /// Gives a request back that is to be aborted.
    pub(super) fn abort(&mut self, id: u16) -> bool {
        let index = self.requests.iter().position(|held| *held == id);
        index.map(|index| self.requests.remove(index)).is_some()
    }

    /// Something happened.
    pub(super) fn raise(&mut self, kind: Kind, what: u8) {
        let index = kind as usize;
        if let (Some(waiting), Some(false)) = (self.waiting.get_mut(index), self.reported.get(index)) {
            waiting.get_or_insert(what);
        }
    }

    /// The guest has read a log page and wants to hear of its kind again.
    pub(super) fn log_read(&mut self, page: u8) {
        for (index, reported) in self.reported.iter_mut().enumerate() {
            *reported &= log_of(index) != page;
        }
    }

    /// Whether [`Events::next`] has something.
    pub(super) fn is_due(&self) -> bool {
        !self.requests.is_empty() && self.waiting.iter().any(Option::is_some)
    }

    /// A request and the result it ends with.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        if !self.is_due() {
            return None;
        }
        let (index, what) =
            self.waiting.iter_mut().enumerate().find_map(|(i, w)| w.take().map(|w| (i, w)))?;
        if let Some(reported) = self.reported.get_mut(index) {
            *reported = true;
        }
        let id = self.requests.remove(0);
        Some((id, index as u32 | u32::from(what) << 8 | u32::from(log_of(index)) << 16))
    }

    /// Whether a saved state is one that can be.
    pub(super) fn is_valid(&self) -> bool {
        self.requests.len() <= MAX_EVENT_REQUESTS
    }
}
