//! What a device has in its hands: its way to queues and driver, and the chains that it has taken.

use std::sync::Arc;

use ringfence_memory::{GuestAddress, GuestMemory};

use super::core::Core;
use super::queue::{Broken, Piece, Pieces};
use super::spec::{feature, status};
use crate::device::lock;

/// A device's way to its queues and to the driver. Cheap to clone; works from any thread.
#[derive(Clone, Debug)]
pub struct Port(pub(super) Arc<Core>);

impl Port {
    /// The device's name, as in messages and saved state.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.0.memory
    }

    /// The features that were agreed on; of meaning once the device has been activated.
    pub fn features(&self) -> u64 {
        lock(&self.0.state).driver_features
    }

    /// Takes the next chain that the driver has made available in a queue. `None` if there is none now (the driver
    /// notifies the device of the next one), the queue is not enabled, the device is being reset, broken or not
    /// allowed to access memory.
    pub fn take(&self, queue: u16) -> Option<Chain> {
        let core = &self.0;
        let mut state = lock(&core.state);
        if !state.is_running() || !core.endpoint.is_bus_master() {
            return None;
        }
        let (indirect, events) = (state.agreed(feature::INDIRECT), state.agreed(feature::EVENT_INDEX));
        let ring = state.queues.get_mut(usize::from(queue)).filter(|q| q.enabled && !q.resetting)?;
        match ring.take(&core.memory, indirect, events) {
            Ok(Some((head, pieces))) => {
                let place = ring.next_available;
                Some(Chain { core: Arc::clone(core), queue, head, place, pieces, done: false })
            }
            Ok(None) => None,
            Err(why) => {
                core.fail(&mut state, why);
                None
            }
        }
    }

    /// Whether a chain is available in a queue, without taking it.
    pub fn has_chains(&self, queue: u16) -> bool {
        let state = lock(&self.0.state);
        let ring = state.queues.get(usize::from(queue)).filter(|q| q.enabled && !q.resetting);
        let may = state.is_running() && self.0.endpoint.is_bus_master();
        may && ring.is_some_and(|q| q.has_chains(&self.0.memory).unwrap_or(false))
    }

    /// Gives several chains of one queue back at once, each with the number of bytes written to it, so that the
    /// driver sees all or none (mergeable receive buffers).
    pub fn complete_all(&self, chains: Vec<(Chain, u32)>) {
        let Some(queue) = chains.first().map(|(chain, _)| chain.queue) else { return };
        let mut heads = Vec::with_capacity(chains.len());
        for (mut chain, written) in chains {
            // One of another queue would be a bug of the device; dropping it gives it up.
            if chain.queue == queue {
                heads.push((chain.head, written.min(chain.writable_len() as u32)));
                chain.done = true;
            }
        }
        self.0.finish(queue, &heads, heads.len() as u32);
    }

    /// Tells the driver of the chains that [`Chain::complete_untold`] has given back, unless it has taken them meanwhile.
    pub fn remind(&self, queue: u16) {
        self.0.remind(queue);
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        let mut state = lock(&self.0.state);
        state.generation = state.generation.wrapping_add(1);
        if state.has(status::DRIVER_OK) {
            self.0.interrupt_config(&mut state);
        }
    }

    /// The driver broke a rule of this kind of device: marks it broken, and tells the user once.
    pub fn fail(&self, why: &'static str) {
        self.0.fail(&mut lock(&self.0.state), Broken::Device(why));
    }
}

/// A descriptor chain that a device has taken. All of it is in memory that the device may use: checked when it was
/// taken, and read once. A reset by the driver, and saving, wait until every chain has been given back or dropped; a
/// dropped one never comes back to the driver, which is only right when the device is [stopped](super::VirtioDevice::stop).
pub struct Chain {
    core: Arc<Core>,
    queue: u16,
    head: u16,
    /// The place in the driver's ring after it.
    place: u16,
    pieces: Pieces,
    done: bool,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { queue, head, pieces, .. } = self;
        write!(f, "Chain({queue}:{head} {pieces:x?})")
    }
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|(_, len)| len).sum()
}

/// The parts of `pieces` that make up `len` bytes from `offset`, or up to their end.
fn part(pieces: &[Piece], offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
    let (mut skip, mut left) = (offset, len);
    pieces.iter().filter_map(move |(at, size)| {
        let skipped = skip.min(*size);
        let n = (size - skipped).min(left);
        skip -= skipped;
        left -= n;
        (n > 0).then(|| (GuestAddress(at.0 + skipped), n))
    })
}

impl Chain {
    /// Its queue.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Bytes that the device can read.
    pub fn readable_len(&self) -> u64 {
        total(&self.pieces.readable)
    }

    /// Bytes that the device can write. With those it can read, less than 4 GiB.
    pub fn writable_len(&self) -> u64 {
        total(&self.pieces.writable)
    }

    /// Where `len` bytes from `offset` of what can be read are in guest memory, as far as there are so many.
    pub fn readable(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
        part(&self.pieces.readable, offset, len)
    }

    /// Where `len` bytes from `offset` of what can be written are in guest memory, as far as there are so many.
    pub fn writable(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
        part(&self.pieces.writable, offset, len)
    }

    /// Copies bytes out, as many as there are from `offset` on; returns how many.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (at, len) in self.readable(offset, into.len() as u64) {
            let end = done + len as usize;
            let Some(to) = into.get_mut(done..end) else { break };
            if self.core.memory.read_bytes(at, to).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// Copies bytes in, as many as fit from `offset` on; returns how many.
    pub fn write(&self, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        for (at, len) in self.writable(offset, from.len() as u64) {
            let end = done + len as usize;
            let Some(bytes) = from.get(done..end) else { break };
            if self.core.memory.write_bytes(at, bytes).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// Gives the chain back to the driver, `written` bytes of it written from the start, and interrupts if the driver
    /// wants that.
    pub fn complete(mut self, written: u32) {
        self.done = true;
        let written = written.min(self.writable_len() as u32);
        self.core.finish(self.queue, &[(self.head, written)], 1);
    }

    /// The same for a driver that probably waits in a loop for the chain, and would be interrupted for nothing: it is told by
    /// [`Port::remind`], which must follow soon, or at once if there is no way to know whether it has taken the chain.
    pub fn complete_untold(mut self, written: u32) {
        self.done = true;
        let written = written.min(self.writable_len() as u32);
        self.core.finish_untold(self.queue, (self.head, written));
    }

    /// Puts the chain back where it came from, unused, to be taken again. Only the last one taken of its queue can
    /// be: several go back in reverse order. Returns whether it went; it is dropped if not.
    pub fn put_back(mut self) -> bool {
        let mut state = lock(&self.core.state);
        let Some(queue) = state.queues.get_mut(usize::from(self.queue)) else { return false };
        let last = queue.next_available == self.place;
        if last {
            queue.next_available = self.place.wrapping_sub(1);
        }
        queue.in_flight = queue.in_flight.saturating_sub(1);
        self.core.settle(state);
        self.done = true;
        last
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if !self.done {
            self.core.finish(self.queue, &[], 1);
        }
    }
}
