//! A guest's frames against the NAT in user mode, with a server that belongs to the fuzzer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_fuzz::survive_lost_peers;

fuzz_target!(|data: &[u8]| {
    survive_lost_peers();
    ringfence_net::user::fuzz::run(data);
});
