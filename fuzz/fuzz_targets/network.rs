//! A guest's frames against the NAT in user mode, with a server that belongs to the fuzzer.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| ringfence_net::user::fuzz::run(data));
