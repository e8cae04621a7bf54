//! What a device's registers and queues are, and who may do what to them when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ringfence_memory::{GuestAddress, GuestMemory};
use serde::{Deserialize, Serialize};

use super::queue::{Broken, Piece, Pieces, Queue};
use super::spec::{NO_VECTOR, feature, isr, status};
use crate::device::lock;
use crate::pci::Endpoint;

/// Told, once for each device, that its driver broke the rules: a message for the user.
pub type Reporter = Arc<dyn Fn(String) + Send + Sync>;

/// The registers and queues of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) status: u8,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    pub(super) generation: u8,
    pub(super) queue_select: u16,
    pub(super) isr: u8,
    pub(super) queues: Vec<Queue>,
    /// Chains whose end could not be told while the function was not bus master: queue, head, bytes written.
    pub(super) postponed: Vec<(u16, u16, u32)>,
    /// A reset waits for what is in flight.
    #[serde(skip)]
    pub(super) resetting: bool,
}

impl State {
    pub(super) fn new(sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            generation: 0,
            queue_select: 0,
            isr: 0,
            queues: sizes.iter().map(|size| Queue::new(*size)).collect(),
            postponed: Vec::new(),
            resetting: false,
        }
    }

    pub(super) fn has(&self, bits: u8) -> bool {
        self.status & bits == bits
    }

    fn agreed(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    /// Whether queues are served.
    pub(super) fn is_running(&self) -> bool {
        self.has(status::DRIVER_OK) && !self.has(status::NEEDS_RESET) && !self.resetting
    }

    fn in_flight(&self) -> u32 {
        self.queues.iter().map(|q| q.in_flight).sum()
    }

    /// As after a reset by the driver. The configuration's generation goes on.
    fn clear(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max).collect();
        *self = Self { generation: self.generation, ..Self::new(&sizes) };
    }
}

/// What devices, transport and the chains in flight share.
pub(super) struct Core {
    /// The name of its saved state.
    pub(super) name: String,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) endpoint: Endpoint,
    pub(super) features: u64,
    pub(super) vectors: u16,
    reporter: Mutex<Option<Reporter>>,
    pub(super) state: Mutex<State>,
    /// Chains that went back to the driver since the function was made.
    pub(super) given_back: AtomicU64,
    /// Signalled when nothing is in flight any more.
    idle: Condvar,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("name", &self.name).field("state", &*lock(&self.state)).finish()
    }
}

