//! A thread that tells a console's driver, a moment later, that its output is out, and whoever has input when a driver that begins takes it.
//!
//! Linux waits for that in a loop with interrupts off. An interrupt finds nothing to do then, each single time, and after 100,000 of such
//! Linux takes the line for broken and shuts it off. So the driver is told only if it has not found out meanwhile.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ports::Ports;
use crate::device::lock;

/// How long a driver may take to find out by itself.
const MOMENT: Duration = Duration::from_millis(2);

/// How often to look whether a driver that begins takes input.
const WHILE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct State {
    asked: bool,
    ending: bool,
}

/// What is asked of the thread.
#[derive(Debug, Default)]
pub(super) struct Reminder {
    state: Mutex<State>,
    changed: Condvar,
}

impl Reminder {
    /// Has the driver told in a moment.
    pub(super) fn ask(&self) {
        if !std::mem::replace(&mut lock(&self.state).asked, true) {
            self.changed.notify_one();
        }
    }

    pub(super) fn end(&self) {
        lock(&self.state).ending = true;
        self.changed.notify_one();
    }

    fn is_ending(&self) -> bool {
        lock(&self.state).ending
    }

    /// Waits until there is something to tell. False at the end.
    fn wait(&self) -> bool {
        let idle = |state: &mut State| !state.asked && !state.ending;
        let state = self.changed.wait_while(lock(&self.state), idle).unwrap_or_else(PoisonError::into_inner);
        let going_on = |state: &mut State| !state.ending;
        let waited = self.changed.wait_timeout_while(state, MOMENT, going_on);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.asked = false;
        !state.ending
    }
}

/// Starts the thread for a console. [`Ports::end`] ends it.
pub(super) fn start(ports: Arc<Ports>) -> io::Result<JoinHandle<()>> {
    let work = move || {
        while ports.reminder.as_ref().is_some_and(Reminder::wait) {
            ports.remind();
            // At the start.
            while ports.is_deaf() && !ports.reminder.as_ref().is_some_and(Reminder::is_ending) {
                std::thread::sleep(WHILE);
                ports.remind();
            }
            ports.ask_for_input();
        }
    };
    std::thread::Builder::new().name("console".to_owned()).spawn(work)
}
