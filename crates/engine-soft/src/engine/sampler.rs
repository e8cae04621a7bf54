//! Samples for a guest profile: one whenever the guest has executed another so many instructions.
//!
//! The run loop is left exactly there, so that what is executed more often is met more often, however its code came to be left
//! otherwise. Nothing of this is in translated code.

use std::collections::HashMap;

use ringfence_engine::{GuestProfile, Place};

use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;

/// Instructions between two samples: a prime, so that loops do not keep step with it, and no more than the run loop executes
/// in one go.
const PERIOD: u64 = 16_381;
/// Most places remembered.
const MAX_PLACES: usize = 1 << 18;

/// The samples of one vCPU.
#[derive(Debug)]
pub(super) struct Sampler {
    /// Count of instructions at which the next sample is due.
    next: u64,
    places: HashMap<Place, u64>,
    elsewhere: u64,
    most: usize,
}

impl Sampler {
    /// For a vCPU that has executed nothing yet.
    pub(super) fn new() -> Self {
        Self { next: PERIOD, places: HashMap::new(), elsewhere: 0, most: MAX_PLACES }
    }

    /// Instructions until the next sample, at least one.
    pub(super) fn left(&self, cpu: &Cpu) -> u64 {
        self.next.saturating_sub(cpu.retired).max(1)
    }

    /// Takes a sample if it is due.
    pub(super) fn look(&mut self, cpu: &Cpu) {
        if cpu.retired < self.next {
            return;
        }
        self.next = (cpu.retired / PERIOD + 1).saturating_mul(PERIOD);
        let user = cpu.cpl == 3;
        let rip = cpu.regs[RIP];
        let page = cpu.tlb.fetch(user, rip).map(|address| address & !0xfff);
        self.count(Place { rip, user, page });
    }

    fn count(&mut self, place: Place) {
        if let Some(count) = self.places.get_mut(&place) {
            *count += 1;
        } else if self.places.len() < self.most {
            self.places.insert(place, 1);
        } else {
            self.elsewhere += 1;
        }
    }

    /// What was seen so far.
    pub(super) fn profile(&self, cpu: &Cpu, handed: Vec<(String, u64)>) -> GuestProfile {
        GuestProfile {
            period: PERIOD,
            instructions: cpu.retired,
            samples: self.places.iter().map(|(&place, &count)| (place, count)).collect(),
            elsewhere: self.elsewhere,
            handed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_beyond_the_most_are_counted_together() {
        let mut sampler = Sampler { most: 2, ..Sampler::new() };
        for rip in [1, 2, 3, 1, 4] {
            sampler.count(Place { rip, user: false, page: None });
        }
        assert_eq!((sampler.places.len(), sampler.elsewhere), (2, 2));
    }
}
