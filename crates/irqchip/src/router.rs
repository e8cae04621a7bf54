//! Finds the local APICs an interrupt message is for.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ringfence_engine::VirtualClock;

use crate::lapic::{LapicInbox, Registers};
use crate::message::{DeliveryMode, Destination, Message};

/// The most local APICs; ids are smaller, so that 8-bit destinations reach all of them and 255 is everybody.
pub(crate) const MAX_LOCAL_APICS: u32 = 255;

/// A local APIC as the rest of the chip sees it.
pub(crate) struct Slot {
    pub(crate) inbox: Arc<LapicInbox>,
    pub(crate) clock: Arc<VirtualClock>,
    /// Registers while the vCPU is not running.
    pub(crate) parked: Mutex<Parked>,
}

/// Registers while the vCPU is not running.
pub(crate) struct Parked {
    pub(crate) registers: Registers,
    /// They were loaded from outside, so the owner must take them over.
    pub(crate) replaced: bool,
}

/// Which local APICs have got something new and must be woken once no lock is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub(crate) struct WakeSet([u64; 4]);

impl WakeSet {
    fn add(&mut self, id: u32) {
        if let Some(word) = self.0.get_mut(id as usize / 64) {
            *word |= 1 << (id % 64);
        }
    }

    pub(crate) fn remove(&mut self, id: u32) {
        if let Some(word) = self.0.get_mut(id as usize / 64) {
            *word &= !(1 << (id % 64));
        }
    }

    fn contains(&self, id: usize) -> bool {
        self.0.get(id / 64).is_some_and(|word| word & (1 << (id % 64)) != 0)
    }
}

/// All local APICs, by id.
pub(crate) struct Router {
    slots: Box<[OnceLock<Slot>]>,
    /// Where the search among equals starts next.
    turn: AtomicU32,
}

impl Router {
    pub(crate) fn new(count: u32) -> Self {
        let slots = (0..count.min(MAX_LOCAL_APICS)).map(|_| OnceLock::new()).collect();
        Self { slots, turn: AtomicU32::new(0) }
    }

    pub(crate) fn slot(&self, id: u32) -> Option<&OnceLock<Slot>> {
        self.slots.get(id as usize)
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter_map(OnceLock::get)
    }

    fn inboxes(&self) -> impl Iterator<Item = &LapicInbox> {
        self.slots().map(|slot| &*slot.inbox)
    }

    /// Delivers `message` and notes in `wake` who must be woken. Whether anybody accepted it.
    pub(crate) fn deliver(&self, message: &Message, wake: &mut WakeSet) -> bool {
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_to_lowest(message, wake);
        }
        if let Destination::Physical(id) = message.destination {
            let slot = self.slot(id).and_then(OnceLock::get);
            return slot.is_some_and(|slot| accept(&slot.inbox, message, wake));
        }
        let mut accepted = false;
        for inbox in self.inboxes() {
            if inbox.matches(message.destination) {
                accepted |= accept(inbox, message, wake);
            }
        }
        accepted
    }

    /// SDM 3A 10.6.2.4: the target with the lowest task priority; equals take turns.
    fn deliver_to_lowest(&self, message: &Message, wake: &mut WakeSet) -> bool {
        let start = self.turn.fetch_add(1, Ordering::Relaxed) as usize % self.slots.len().max(1);
        let (before, after) = self.slots.split_at(start);
        let candidates = after.iter().chain(before).filter_map(OnceLock::get).map(|slot| &*slot.inbox);
        let best = candidates
            .filter(|inbox| inbox.matches(message.destination) && inbox.software_enabled())
            .min_by_key(|inbox| inbox.task_priority());
        best.is_some_and(|inbox| accept(inbox, message, wake))
    }

    /// Drives the INTR output of the 8259 pair, which is wired to LINT0 of every local APIC.
    pub(crate) fn set_lint0(&self, asserted: bool, wake: &mut WakeSet) {
        for inbox in self.inboxes() {
            if inbox.set_lint0(asserted) {
                wake.add(inbox.id());
            }
        }
    }

    /// An edge of the NMI line, which is wired to LINT1 of every local APIC.
    pub(crate) fn pulse_lint1(&self, wake: &mut WakeSet) {
        for inbox in self.inboxes() {
            if inbox.pulse_lint1() {
                wake.add(inbox.id());
            }
        }
    }

    /// Wakes those in `wake`. To be called with no lock held.
    pub(crate) fn wake(&self, wake: WakeSet) {
        if wake == WakeSet::default() {
            return;
        }
        for (id, slot) in self.slots.iter().enumerate() {
            if wake.contains(id)
                && let Some(slot) = slot.get()
            {
                slot.inbox.wake();
            }
        }
    }
}

fn accept(inbox: &LapicInbox, message: &Message, wake: &mut WakeSet) -> bool {
    if !inbox.enabled() {
        return false;
    }
    let news = match message.mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
            if !inbox.software_enabled() {
                return false;
            }
            inbox.post_vector(message.vector, message.level)
        }
        DeliveryMode::Nmi => inbox.post_nmi(),
        DeliveryMode::Init => inbox.post_init(),
        DeliveryMode::StartUp => inbox.post_sipi(message.vector),
        DeliveryMode::ExtInt => inbox.post_extint(),
        DeliveryMode::Smi | DeliveryMode::Reserved => false,
    };
    if news {
        wake.add(inbox.id());
    }
    true
}
