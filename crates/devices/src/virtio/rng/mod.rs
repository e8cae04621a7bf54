//! The entropy device (5.4): fills what the driver gives it with random bytes of the host.

use std::sync::OnceLock;

use super::{Kind, Port, VirtioDevice};

const DEVICE_TYPE: u16 = 4;
/// Base class ff (none of the others).
const CLASS: u32 = 0xff_0000;
const QUEUE: u16 = 64;
/// Bytes given for one request at most. The device may give less than was asked for (5.4.6.1); this much takes the
/// host some microseconds, so a guest cannot keep a vCPU's thread busy with one request.
const MOST: usize = 4096;

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    port: OnceLock<Port>,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind { id: DEVICE_TYPE, class: CLASS, features: 0, queues: vec![QUEUE] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.port.set(port);
    }

    /// It has none.
    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn notify(&self, queue: u16) {
        let Some(port) = self.port.get() else { return };
        while let Some(chain) = port.take(queue) {
            if chain.readable_len() > 0 {
                return port.fail("a request for random bytes has a buffer to be read");
            }
            let mut bytes = [0; MOST];
            let len = chain.writable_len().min(MOST as u64) as usize;
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            // Without entropy the guest gets none, rather than bytes that are not random.
            let written = if getrandom::fill(bytes).is_ok() { chain.write(0, bytes) } else { 0 };
            chain.complete(written as u32);
        }
    }
}
