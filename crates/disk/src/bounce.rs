//! Aligned copies for direct I/O from and to memory that is not aligned enough.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::HostBuffer;

/// Bytes of copies at a time; what would need more waits. A guest could ask for gigabytes otherwise.
const BUDGET: u64 = 8 << 20;

type Waiting = (u64, Box<dyn FnOnce(Lease) + Send>);

#[derive(Default)]
struct State {
    used: u64,
    waiting: VecDeque<Waiting>,
}

/// Hands out memory for copies, in the order in which it was asked for.
#[derive(Clone, Default)]
pub(crate) struct Bounces(Arc<Mutex<State>>);

impl std::fmt::Debug for Bounces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bounces({})", self.lock().used)
    }
}

impl Bounces {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `use_it` with memory of `len` bytes: now, or when others have given theirs back.
    pub(crate) fn ask(&self, len: u64, use_it: impl FnOnce(Lease) + Send + 'static) {
        self.lock().waiting.push_back((len, Box::new(use_it)));
        self.serve();
    }

    fn serve(&self) {
        loop {
            let mut state = self.lock();
            // One that is larger than the whole budget gets it when nobody else has any.
            let fits = |state: &State, len| state.used == 0 || state.used + len <= BUDGET;
            match state.waiting.front() {
                Some((len, _)) if fits(&state, *len) => (),
                _ => return,
            }
            let Some((len, use_it)) = state.waiting.pop_front() else { return };
            state.used += len;
            drop(state);
            use_it(Lease { buffer: HostBuffer::new(len as usize), len, from: self.clone() });
        }
    }
}

/// Memory on loan; given back on drop.
pub(crate) struct Lease {
    pub(crate) buffer: Arc<HostBuffer>,
    len: u64,
    from: Bounces,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.from.lock();
        state.used -= self.len.min(state.used);
        drop(state);
        self.from.serve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_waits_in_order() {
        let bounces = Bounces::default();
        let got: Arc<Mutex<Vec<(u32, Lease)>>> = Arc::default();
        let ask = |id, len| {
            let got = Arc::clone(&got);
            bounces.ask(len, move |lease| got.lock().unwrap().push((id, lease)));
        };
        let ids = || got.lock().unwrap().iter().map(|(id, _)| *id).collect::<Vec<_>>();
        ask(1, BUDGET - 10);
        ask(2, 11);
        ask(3, 5);
        assert_eq!(ids(), [1], "3 would fit but does not overtake 2");
        let first = got.lock().unwrap().remove(0);
        drop(first);
        assert_eq!(ids(), [2, 3]);
        ask(4, BUDGET * 2);
        assert_eq!(ids(), [2, 3]);
        let both = std::mem::take(&mut *got.lock().unwrap());
        drop(both);
        assert_eq!(ids(), [4], "larger than the budget: alone");
    }
}