impl Core {
    pub(super) fn new(
        name: String,
        memory: Arc<GuestMemory>,
        endpoint: Endpoint,
        features: u64,
        sizes: &[u16],
        vectors: u16,
        reporter: Reporter,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            memory,
            endpoint,
            features: features | feature::CORE,
            vectors,
            reporter: Mutex::new(Some(reporter)),
            state: Mutex::new(State::new(sizes)),
            given_back: AtomicU64::new(0),
            idle: Condvar::new(),
        })
    }

    /// The driver broke a rule: nothing is served any more until it resets the device (2.1.2).
    pub(super) fn fail(&self, state: &mut State, why: Broken) {
        if state.has(status::NEEDS_RESET) {
            return;
        }
        state.status |= status::NEEDS_RESET;
        if state.has(status::DRIVER_OK) {
            self.interrupt_config(state);
        }
        if let Some(report) = lock(&self.reporter).take() {
            let name = &self.name;
            report(format!(
                "the guest's driver broke the rules of the device {name}: {why}; the device does nothing more until \
                 the guest resets it, and further cases are not reported"
            ));
        }
    }

    /// Tells the driver that the device's configuration, or its need of a reset, has changed.
    fn interrupt_config(&self, state: &mut State) {
        self.interrupt(state, state.config_vector, isr::CONFIG);
    }

    fn interrupt(&self, state: &mut State, vector: u16, bit: u8) {
        if self.endpoint.uses_messages() {
            if vector != NO_VECTOR {
                self.endpoint.notify(vector);
            }
        } else {
            state.isr |= bit;
            self.update_pin(state);
        }
    }

    /// The pin is high while the ISR status has a bit and interrupts are not messages (4.1.4.5).
    pub(super) fn update_pin(&self, state: &State) {
        self.endpoint.set_interrupt(state.isr != 0 && !self.endpoint.uses_messages());
    }

    /// Reads the ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        let value = std::mem::take(&mut state.isr);
        self.update_pin(&state);
        value
    }

    /// Gives chains back to the driver.
    fn put(&self, state: &mut State, index: u16, chains: &[(u16, u32)]) {
        if chains.is_empty() || !state.is_running() {
            return;
        }
        if !self.endpoint.is_bus_master() {
            state.postponed.extend(chains.iter().map(|(head, written)| (index, *head, *written)));
            return;
        }
        let events = state.agreed(feature::EVENT_INDEX);
        let Some(queue) = state.queues.get_mut(usize::from(index)).filter(|q| q.enabled && !q.resetting)
        else {
            return;
        };
        let vector = queue.vector;
        self.given_back.fetch_add(chains.len() as u64, Ordering::Relaxed);
        match queue.put(&self.memory, chains, events) {
            Ok(true) => self.interrupt(state, vector, isr::QUEUE),
            Ok(false) => (),
            Err(why) => self.fail(state, why),
        }
    }

    /// Gives a chain back that the driver will probably find by itself, and ends it.
    fn finish_untold(&self, index: u16, chain: (u16, u32)) {
        let mut state = lock(&self.state);
        let may = state.is_running() && self.endpoint.is_bus_master() && state.agreed(feature::EVENT_INDEX);
        let queue = state.queues.get_mut(usize::from(index)).filter(|q| may && q.enabled && !q.resetting);
        let Some(queue) = queue else {
            drop(state);
            return self.finish(index, &[chain], 1);
        };
        self.given_back.fetch_add(1, Ordering::Relaxed);
        if let Err(why) = queue.put_untold(&self.memory, chain) {
            self.fail(&mut state, why);
        }
        drop(state);
        self.finish(index, &[], 1);
    }

    /// Tells the driver of what it was not told of, unless it has found it.
    fn remind(&self, index: u16) {
        let mut state = lock(&self.state);
        if !state.is_running() || !self.endpoint.is_bus_master() {
            return;
        }
        let queue = state.queues.get_mut(usize::from(index)).filter(|q| q.enabled && !q.resetting);
        let Some((vector, told)) = queue.map(|queue| (queue.vector, queue.remind(&self.memory))) else {
            return;
        };
        match told {
            Ok(true) => self.interrupt(&mut state, vector, isr::QUEUE),
            Ok(false) => (),
            Err(why) => self.fail(&mut state, why),
        }
    }

    /// Ends `count` chains that were in flight, some of which are given back.
    fn finish(&self, index: u16, chains: &[(u16, u32)], count: u32) {
        let mut state = lock(&self.state);
        self.put(&mut state, index, chains);
        if let Some(queue) = state.queues.get_mut(usize::from(index)) {
            queue.in_flight = queue.in_flight.saturating_sub(count);
        }
        self.settle(state);
    }

    /// What waits until nothing is in flight: resets, and threads.
    pub(super) fn settle(&self, mut state: MutexGuard<'_, State>) {
        for queue in state.queues.iter_mut().filter(|q| q.resetting && q.in_flight == 0) {
            *queue = Queue::new(queue.max);
        }
        if state.in_flight() > 0 {
            return;
        }
        if state.resetting {
            state.clear();
            self.update_pin(&state);
        }
        self.idle.notify_all();
    }

    /// Goes on with what could not be told before the function was bus master.
    pub(super) fn resume(&self) {
        let mut state = lock(&self.state);
        for (index, head, written) in std::mem::take(&mut state.postponed) {
            self.put(&mut state, index, &[(head, written)]);
        }
    }

    /// Waits until no chain is in flight. The guest must not be running, and its devices must have given up the
    /// chains that wait for something.
    pub(super) fn wait_idle(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        while state.in_flight() > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

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
