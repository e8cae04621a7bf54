//! Engines: who carries file operations out, and on which thread.
//!
//! Cross-thread wake-ups cost more than most operations (tens of microseconds on a virtualized host), so each
//! engine is for the case where it needs fewest of them: [`pool`] for what goes through the page cache, where one
//! worker does the whole operation, [`uring`] for direct I/O, where the device does the work and one thread can have
//! many operations in flight, [`inline`] for runs that must repeat exactly.
//!
//! Measured on two cores of a cloud machine, 4 KiB writes: through the page cache 14 µs with threads and 54 µs with
//! io_uring (which hands such writes on to workers of its own), past it and 32 at a time 23 µs and 15 µs.

mod inline;
mod pool;
mod task;
#[cfg(test)]
mod tests;
mod uring;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crate::ThreadHook;

#[cfg(test)]
pub(crate) use inline::Inline;
pub(crate) use task::{FileOp, Task};
pub(crate) use {inline::start as start_inline, pool::start as start_pool, uring::start as start_uring};

/// Stacks of the threads; they do nothing but system calls, the work of an image format, and callbacks.
const STACK: usize = 256 << 10;

/// What an engine can be given to do.
pub(crate) trait Work: Debug + Send + 'static {
    /// Does it, to the end.
    fn perform(self);
}

impl Work for Task {
    fn perform(self) {
        Self::perform(self);
    }
}

/// Work on an image whose format has to be looked into: it blocks, and calls back when it is done.
pub(crate) struct Job(pub(crate) Box<dyn FnOnce() + Send>);

impl Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

impl Work for Job {
    fn perform(self) {
        (self.0)();
    }
}

/// Carries work out, in any order: tasks, or jobs.
pub(crate) trait Engine<W = Task>: Debug + Send + Sync {
    /// Takes work, which may wait for [`Engine::kick`]. What is submitted from a task's callback needs none.
    fn submit(&self, work: W);
    /// Starts what was submitted.
    fn kick(&self);
}

/// Ends an engine when dropped: what was submitted is carried out, then its threads have ended and hold nothing
/// (no file, so no lock) any more. Unless one of the threads itself drops it, which then ends by and by.
pub(crate) struct Running {
    end: Box<dyn Fn() + Send + Sync>,
    threads: Vec<JoinHandle<()>>,
}

impl Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Running({} threads)", self.threads.len())
    }
}

impl Running {
    /// Nothing yet. `end` has the threads that are to come end.
    pub(crate) fn new(end: impl Fn() + Send + Sync + 'static) -> Self {
        Self { end: Box::new(end), threads: Vec::new() }
    }

    /// Starts a thread, which calls `hook` first.
    ///
    /// # Errors
    /// The host's reason if it has no more threads.
    pub(crate) fn spawn(
        &mut self,
        name: &str,
        hook: Option<&ThreadHook>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let hook = hook.cloned();
        let hooked = move || {
            if let Some(hook) = hook {
                hook();
            }
            body();
        };
        self.threads.push(Builder::new().name(name.to_owned()).stack_size(STACK).spawn(hooked)?);
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        (self.end)();
        let current = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|t| t.thread().id() != current) {
            // A thread that panicked has said so; there is nobody to tell here.
            let _ = thread.join();
        }
    }
}

/// An engine and what keeps it going.
pub(crate) type Started<W = Task> = (Arc<dyn Engine<W>>, Running);
