//! How a vCPU reaches devices.

use std::sync::Arc;

use ringfence_memory::{GuestAddress, GuestRange};

/// Where accesses that are not guest memory go. Unclaimed reads return all ones, unclaimed writes are dropped.
///
/// `data` is 1, 2, 4 or 8 bytes long for memory accesses (up to 64 for vector accesses), 1, 2 or 4 for ports;
/// little-endian. Called on the vCPU's thread with no lock held.
pub trait Bus: Send + Sync {
    /// `in`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `out`.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load from an address that holds no memory.
    fn memory_read(&self, address: GuestAddress, data: &mut [u8]);
    /// A store to an address that holds no memory.
    fn memory_write(&self, address: GuestAddress, data: &[u8]);
}

/// Something that answers to a range of ports or addresses. It does its own locking.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from the registers at `offset` in the device's range. `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the registers at `offset` in the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The two address spaces of a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSpace {
    /// I/O ports, 0 to 65535.
    Port,
    /// Physical memory.
    Memory,
}

/// A device and where it answers.
#[derive(Clone)]
pub struct Placement {
    /// What it is, for diagnostics.
    pub name: &'static str,
    /// In which space.
    pub space: AddressSpace,
    /// At which ports or addresses.
    pub range: GuestRange,
    /// The device.
    pub device: Arc<dyn BusDevice>,
}

impl std::fmt::Debug for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {:?} {:#x}+{:#x}", self.name, self.space, self.range.start.0, self.range.len)
    }
}
