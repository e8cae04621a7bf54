//! What all devices have in common.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringfence_engine::{AddressSpace, BusDevice, IrqLine, Placement, StateError, Stateful};
use ringfence_memory::GuestRange;

/// A device as the machine handles it: placed on the bus, reset, saved and restored.
pub trait Device: Stateful {
    /// Where it answers.
    fn placements(self: Arc<Self>) -> Vec<Placement>;
    /// Acts on the machine's reset line. What survives a reset in a PC (the time of day, CMOS memory) survives.
    fn reset(&self);
}

/// Locks a device's state. A panic elsewhere while it was held leaves plain register values, which are usable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A placement of `len` ports from `base`; the device sees offsets from `base`.
pub(crate) fn ports(name: &'static str, base: u16, len: u16, device: Arc<dyn BusDevice>) -> Placement {
    let range = GuestRange::new(u64::from(base), u64::from(len));
    Placement { name, space: AddressSpace::Port, range, device }
}

/// A further range of a device whose registers lie apart: the device sees offsets from `first`, its first port.
pub(crate) fn more_ports(
    name: &'static str,
    base: u16,
    len: u16,
    device: Arc<dyn BusDevice>,
    first: u16,
) -> Placement {
    ports(name, base, len, Arc::new(Window { device, by: u64::from(base - first) }))
}

struct Window {
    device: Arc<dyn BusDevice>,
    by: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read(self.by + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.device.write(self.by + offset, data);
    }
}

/// Reads byte-wide registers one after the other, as an 8-bit device on a wider bus is read.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (byte, offset) in data.iter_mut().zip(offset..) {
        *byte = register(offset);
    }
}

/// Writes byte-wide registers one after the other.
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8)) {
    for (byte, offset) in data.iter().zip(offset..) {
        register(offset, *byte);
    }
}

/// The error of a saved field that no device can have.
pub(crate) fn invalid(name: &str, what: impl Into<String>) -> StateError {
    StateError::Invalid { name: name.to_owned(), what: what.into() }
}

/// An interrupt line that a device works out anew after every access, driven only when its level changes.
/// Used with the device locked.
pub(crate) struct Wire {
    line: IrqLine,
    level: AtomicBool,
}

impl Wire {
    /// A line that is low.
    pub(crate) fn new(line: IrqLine) -> Self {
        Self { line, level: AtomicBool::new(false) }
    }

    pub(crate) fn set(&self, level: bool) {
        if self.level.swap(level, Ordering::Relaxed) != level {
            self.line.set(level);
        }
    }

    /// After a restore, when the other end may have been at any level.
    pub(crate) fn drive(&self, level: bool) {
        self.level.store(level, Ordering::Relaxed);
        self.line.set(level);
    }
}
