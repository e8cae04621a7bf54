//! A guest's FUSE requests against a shared folder: see [`ringfence_share::fuzz`].
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static PLACE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let place = PLACE.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
    ringfence_share::fuzz::run(place.path(), data);
});
