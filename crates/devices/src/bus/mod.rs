//! The system bus: which device answers to an address.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ringfence_engine::{AddressSpace, Bus, BusDevice, Placement};
use ringfence_memory::GuestAddress;

use crate::device::ports;
use crate::platform::{DELAY_PORT, POST_PORT};

#[cfg(test)]
mod tests;

/// Why a device cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Two devices would answer to the same address.
    #[error("{new} would collide with {old}; move one of them")]
    Overlap {
        /// The placement that was refused.
        new: String,
        /// The one that is there.
        old: String,
    },
    /// The range is empty or reaches past the end of its space.
    #[error("{0} is empty or reaches past the end of its address space")]
    BadRange(String),
    /// Nothing is placed there.
    #[error("no device starts at {start} in {space:?} space")]
    NotPlaced {
        /// In which space.
        space: AddressSpace,
        /// The address asked for.
        start: GuestAddress,
    },
}

/// The devices of one space, in ascending order. Never changed once published.
type Table = Vec<Placement>;

/// Routes accesses to devices. An access works on a snapshot of the placements and holds no lock while the
/// device acts, so a device may move others (as a write to a PCI base address register does).
///
/// An access that lies inside one device reaches it whole. One that straddles devices or gaps is split into
/// naturally aligned pieces of 1, 2, 4… bytes; pieces that nobody claims read as ones.
#[derive(Debug)]
pub struct SystemBus {
    ports: RwLock<Arc<Table>>,
    memory: RwLock<Arc<Table>>,
    unclaimed: AtomicU64,
}

impl SystemBus {
    /// A bus with these devices on it.
    ///
    /// # Errors
    /// [`BusError`] if two of them overlap or a range is not valid.
    pub fn new(placements: impl IntoIterator<Item = Placement>) -> Result<Self, BusError> {
        let bus = Self { ports: RwLock::default(), memory: RwLock::default(), unclaimed: AtomicU64::new(0) };
        for placement in placements {
            bus.insert(placement)?;
        }
        Ok(bus)
    }

    fn space(&self, space: AddressSpace) -> &RwLock<Arc<Table>> {
        match space {
            AddressSpace::Port => &self.ports,
            AddressSpace::Memory => &self.memory,
        }
    }

