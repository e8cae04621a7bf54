//! Arbitrary bytes as guest code, in any mode and with any registers, never panic, hang or touch anything but the guest.
//!
//! Input: see `ringfence_fuzz::guest`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_engine_soft::interp::op::RIP;
use ringfence_fuzz::{HEADER, guest};

fuzz_target!(|data: &[u8]| {
    let Some((header, code)) = data.split_at_checked(HEADER) else { return };
    let Some(mut machine) = guest(header, code) else { return };
    let options = header[0];
    for _ in 0..256 {
        let before = machine.cpu.regs[RIP];
        let result = if options & 8 != 0 { machine.single_step() } else { machine.run_block(64) };
        if let Err(exception) = result {
            // Deliver some exceptions through whatever IDT the guest made, step over others.
            if options & 16 != 0 {
                if machine.cpu.raise(exception).is_err() {
                    return;
                }
            } else {
                machine.cpu.regs[RIP] = before.wrapping_add(1);
            }
        }
    }
});
