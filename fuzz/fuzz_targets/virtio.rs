//! A guest may do anything to a virtio device, DMA included: see [`ringfence_devices::virtio::fuzz`].
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use ringfence_devices::virtio::fuzz::run;
use ringfence_devices::virtio::rng::Rng;

fuzz_target!(|input: &[u8]| run(Arc::new(Rng::default()), input));
