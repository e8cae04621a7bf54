//! Split virtqueues (2.7): taking descriptor chains and giving them back, all by copies out of guest memory.

use std::sync::atomic::{Ordering, fence};

use ringfence_memory::{GuestAddress, GuestMemory, Scalar};
use serde::{Deserialize, Serialize};

use super::spec::{NO_INTERRUPT, NO_VECTOR, descriptor};

/// Descriptors of a table at most; a chain outside one cannot be longer than its queue.
const MAX_CHAIN: u32 = 1024;

/// A rule that the driver broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("a queue's rings are not aligned memory that the device may use")]
    Rings,
    #[error("a queue's size is not a power of two up to what the device has")]
    QueueSize,
    #[error("a queue's available index is further on than the queue is long")]
    AvailableIndex,
    #[error("a descriptor index is past the end of its table")]
    DescriptorIndex,
    #[error("a descriptor chain is longer than it may be, or a loop")]
    LongChain,
    #[error("a descriptor chain has 4 GiB or more")]
    TooMuch,
    #[error("a buffer is not in memory that the device may use")]
    Buffer,
    #[error("a buffer to be read follows one to be written")]
    Order,
    #[error("a table of indirect descriptors is not allowed there or has a wrong length")]
    Indirect,
    #[error("a queue was enabled, or the driver was ready, before features were agreed on")]
    TooEarly,
    #[error("{0}")]
    Device(&'static str),
}

/// A piece of guest memory: address and length in bytes, not zero.
pub type Piece = (GuestAddress, u64);

/// What a chain of descriptors describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pieces {
    pub(super) readable: Vec<Piece>,
    pub(super) writable: Vec<Piece>,
}

/// A queue's registers and the device's place in its rings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Queue {
    /// Entries, at most.
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    /// The driver's ring: what is available.
    pub(super) driver: u64,
    /// The device's ring: what is used.
    pub(super) device: u64,
    /// The next entry of the driver's ring to take.
    pub(super) next_available: u16,
    /// The next entry of the device's ring to fill.
    pub(super) next_used: u16,
    /// Chains taken and not given back.
    #[serde(skip)]
    pub(super) in_flight: u32,
    /// A reset waits for what is in flight.
    #[serde(skip)]
    pub(super) resetting: bool,
    /// Chains given back of which the driver is to be told later.
    #[serde(skip)]
    pub(super) untold: u16,
}

struct Descriptor {
    address: GuestAddress,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: u64, index: u16) -> Result<Self, Broken> {
        let at = table.checked_add(u64::from(index) * descriptor::SIZE).ok_or(Broken::Buffer)?;
        let mut bytes = [0; descriptor::SIZE as usize];
        memory.read_bytes(GuestAddress(at), &mut bytes).map_err(|_| Broken::Buffer)?;
        let number = u128::from_le_bytes(bytes);
        Ok(Self {
            address: GuestAddress(number as u64),
            len: (number >> 64) as u32,
            flags: (number >> 96) as u16,
            next: (number >> 112) as u16,
        })
    }

    fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

impl Pieces {
    fn add(&mut self, memory: &GuestMemory, part: &Descriptor) -> Result<(), Broken> {
        let write = part.is(descriptor::WRITE);
        if !write && !self.writable.is_empty() {
            return Err(Broken::Order);
        }
        let len = u64::from(part.len);
        if !memory.holds(part.address, len, write) {
            return Err(Broken::Buffer);
        }
        let to = if write { &mut self.writable } else { &mut self.readable };
        // A buffer of no bytes is of no use, and no harm either.
        if len > 0 {
            to.push((part.address, len));
        }
        Ok(())
    }
}

