//! A guest may do anything to a disk controller, DMA included: see [`ringfence_devices::nvme::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::{image, note_transfers};

fuzz_target!(|input: &[u8]| {
    note_transfers("nvme", ringfence_devices::nvme::fuzz::run(image(), input));
});
