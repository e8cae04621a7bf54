//! The balloon (5.5): memory that the guest can do without goes back to the host.
//!
//! Two ways: the guest gives up as many pages as it is told to (inflating), and, without being asked, tells of pages
//! that it has free (free page reporting). Either way the host's memory behind them is released; the guest finds zeroes
//! there when it uses them again. Nothing has to be done for deflating: a page that is touched is there.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ringfence_engine::StateError;
use ringfence_memory::GuestAddress;
use serde::{Deserialize, Serialize};

use super::{Chain, Kind, Port, VirtioDevice, read_bytes};
use crate::device::invalid;

const DEVICE_TYPE: u16 = 5;
/// Base class ff (none of the others).
const CLASS: u32 = 0xff_0000;
/// The balloon counts in pages of 4 KiB, whatever the guest's are (5.5.4).
const PAGE: u64 = 4096;
const QUEUE_SIZE: u16 = 128;
/// Page numbers in one request at most; Linux sends 256.
const MOST_PAGES: u64 = 4096;

/// Queues. Without statistics and hints the one for reporting is the third, as drivers and other machines have it.
mod queue {
    pub(super) const INFLATE: u16 = 0;
    pub(super) const DEFLATE: u16 = 1;
    pub(super) const REPORT: u16 = 2;
}

/// Feature bits (5.5.3).
mod feature {
    /// The guest takes pages back rather than running out of memory.
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// Offset of the field with what the guest has given up.
const ACTUAL: u64 = 4;

#[derive(Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
}

/// A virtio balloon.
#[derive(Debug, Default)]
pub struct Balloon {
    port: OnceLock<Port>,
    /// Pages that the guest is to give up.
    target: AtomicU32,
    /// Pages that it says it has given up.
    actual: AtomicU32,
    /// Bytes that went back to the host so far.
    released: AtomicU64,
}

impl Balloon {
    /// A balloon that asks the guest for `target` bytes, rounded down to pages.
    pub fn new(target: u64) -> Arc<Self> {
        let balloon = Self::default();
        balloon.target.store(pages(target), Ordering::Release);
        Arc::new(balloon)
    }

    /// Asks the guest to give up so many bytes in all from now on, rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        self.target.store(pages(bytes), Ordering::Release);
        if let Some(port) = self.port.get() {
            port.config_changed();
        }
    }

    /// Bytes that the guest says it has given up.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes that went back to the host so far, by inflating and by reporting.
    pub fn released(&self) -> u64 {
        self.released.load(Ordering::Acquire)
    }

    fn release(&self, port: &Port, address: u64, len: u64) {
        let released = port.memory().release(GuestAddress(address), len);
        self.released.fetch_add(released, Ordering::AcqRel);
    }

    /// Pages that the guest gives up, by their numbers.
    fn inflate(&self, port: &Port, chain: &Chain) -> Result<(), &'static str> {
        let count = chain.readable_len() / 4;
        if count > MOST_PAGES || chain.writable_len() > 0 {
            return Err("a balloon request has too many pages or something to be written");
        }
        let mut bytes = vec![0; count as usize * 4];
        chain.read(0, &mut bytes);
        let numbers = bytes
            .chunks_exact(4)
            .map(|number| number.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)));
        // Neighbours go back together; Linux gives them in descending order.
        let mut run: Option<(u64, u64)> = None;
        for page in numbers {
            run = match run {
                Some((first, count)) if page == first + count => Some((first, count + 1)),
                Some((first, count)) if page + 1 == first => Some((page, count + 1)),
                other => {
                    self.release_pages(port, other);
                    Some((page, 1))
                }
            };
        }
        self.release_pages(port, run);
        Ok(())
    }

    fn release_pages(&self, port: &Port, run: Option<(u64, u64)>) {
        if let Some((first, count)) = run {
            self.release(port, first * PAGE, count * PAGE);
        }
    }
}

/// Bytes as pages, as far as the register goes.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        let features = feature::DEFLATE_ON_OOM | feature::REPORTING;
        Kind { id: DEVICE_TYPE, class: CLASS, features, queues: vec![QUEUE_SIZE; 3] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.port.set(port);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = [&self.target, &self.actual].map(|field| field.load(Ordering::Acquire).to_le_bytes());
        read_bytes(fields.as_flattened(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, &[a, b, c, d]) = (offset, data) {
            self.actual.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        }
    }

    fn activate(&self, _: u64) {}

    fn notify(&self, queue: u16) {
        let Some(port) = self.port.get() else { return };
        while let Some(chain) = port.take(queue) {
            match queue {
                queue::INFLATE => {
                    if let Err(why) = self.inflate(port, &chain) {
                        return port.fail(why);
                    }
                }
                queue::REPORT => {
                    for (address, len) in chain.writable(0, u64::MAX) {
                        self.release(port, address.0, len);
                    }
                }
                queue::DEFLATE => {}
                _ => {}
            }
            chain.complete(0);
        }
    }

    fn save(&self) -> serde_json::Value {
        let (target, actual) = (&self.target, &self.actual);
        let saved = Saved { target: target.load(Ordering::Acquire), actual: actual.load(Ordering::Acquire) };
        serde_json::to_value(saved).unwrap_or_default()
    }

    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let saved = Saved::deserialize(state).map_err(|error| invalid(name, error.to_string()))?;
        self.target.store(saved.target, Ordering::Release);
        self.actual.store(saved.actual, Ordering::Release);
        Ok(())
    }
}
