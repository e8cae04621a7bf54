//! Everything on the caller's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Engine, Running, Started, Task};

/// Carries tasks out in order when kicked: no thread acts at a time of its own, so a counted run repeats exactly.
#[derive(Debug, Default)]
pub(crate) struct Inline {
    queue: Mutex<VecDeque<Task>>,
}

/// Makes the engine.
pub(crate) fn start() -> Started {
    let engine = Arc::new(Inline::default());
    let last = Arc::clone(&engine);
    (engine, Running::new(move || last.kick()))
}

impl Inline {
    fn next(&self) -> Option<Task> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl Engine for Inline {
    fn submit(&self, task: Task) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(task);
    }

    fn kick(&self) {
        // A callback may submit more; its tasks are taken here, too.
        while let Some(task) = self.next() {
            task.perform();
        }
    }
}
