//! Worker threads that do one blocking operation each.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use super::{Engine, Running, Started, Task};
use crate::ThreadHook;

/// Threads of a pool. A flush or an uncached read blocks one; the others go on.
const THREADS: usize = 4;
/// Their stacks; they do nothing but system calls and callbacks.
const STACK: usize = 256 << 10;

#[derive(Debug, Default)]
struct State {
    tasks: VecDeque<Task>,
    idle: usize,
    stop: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    wake: Condvar,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                drop(state);
                task.perform();
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
pub(crate) fn start(hook: Option<&ThreadHook>) -> io::Result<Started> {
    let pool = Arc::new(Pool::default());
    let last = Arc::clone(&pool);
    let mut running = Running::new(move || {
        last.lock().stop = true;
        last.wake.notify_all();
    });
    for _ in 0..THREADS {
        let (pool, hook) = (Arc::clone(&pool), hook.cloned());
        let body = move || {
            if let Some(hook) = hook {
                hook();
            }
            pool.work();
        };
        running.threads.push(Builder::new().name("disk-io".into()).stack_size(STACK).spawn(body)?);
    }
    Ok((pool, running))
}

impl Engine for Pool {
    fn submit(&self, task: Task) {
        let mut state = self.lock();
        state.tasks.push_back(task);
        let sleeper = state.idle > 0;
        drop(state);
        if sleeper {
            self.wake.notify_one();
        }
    }

    fn kick(&self) {}
}
