//! A guest may do anything to a virtio device, DMA included: see [`ringfence_devices::virtio::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::{image, note_transfers, place};

fuzz_target!(|input: &[u8]| {
    let (device, chains) = ringfence_devices::virtio::fuzz::run_any(image(), place(), input);
    note_transfers(device, chains);
});
