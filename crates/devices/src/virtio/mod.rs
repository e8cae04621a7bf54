//! virtio devices over PCI: the core that all of them stand on, and the devices, a module each.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2; section numbers here and beside the code are its own. Offered: the modern PCI
//! transport (4.1) with MSI-X or the pin, split queues with indirect descriptors and event index, reset of single
//! queues. Not offered: the legacy interface, packed queues, notification data.
//!
//! A kind of device is a [`VirtioDevice`]; [`VirtioPci`] makes a PCI function of one. The device is given a [`Port`],
//! through which it takes [`Chain`]s of descriptors from its queues and gives them back, from any thread. A chain is
//! copied and checked as a whole when it is taken: all of it is memory that the device may use, it has an end, and
//! less than 4 GiB. So a device sees nothing of descriptors, and cannot read them twice.
//!
//! A driver that breaks the rules finds its device marked as in need of a reset (2.1.2), and the user is told once. Writes
//! to registers that are not allowed at their time are dropped, as the specification leaves them undefined. A reset, of
//! all or of one queue, reads as done only when no chain is in flight any more, so that the guest's memory is its
//! own again.
//!
//! Lock order: a device's own, then the core's state, then the endpoint, then the interrupt controller. Devices are
//! called with none of the core's locks held.

pub mod balloon;
pub mod blk;
pub mod console;
mod core;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code, reason = "a fuzzer's guest does less than the tests'"))]
mod guest;
mod line;
pub mod net;
mod pci;
mod port;
mod queue;
mod registers;
pub mod rng;
mod saved;
pub mod share;

mod spec;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod vsock;

use std::sync::Arc;

use ringfence_engine::StateError;

pub use self::core::Reporter;
pub use self::port::{Chain, Port};
pub use pci::{VirtioConfig, VirtioPci};
pub use queue::Piece;
pub use spec::feature;

/// What a kind of device says of itself, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The device type (5).
    pub id: u16,
    /// Base class, subclass and programming interface of the PCI function.
    pub class: u32,
    /// Features of its own; those of queues and transport are added.
    pub features: u64,
    /// Its queues: entries of each at most, a power of two up to 32768.
    pub queues: Vec<u16>,
}

/// A kind of device: what it does with its queues and its configuration.
///
/// All calls come with no lock of the core held, and can come from several vCPUs at once.
pub trait VirtioDevice: std::fmt::Debug + Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;

    /// Called once, before anything else.
    fn connect(&self, port: Port);

    /// Fills `data`, which comes zeroed, from its configuration space at `offset`. Of what lies past the end, zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to its configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready and agreed to `features`, among them those of [`feature`].
    fn activate(&self, features: u64) {
        let _ = features;
    }

    /// The driver has made chains available in `queue`; called on the vCPU's thread. Whatever has not been taken when
    /// [`Port::take`] last gave `None` is told of anew; a device that stops taking earlier must come back by itself.
    fn notify(&self, queue: u16);

    /// The device, or with `queue` only that one, is being reset, or stopped to be saved: [`Port::take`] gives nothing
    /// any more after a reset. Give up, soon, the chains held for something that may never happen: drop them, or, when
    /// `saving`, [put them back](Chain::put_back) in reverse order. Those on their way, such as disk requests, end by
    /// themselves. Until the next [`VirtioDevice::activate`] or [`VirtioDevice::notify`] take no new ones.
    fn stop(&self, queue: Option<u16>, saving: bool) {
        let _ = (queue, saving);
    }

    /// The device's own state, after [`VirtioDevice::stop`] and when no chain is in flight. Null if it has none.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Loads what [`VirtioDevice::save`] gave, of a device with the same `name`. Activation follows if the driver was
    /// ready.
    ///
    /// # Errors
    /// [`StateError`] if it is not such a state; the device is as it was then.
    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let _ = (name, state);
        Ok(())
    }
}

/// Copies what `config` has at `offset` to `data`: a device's configuration space as bytes.
pub fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    for (to, from) in data.iter_mut().zip(config.iter().skip(from)) {
        *to = *from;
    }
}

/// A device that can be shared between the function and whoever else feeds it.
pub type SharedDevice = Arc<dyn VirtioDevice>;
