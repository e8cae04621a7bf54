//! A gate before a disk that holds requests back so that rates are kept.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ringfence_rate::Limiter;

use crate::engine::Running;
use crate::{BlockDevice, DiskInfo, IoError, Operation, Request, ThreadHook};

#[cfg(test)]
mod tests;

/// A disk with limits. Every request counts as an operation; reads, writes and zeroes count their bytes. Requests are let
/// through in the order in which they came.
#[derive(Debug)]
pub(crate) struct Limited {
    /// First, so that the thread has ended when the disk is let go.
    _running: Running,
    disk: Arc<dyn BlockDevice>,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Gate {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    limiter: Limiter,
    waiting: VecDeque<Request>,
    stop: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that a request counts.
fn bytes(operation: &Operation) -> u64 {
    match operation {
        Operation::Read { buffers, .. } | Operation::Write { buffers, .. } => buffers.len(),
        Operation::WriteZeroes { extent, .. } => extent.len,
        Operation::Discard(_) | Operation::Flush => 0,
    }
}

impl Limited {
    /// Limits in bytes and operations per second, and the thread that lets through what had to wait. It calls `hook`
    /// first.
    ///
    /// # Errors
    /// The host's reason if it has no more threads.
    pub(crate) fn new(
        disk: Arc<dyn BlockDevice>,
        bytes: Option<u64>,
        operations: Option<u64>,
        hook: Option<&ThreadHook>,
    ) -> io::Result<Self> {
        let limiter = Limiter::new(bytes, operations, Instant::now());
        let state = Mutex::new(State { limiter, waiting: VecDeque::new(), stop: false });
        let gate = Arc::new(Gate { state, wake: Condvar::new() });
        let last = Arc::clone(&gate);
        let mut running = Running::new(move || {
            last.lock().stop = true;
            last.wake.notify_one();
        });
        let (for_thread, behind) = (Arc::clone(&gate), Arc::clone(&disk));
        running.spawn("disk-limit", hook, move || for_thread.run(&*behind))?;
        Ok(Self { _running: running, disk, gate })
    }
}

impl Gate {
    /// Lets through what waits, each when its time has come.
    fn run(&self, disk: &dyn BlockDevice) {
        let mut state = self.lock();
        loop {
            let Some(front) = state.waiting.front() else {
                if state.stop {
                    return;
                }
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let cost = bytes(&front.operation);
            let wait = state.limiter.wait(Instant::now());
            // Nobody waits for the end of the machine.
            if !wait.is_zero() && !state.stop {
                (state, _) = self.wake.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.limiter.take(cost, 1);
            if let Some(request) = state.waiting.pop_front() {
                drop(state);
                disk.submit(request);
                disk.kick();
                state = self.lock();
            }
        }
    }
}

impl BlockDevice for Limited {
    fn info(&self) -> DiskInfo {
        self.disk.info()
    }

    fn submit(&self, request: Request) {
        let mut state = self.gate.lock();
        if state.waiting.is_empty() && state.limiter.wait(Instant::now()).is_zero() {
            state.limiter.take(bytes(&request.operation), 1);
            drop(state);
            return self.disk.submit(request);
        }
        state.waiting.push_back(request);
        let first = state.waiting.len() == 1;
        drop(state);
        if first {
            self.gate.wake.notify_one();
        }
    }

    fn kick(&self) {
        self.disk.kick();
    }

    fn abandon(&self) {
        let waiting = std::mem::take(&mut self.gate.lock().waiting);
        for request in waiting {
            (request.done)(Err(IoError::Abandoned));
        }
        self.disk.abandon();
    }
}
