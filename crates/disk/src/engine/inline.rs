//! Everything on the caller's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Engine, Job, Jobs, Running, Started, StartedJobs, Task, Work};

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
pub(crate) fn start() -> Started {
    let engine = Arc::new(Inline::default());
    let last = Arc::clone(&engine);
    (engine, Running::new(move || last.run()))
}

/// The same for jobs.
pub(crate) fn start_jobs() -> StartedJobs {
    let engine = Arc::new(Inline::default());
    let last = Arc::clone(&engine);
    (engine, Running::new(move || last.run()))
}

impl<W: Work> Inline<W> {
    fn push(&self, work: W) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(work);
    }

    fn next(&self) -> Option<W> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn run(&self) {
        // A callback may submit more; its work is taken here, too.
        while let Some(work) = self.next() {
            work.perform();
        }
    }
}

impl Engine for Inline<Task> {
    fn submit(&self, task: Task) {
        self.push(task);
    }

    fn kick(&self) {
        self.run();
    }
}

impl Jobs for Inline<Job> {
    fn submit(&self, job: Job) {
        self.push(job);
    }

    fn kick(&self) {
        self.run();
    }
}
