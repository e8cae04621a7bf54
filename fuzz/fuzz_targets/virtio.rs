//! A guest may do anything to a virtio device, DMA included: see [`ringfence_devices::virtio::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::{image, place};

fuzz_target!(|input: &[u8]| {
    ringfence_devices::virtio::fuzz::run_any(image(), place(), input);
});
