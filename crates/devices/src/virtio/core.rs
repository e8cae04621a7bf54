//! What a device's registers and queues are, and who may do what to them when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ringfence_memory::GuestMemory;
use serde::{Deserialize, Serialize};

use super::queue::{Broken, Queue};
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

    pub(super) fn agreed(&self, feature: u64) -> bool {
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
    pub(super) fn interrupt_config(&self, state: &mut State) {
        self.interrupt(state, state.config_vector, isr::CONFIG);
    }

    pub(super) fn interrupt(&self, state: &mut State, vector: u16, bit: u8) {
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
    pub(super) fn put(&self, state: &mut State, index: u16, chains: &[(u16, u32)]) {
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
    pub(super) fn finish_untold(&self, index: u16, chain: (u16, u32)) {
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
    pub(super) fn remind(&self, index: u16) {
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
    pub(super) fn finish(&self, index: u16, chains: &[(u16, u32)], count: u32) {
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
