//! Where RDRAND and RDSEED get their numbers.

use std::arch::x86_64::{_rdrand64_step, _rdseed64_step};

use ringfence_engine::ClockMode;

use crate::interp::cpu::Cpu;

/// The generator's state after power-on. Any value but zero would do.
pub(super) const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// How often the host is asked again before the guest sees a failure (SDM 1 7.3.17.1 recommends ten).
const ATTEMPTS: usize = 10;

#[target_feature(enable = "rdrand")]
fn host_number() -> Option<u64> {
    let mut value = 0;
    // Plain computation on registers; the instruction's presence is what `target_feature` asks of the caller.
    (0..ATTEMPTS).find_map(|_| (_rdrand64_step(&mut value) == 1).then_some(value))
}

#[target_feature(enable = "rdseed")]
fn host_seed() -> Option<u64> {
    let mut value = 0;
    (0..ATTEMPTS).find_map(|_| (_rdseed64_step(&mut value) == 1).then_some(value))
}

impl Cpu {
    /// A random number: the host's, or in counted mode the next of a fixed sequence.
    pub(super) fn random_number(&mut self) -> Option<u64> {
        if self.clock.mode() == ClockMode::Counted || !is_x86_feature_detected!("rdrand") {
            return Some(self.next_random());
        }
        // SAFETY: the host has RDRAND, as just checked.
        unsafe { host_number() }
    }

    /// As [`Cpu::random_number`], from the host's entropy source.
    pub(super) fn random_seed(&mut self) -> Option<u64> {
        if self.clock.mode() == ClockMode::Counted || !is_x86_feature_detected!("rdseed") {
            return Some(self.next_random());
        }
        // SAFETY: the host has RDSEED, as just checked.
        unsafe { host_seed() }
    }

    /// splitmix64.
    fn next_random(&mut self) -> u64 {
        self.system.random = self.system.random.wrapping_add(SEED);
        let mut z = self.system.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
