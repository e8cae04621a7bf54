//! How other threads reach a vCPU that runs or sleeps.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use ringfence_engine::Kick;

/// A vCPU's bell. The vCPU looks at [`Signal::rung`] between blocks, and sleeps on it when halted.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    rung: AtomicBool,
    kicked: AtomicBool,
    asleep: Mutex<bool>,
    wake: Condvar,
}

impl Signal {
    /// Makes the vCPU look at interrupts and timers soon.
    pub(crate) fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if *asleep {
            self.wake.notify_one();
        }
    }

    /// Whether there is something to look at.
    #[inline(always)]
    pub(crate) fn rung(&self) -> bool {
        self.rung.load(Ordering::Relaxed)
    }

    /// Clears the bell; what rang it must be looked at after this.
    pub(crate) fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    /// Whether [`Kick::kick`] was called since the last time.
    pub(crate) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until rung, or for `time` at most.
    pub(crate) fn sleep(&self, time: Option<Duration>) {
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        *asleep = true;
        let quiet = |_: &mut bool| !self.rung.load(Ordering::SeqCst);
        let mut asleep = match time {
            Some(time) => {
                self.wake.wait_timeout_while(asleep, time, quiet).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait_while(asleep, quiet).unwrap_or_else(PoisonError::into_inner),
        };
        *asleep = false;
    }
}

impl Kick for Signal {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn ring_before_sleep_is_not_lost() {
        let signal = Signal::default();
        signal.ring();
        let start = Instant::now();
        signal.sleep(Some(Duration::from_secs(20)));
        assert!(start.elapsed() < Duration::from_secs(10));
        signal.answer();
        signal.sleep(Some(Duration::from_millis(5)));
        assert!(!signal.rung());
    }

    #[test]
    fn kick_wakes_a_sleeper_and_is_taken_once() {
        let signal = Arc::new(Signal::default());
        let sleeper = Arc::clone(&signal);
        let thread = std::thread::spawn(move || sleeper.sleep(None));
        std::thread::sleep(Duration::from_millis(10));
        signal.kick();
        thread.join().unwrap();
        assert!(signal.take_kick());
        assert!(!signal.take_kick());
    }
}
