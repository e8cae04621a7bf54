//! A guest's packets against the host's side of vsock: see [`ringfence_vsock::fuzz`].
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static PLACE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let place = PLACE.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
    ringfence_vsock::fuzz::run(place.path(), data);
});
