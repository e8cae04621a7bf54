//! A guest may do anything to a disk controller, DMA included: see [`ringfence_devices::nvme::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::image;

fuzz_target!(|input: &[u8]| {
    ringfence_devices::nvme::fuzz::run(image(), input);
});
