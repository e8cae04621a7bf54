//! What another process may write into the memory that a machine shares with it: see [`ringfence_helper::fuzz`].
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| ringfence_helper::fuzz::run(data));
