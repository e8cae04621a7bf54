//! Everything on the caller's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Engine, Running, Started, Work};

/// Carries work out in order when kicked: no thread acts at a time of its own, so a counted run repeats exactly.
#[derive(Debug)]
pub(crate) struct Inline<W> {
    queue: Mutex<VecDeque<W>>,
}

impl<W> Default for Inline<W> {
    fn default() -> Self {
        Self { queue: Mutex::default() }
    }
}

/// Makes the engine.
pub(crate) fn start<W: Work>() -> Started<W> {
    let engine = Arc::new(Inline::default());
    let last = Arc::clone(&engine);
    (engine, Running::new(move || last.kick()))
}

impl<W> Inline<W> {
    fn next(&self) -> Option<W> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl<W: Work> Engine<W> for Inline<W> {
    fn submit(&self, work: W) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(work);
    }

    fn kick(&self) {
        // A callback may submit more; its work is taken here, too.
        while let Some(work) = self.next() {
            work.perform();
        }
    }
}
