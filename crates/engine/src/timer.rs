//! Device timers in virtual time.
//!
//! Whoever makes time pass (the vCPU threads of a software engine, a thread of its own beside KVM) looks at
//! [`TimerQueue::next_deadline`] now and then and calls [`TimerQueue::run_due`]. That keeps timers exact in
//! counted mode, where no thread may act at a time of its own choosing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::VirtualTime;

type Callback = Arc<dyn Fn(VirtualTime) + Send + Sync>;

struct Slot {
    deadline: VirtualTime,
    /// It does something to a machine that does nothing by itself any more.
    vital: bool,
    callback: Callback,
}

/// All timers of a machine's devices.
pub struct TimerQueue {
    /// The earliest deadline, to be read without the lock.
    next: AtomicU64,
    /// A vital timer is armed.
    vital: AtomicBool,
    slots: Mutex<Vec<Slot>>,
    waker: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl std::fmt::Debug for TimerQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TimerQueue {{ next: {} ns }}", self.next.load(Ordering::Relaxed))
    }
}

impl Default for TimerQueue {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(u64::MAX),
            vital: AtomicBool::new(false),
            slots: Mutex::default(),
            waker: OnceLock::new(),
        }
    }
}

impl TimerQueue {
    /// Adds a timer, not armed. `callback` gets the present time, runs with no lock of the queue held, and may
    /// arm timers. Give it weak references, or queue and device keep each other alive.
    pub fn add(self: &Arc<Self>, callback: impl Fn(VirtualTime) + Send + Sync + 'static) -> Timer {
        self.add_slot(false, callback)
    }

    /// The same for one that means something even to a guest that can never wake again, such as a watchdog's.
    pub fn add_vital(self: &Arc<Self>, callback: impl Fn(VirtualTime) + Send + Sync + 'static) -> Timer {
        self.add_slot(true, callback)
    }

    fn add_slot(
        self: &Arc<Self>,
        vital: bool,
        callback: impl Fn(VirtualTime) + Send + Sync + 'static,
    ) -> Timer {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.push(Slot { deadline: VirtualTime::NEVER, vital, callback: Arc::new(callback) });
        Timer { queue: Arc::clone(self), index: slots.len() - 1 }
    }

    /// Registers what to call when the earliest deadline has come nearer, so that a sleeping vCPU looks again.
    /// The first registration holds.
    pub fn set_waker(&self, waker: impl Fn() + Send + Sync + 'static) {
        let _ = self.waker.set(Box::new(waker));
    }

    /// The earliest deadline, or [`VirtualTime::NEVER`].
    pub fn next_deadline(&self) -> VirtualTime {
        VirtualTime(self.next.load(Ordering::Acquire))
    }

    /// Whether a timer is armed that means something even to a guest that can never wake again.
    pub fn holds_vital(&self) -> bool {
        self.vital.load(Ordering::Acquire)
    }

    /// Disarms and runs, in order of their deadlines, the timers due at `now`.
    pub fn run_due(&self, now: VirtualTime) {
        while self.next_deadline() <= now {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let due = slots.iter_mut().filter(|s| s.deadline <= now && s.deadline < VirtualTime::NEVER);
            let callback = due.min_by_key(|s| s.deadline).map(|slot| {
                slot.deadline = VirtualTime::NEVER;
                Arc::clone(&slot.callback)
            });
            self.publish(&slots);
            drop(slots);
            match callback {
                Some(callback) => callback(now),
                None => break,
            }
        }
    }

    fn publish(&self, slots: &[Slot]) -> bool {
        let next = slots.iter().map(|s| s.deadline.0).min().unwrap_or(u64::MAX);
        let vital = slots.iter().any(|s| s.vital && s.deadline < VirtualTime::NEVER);
        self.vital.store(vital, Ordering::Release);
        next < self.next.swap(next, Ordering::AcqRel)
    }

    fn set(&self, index: usize, deadline: VirtualTime) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(index) {
            slot.deadline = deadline;
        }
        let sooner = self.publish(&slots);
        drop(slots);
        if sooner && let Some(waker) = self.waker.get() {
            waker();
        }
    }
}

/// One timer of a device: fires once at its deadline, then is disarmed.
#[derive(Clone, Debug)]
pub struct Timer {
    queue: Arc<TimerQueue>,
    index: usize,
}

impl Timer {
    /// Fires at `deadline` instead of any earlier setting; at once if that has passed.
    pub fn arm(&self, deadline: VirtualTime) {
        self.queue.set(self.index, deadline);
    }

    /// Does not fire any more.
    pub fn cancel(&self) {
        self.queue.set(self.index, VirtualTime::NEVER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vital_timer_is_known_while_it_is_armed() {
        let queue = Arc::new(TimerQueue::default());
        let (other, vital) = (queue.add(|_| ()), queue.add_vital(|_| ()));
        other.arm(VirtualTime(5));
        assert!(!queue.holds_vital());
        vital.arm(VirtualTime(7));
        assert!(queue.holds_vital());
        queue.run_due(VirtualTime(7));
        assert!(!queue.holds_vital());
    }

    #[test]
    fn due_timers_run_in_order_of_their_deadlines() {
        let queue = Arc::new(TimerQueue::default());
        let log = Arc::new(Mutex::new(Vec::new()));
        let timers: Vec<Timer> = (0..3)
            .map(|i| {
                let log = Arc::clone(&log);
                queue.add(move |now| log.lock().unwrap().push((i, now.0)))
            })
            .collect();
        timers[0].arm(VirtualTime(300));
        timers[1].arm(VirtualTime(100));
        timers[2].arm(VirtualTime(200));
        assert_eq!(queue.next_deadline(), VirtualTime(100));
        queue.run_due(VirtualTime(250));
        assert_eq!(*log.lock().unwrap(), [(1, 250), (2, 250)]);
        timers[0].cancel();
        queue.run_due(VirtualTime(1000));
        assert_eq!(log.lock().unwrap().len(), 2);
        assert_eq!(queue.next_deadline(), VirtualTime::NEVER);
    }

    #[test]
    fn waker_runs_only_when_the_first_deadline_comes_nearer() {
        let queue = Arc::new(TimerQueue::default());
        let count = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&count);
        queue.set_waker(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let (a, b) = (queue.add(|_| ()), queue.add(|_| ()));
        a.arm(VirtualTime(100));
        b.arm(VirtualTime(200));
        b.arm(VirtualTime(50));
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