    fn snapshot(&self, space: AddressSpace) -> Arc<Table> {
        Arc::clone(&self.space(space).read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes a copy of a space's table and publishes it if that worked. Accesses under way keep the old one.
    fn change<R>(
        &self,
        space: AddressSpace,
        f: impl FnOnce(&mut Table) -> Result<R, BusError>,
    ) -> Result<R, BusError> {
        let mut slot = self.space(space).write().unwrap_or_else(PoisonError::into_inner);
        let mut table = slot.as_ref().clone();
        let result = f(&mut table)?;
        *slot = Arc::new(table);
        Ok(result)
    }

    /// Places a device.
    ///
    /// # Errors
    /// [`BusError`] if it overlaps another or its range is not valid; nothing has changed then.
    pub fn insert(&self, placement: Placement) -> Result<(), BusError> {
        self.change(placement.space, |table| insert(table, placement))
    }

    /// Takes away the device that starts at `start`.
    ///
    /// # Errors
    /// [`BusError::NotPlaced`] if none does.
    pub fn remove(&self, space: AddressSpace, start: GuestAddress) -> Result<Placement, BusError> {
        self.change(space, |table| remove(table, space, start))
    }

    /// Moves the device that starts at `from` to `to`, in one step.
    ///
    /// # Errors
    /// [`BusError`] if there is none, or no room for it; it stays where it was then.
    pub fn relocate(
        &self,
        space: AddressSpace,
        from: GuestAddress,
        to: GuestAddress,
    ) -> Result<(), BusError> {
        self.change(space, |table| {
            let mut placement = remove(table, space, from)?;
            placement.range.start = to;
            insert(table, placement)
        })
    }

    /// What is placed in a space, in ascending order.
    pub fn placements(&self, space: AddressSpace) -> Vec<Placement> {
        self.snapshot(space).as_ref().clone()
    }

    /// How many accesses, or pieces of one, nobody answered to.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// Calls `f` with each piece of an access: the device and offset in it if one answers, and the piece's place
    /// in the data.
    fn pieces(
        &self,
        space: AddressSpace,
        address: u64,
        len: usize,
        mut f: impl FnMut(Option<(&dyn BusDevice, u64)>, std::ops::Range<usize>),
    ) {
        let table = self.snapshot(space);
        let mut done = 0;
        while done < len {
            let rest = (len - done) as u64;
            let Some(at) = address.checked_add(done as u64) else {
                return f(None, done..len);
            };
            let after = table.partition_point(|p| p.range.start.0 <= at);
            let here = after.checked_sub(1).and_then(|i| table.get(i)).filter(|p| at < p.range.end());
            let end = match here {
                Some(placement) => placement.range.end(),
                None => table.get(after).map_or(u64::MAX, |p| p.range.start.0),
            };
            let mut n = rest.min(end - at);
            if n < len as u64 {
                n = natural(at, n);
            }
            // `n` can only be 0 at the very last address of the space, where nothing can be placed.
            let n = n.max(1) as usize;
            if here.is_none() {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
            f(here.map(|p| (p.device.as_ref(), at - p.range.start.0)), done..done + n);
            done += n;
        }
    }

    fn read(&self, space: AddressSpace, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.pieces(space, address, data.len(), |device, part| {
            if let (Some((device, offset)), Some(data)) = (device, data.get_mut(part)) {
                device.read(offset, data);
            }
        });
    }

    fn write(&self, space: AddressSpace, address: u64, data: &[u8]) {
        self.pieces(space, address, data.len(), |device, part| {
            if let (Some((device, offset)), Some(data)) = (device, data.get(part)) {
                device.write(offset, data);
            }
        });
    }
}

/// The longest power of two that `len` bytes from `address` can begin with, aligned to itself.
fn natural(address: u64, len: u64) -> u64 {
    let fits = 1 << len.max(1).ilog2();
    if address == 0 { fits } else { fits.min(1 << address.trailing_zeros()) }
}

fn insert(table: &mut Table, new: Placement) -> Result<(), BusError> {
    let limit = match new.space {
        AddressSpace::Port => 1 << 16,
        AddressSpace::Memory => u64::MAX,
    };
    let end = new.range.start.0.checked_add(new.range.len);
    if new.range.len == 0 || end.is_none_or(|end| end > limit) {
        return Err(BusError::BadRange(format!("{new:?}")));
    }
    if let Some(old) = table.iter().find(|p| p.range.overlaps(&new.range)) {
        return Err(BusError::Overlap { new: format!("{new:?}"), old: format!("{old:?}") });
    }
    let at = table.partition_point(|p| p.range.start < new.range.start);
    table.insert(at, new);
    Ok(())
}

fn remove(table: &mut Table, space: AddressSpace, start: GuestAddress) -> Result<Placement, BusError> {
    match table.binary_search_by_key(&start, |p| p.range.start) {
        Ok(at) => Ok(table.remove(at)),
        Err(_) => Err(BusError::NotPlaced { space, start }),
    }
}

impl Bus for SystemBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.read(AddressSpace::Port, u64::from(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.write(AddressSpace::Port, u64::from(port), data);
    }

    fn memory_read(&self, address: GuestAddress, data: &mut [u8]) {
        self.read(AddressSpace::Memory, address.0, data);
    }

    fn memory_write(&self, address: GuestAddress, data: &[u8]) {
        self.write(AddressSpace::Memory, address.0, data);
    }
}

struct Nothing;

impl BusDevice for Nothing {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {}
}

/// The ports that software writes to only to wait or to show a progress code: accepted, without effect.
pub fn delay_ports() -> Vec<Placement> {
    let nothing = Arc::new(Nothing);
    vec![ports("post", POST_PORT, 1, Arc::clone(&nothing) as _), ports("delay", DELAY_PORT, 1, nothing)]
}
