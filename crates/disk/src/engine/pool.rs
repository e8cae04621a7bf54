//! Worker threads that do one blocking operation each.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Engine, Running, Started, Work};
use crate::ThreadHook;

/// Threads of a pool. A flush or an uncached read blocks one; the others go on.
const THREADS: usize = 4;

#[derive(Debug)]
struct State<W> {
    queue: VecDeque<W>,
    idle: usize,
    stop: bool,
}

#[derive(Debug)]
pub(crate) struct Pool<W> {
    state: Mutex<State<W>>,
    wake: Condvar,
}

impl<W> Default for Pool<W> {
    fn default() -> Self {
        let state = State { queue: VecDeque::new(), idle: 0, stop: false };
        Self { state: Mutex::new(state), wake: Condvar::new() }
    }
}

impl<W: Work> Pool<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(work) = state.queue.pop_front() {
                drop(state);
                work.perform();
                state = self.lock();
            } else if state.stop {
                return;
            } else {
                state.idle += 1;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Starts the threads; each calls `hook` first.
pub(crate) fn start<W: Work>(hook: Option<&ThreadHook>) -> io::Result<Started<W>> {
    let pool = Arc::new(Pool::default());
    let last = Arc::clone(&pool);
    let mut running = Running::new(move || {
        last.lock().stop = true;
        last.wake.notify_all();
    });
    for _ in 0..THREADS {
        let pool = Arc::clone(&pool);
        running.spawn("disk-io", hook, move || pool.work())?;
    }
    Ok((pool, running))
}

impl<W: Work> Engine<W> for Pool<W> {
    fn submit(&self, work: W) {
        let mut state = self.lock();
        state.queue.push_back(work);
        let sleeper = state.idle > 0;
        drop(state);
        if sleeper {
            self.wake.notify_one();
        }
    }

    fn kick(&self) {}
}
