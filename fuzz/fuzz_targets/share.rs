//! A guest's FUSE requests against a shared folder: see [`ringfence_share::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::place;

fuzz_target!(|data: &[u8]| ringfence_share::fuzz::run(place(), data));
