//! The host's time-stamp counter.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, _mm_lfence, _rdtsc};
use std::sync::OnceLock;

/// Where Linux says what it keeps time by.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// The counter, read after whatever came before in the program (SDM 2B, RDTSC).
#[inline(always)]
pub(super) fn read() -> u64 {
    // SAFETY: every 64-bit processor has both, and Linux lets programs read the counter unless they ask it not to.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// Whether the counter tells time: it counts at one rate whatever the processor does, and is the same on all processors, which
/// Linux has made sure of where it keeps time by it.
pub(super) fn is_fit() -> bool {
    static FIT: OnceLock<bool> = OnceLock::new();
    *FIT.get_or_init(|| {
        is_invariant() && std::fs::read_to_string(CLOCK_SOURCE).is_ok_and(|source| source.trim() == "tsc")
    })
}

/// CPUID 8000_0007h:EDX bit 8 (SDM 3B 17.17.1).
fn is_invariant() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}