impl Queue {
    /// A queue of at most `max` entries, a power of two up to 32768, as after a reset.
    pub(super) fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
            in_flight: 0,
            resetting: false,
            untold: 0,
        }
    }

    /// Whether its registers describe a queue that can be.
    pub(super) fn check(&self, memory: &GuestMemory) -> Result<(), Broken> {
        if !self.size.is_power_of_two() || self.size > self.max {
            return Err(Broken::QueueSize);
        }
        let size = u64::from(self.size);
        let fits = |base: u64, align: u64, len: u64, write| {
            base.is_multiple_of(align) && memory.holds(GuestAddress(base), len, write)
        };
        let rings = fits(self.descriptors, 16, size * descriptor::SIZE, false)
            && fits(self.driver, 2, 6 + size * 2, false)
            && fits(self.device, 4, 6 + size * 8, true);
        if rings { Ok(()) } else { Err(Broken::Rings) }
    }

    /// Reads from the driver's ring. Rings were checked when the queue was enabled, so this does not fail.
    fn load(&self, memory: &GuestMemory, offset: u64) -> Result<u16, Broken> {
        memory.read(GuestAddress(self.driver.wrapping_add(offset))).map_err(|_| Broken::Rings)
    }

    /// Writes to the device's ring.
    fn store<T: Scalar>(&self, memory: &GuestMemory, offset: u64, value: T) -> Result<(), Broken> {
        memory.write(GuestAddress(self.device.wrapping_add(offset)), value).map_err(|_| Broken::Rings)
    }

    /// The entry of a ring that a counter leads to.
    fn entry(&self, counter: u16) -> u64 {
        u64::from(counter & self.size.wrapping_sub(1))
    }

    /// How many chains are available.
    fn available(&self, memory: &GuestMemory) -> Result<u16, Broken> {
        let count = self.load(memory, 2)?.wrapping_sub(self.next_available);
        if count > self.size { Err(Broken::AvailableIndex) } else { Ok(count) }
    }

    /// Whether a chain is available.
    pub(super) fn has_chains(&self, memory: &GuestMemory) -> Result<bool, Broken> {
        Ok(self.available(memory)? > 0)
    }

    /// Takes the next chain: its head and what it describes.
    pub(super) fn take(
        &mut self,
        memory: &GuestMemory,
        indirect: bool,
        events: bool,
    ) -> Result<Option<(u16, Pieces)>, Broken> {
        if self.available(memory)? == 0 {
            if !events {
                return Ok(None);
            }
            // Ask to be told of the next one, then look again: it may have come in between (2.7.7.2, 2.7.10).
            self.store(memory, 4 + u64::from(self.size) * 8, self.next_available)?;
            fence(Ordering::SeqCst);
            if self.available(memory)? == 0 {
                return Ok(None);
            }
        }
        let head = self.load(memory, 4 + self.entry(self.next_available) * 2)?;
        let pieces = self.pieces(memory, head, indirect)?;
        self.next_available = self.next_available.wrapping_add(1);
        self.in_flight += 1;
        Ok(Some((head, pieces)))
    }

    /// Reads a chain, once.
    fn pieces(&self, memory: &GuestMemory, head: u16, indirect: bool) -> Result<Pieces, Broken> {
        let mut pieces = Pieces::default();
        let (mut table, mut entries, mut index) = (self.descriptors, self.size, head);
        let (mut inside, mut count, mut total) = (false, 0, 0_u64);
        loop {
            if index >= entries {
                return Err(Broken::DescriptorIndex);
            }
            // No chain without a loop has more than there are.
            count += 1;
            if count > entries {
                return Err(Broken::LongChain);
            }
            let part = Descriptor::read(memory, table, index)?;
            if part.is(descriptor::INDIRECT) {
                let length = part.len / descriptor::SIZE as u32;
                let whole =
                    part.len.is_multiple_of(descriptor::SIZE as u32) && (1..=MAX_CHAIN).contains(&length);
                // A table comes last and has none inside (2.7.5.3.1).
                if !indirect || inside || !whole || part.is(descriptor::NEXT) {
                    return Err(Broken::Indirect);
                }
                (table, entries, index, inside, count) = (part.address.0, length as u16, 0, true, 0);
                continue;
            }
            pieces.add(memory, &part)?;
            total += u64::from(part.len);
            if total > u64::from(u32::MAX) {
                return Err(Broken::TooMuch);
            }
            if !part.is(descriptor::NEXT) {
                return Ok(pieces);
            }
            index = part.next;
        }
    }

    /// Gives chains back: heads and how many bytes were written to each. Returns whether to tell the driver.
    pub(super) fn put(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
        events: bool,
    ) -> Result<bool, Broken> {
        for (head, written) in chains {
            let element = u64::from(*written) << 32 | u64::from(*head);
            self.store(memory, 4 + self.entry(self.next_used) * 8, element)?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        self.store(memory, 2, self.next_used)?;
        // The driver says that it wants to be told, then looks at the index; here it is the other way round.
        fence(Ordering::SeqCst);
        if !events {
            return Ok(self.load(memory, 0)? & NO_INTERRUPT == 0);
        }
        let wanted = self.load(memory, 4 + u64::from(self.size) * 2)?;
        // Whether the wanted entry is among those filled just now (2.7.7.2).
        let count = chains.len() + usize::from(std::mem::take(&mut self.untold));
        Ok(usize::from(self.next_used.wrapping_sub(wanted).wrapping_sub(1)) < count)
    }

    /// Whether to tell the driver of chains given back before, unless it has found them meanwhile. Without events it is told at once,
    /// so that none are left.
    pub(super) fn remind(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        if self.untold == 0 {
            return Ok(false);
        }
        self.put(memory, &[], true)
    }

    /// Gives a chain back of which the driver is to be told later, which needs events.
    pub(super) fn put_untold(&mut self, memory: &GuestMemory, chain: (u16, u32)) -> Result<(), Broken> {
        let before = self.untold;
        self.put(memory, &[chain], true)?;
        // More than the ring has entries are never untold.
        self.untold = before.saturating_add(1).min(self.size);
        Ok(())
    }
}
