//! A guest's packets against the host's side of vsock: see [`ringfence_vsock::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::{place, survive_lost_peers};

fuzz_target!(|data: &[u8]| {
    survive_lost_peers();
    ringfence_vsock::fuzz::run(place(), data);
});
