//! The guest's physical memory as a whole.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::mapping::Mapping;
use crate::{GuestAddress, GuestRange, MemoryError, Scalar, host};

/// Told when a device or the boot loader writes to a page that holds decoded guest code.
pub trait CodeObserver: Send + Sync {
    /// `len` bytes from `address`, all in one page, were written.
    fn code_written(&self, address: GuestAddress, len: u64);
}

/// Told of every write that does not go through a vCPU's fast path: those of devices, of the boot loader, and those that
/// a page walk makes to the tables. For tools that follow the contents of memory; there is none in an ordinary run.
pub trait WriteObserver: Send + Sync {
    /// `len` bytes from `address` have been written.
    fn written(&self, address: GuestAddress, len: u64);
}

/// What a region answers to writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Reads and writes.
    Ram,
    /// Guest writes are dropped; the host can fill it.
    Rom,
}

/// A region to be made.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Where it lies; start and length are multiples of 4 KiB.
    pub range: GuestRange,
    /// What it answers to writes.
    pub kind: RegionKind,
}

struct Region {
    range: GuestRange,
    kind: RegionKind,
    mapping: Mapping,
    /// One byte per page; see [`CODE`].
    flags: Box<[AtomicU8]>,
}

/// The page holds decoded code.
const CODE: u8 = 1;

/// A guest page as the host sees it.
#[derive(Clone, Copy, Debug)]
pub struct HostPage {
    /// Host address of its first byte, valid for 4096 bytes while the [`GuestMemory`] lives.
    pub host: *mut u8,
    /// Whether the guest may write to it.
    pub writable: bool,
    /// Whether it is marked as holding decoded code.
    pub code: bool,
}

/// All of a machine's physical memory. Shared between vCPUs and devices behind an [`Arc`].
pub struct GuestMemory {
    regions: Vec<Region>,
    observer: OnceLock<Arc<dyn CodeObserver>>,
    write_observer: OnceLock<Arc<dyn WriteObserver>>,
    a20_mask: AtomicU64,
    /// Grows whenever what an address means has changed; soft TLBs are stale then.
    generation: AtomicU64,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|r| (r.range, r.kind))).finish()
    }
}

impl GuestMemory {
    /// Maps the given regions, zeroed.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`] if one is empty, unaligned or overlaps another; [`MemoryError::Map`] if the
    /// host has not enough address space.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        let mut regions: Vec<Region> = Vec::with_capacity(specs.len());
        for spec in specs {
            let GuestRange { start, len } = spec.range;
            let bad = len == 0
                || (start.0 | len) & 0xfff != 0
                || start.checked_add(len).is_none()
                || regions.iter().any(|r| r.range.overlaps(&spec.range));
            if bad {
                return Err(MemoryError::BadRegion { start, len });
            }
            let flags = (0..len >> 12).map(|_| AtomicU8::new(0)).collect();
            regions.push(Region {
                range: spec.range,
                kind: spec.kind,
                mapping: Mapping::anonymous(len)?,
                flags,
            });
        }
        regions.sort_by_key(|r| r.range.start);
        Ok(Self {
            regions,
            observer: OnceLock::new(),
            write_observer: OnceLock::new(),
            a20_mask: AtomicU64::new(!0),
            generation: AtomicU64::new(0),
        })
    }

    /// Memory of `size` bytes from address 0, for tests and small guests.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn flat(size: u64) -> Result<Self, MemoryError> {
        Self::new(&[RegionSpec { range: GuestRange::new(0, size), kind: RegionKind::Ram }])
    }

    /// Registers who is told of writes to code pages.
    ///
    /// # Panics
    /// If somebody is registered already: two engines on one memory are a bug of the caller.
    pub fn set_code_observer(&self, observer: Arc<dyn CodeObserver>) {
        assert!(self.observer.set(observer).is_ok(), "guest memory already has a code observer");
    }

    /// Registers who is told of every write but those of the vCPUs' fast path.
    ///
    /// # Panics
    /// If somebody is registered already.
    pub fn set_write_observer(&self, observer: Arc<dyn WriteObserver>) {
        assert!(self.write_observer.set(observer).is_ok(), "guest memory already has a write observer");
    }

    /// What this memory was made from.
    pub fn specs(&self) -> Vec<RegionSpec> {
        self.regions.iter().map(|r| RegionSpec { range: r.range, kind: r.kind }).collect()
    }

    /// The ranges that hold RAM, in ascending order.
    pub fn ram(&self) -> impl Iterator<Item = GuestRange> + '_ {
        self.regions.iter().filter(|r| r.kind == RegionKind::Ram).map(|r| r.range)
    }

    /// Total bytes of RAM.
    pub fn ram_size(&self) -> u64 {
        self.ram().map(|r| r.len).sum()
    }

    /// There are few regions, so asking each beats any search.
    #[inline]
    fn region(&self, address: GuestAddress) -> Option<&Region> {
        self.regions.iter().find(|r| address.0.wrapping_sub(r.range.start.0) < r.range.len)
    }

    /// The host page behind a guest page, or `None` in a hole.
    #[inline]
    pub fn page(&self, address: GuestAddress) -> Option<HostPage> {
        let region = self.region(address)?;
        let offset = address.page().0 - region.range.start.0;
        let code = region.flags[(offset >> 12) as usize].load(Ordering::Acquire) & CODE != 0;
        // The region is page-aligned and holds `address`, so the whole page lies inside the mapping.
        let host = region.mapping.base().wrapping_add(offset as usize);
        Some(HostPage { host, writable: region.kind == RegionKind::Ram, code })
    }

    /// Marks or unmarks a page as holding decoded code. No effect in a hole.
    pub fn set_code_page(&self, address: GuestAddress, code: bool) {
        if let Some(region) = self.region(address) {
            let flag = &region.flags[((address.0 - region.range.start.0) >> 12) as usize];
            if code {
                flag.fetch_or(CODE, Ordering::AcqRel);
            } else {
                flag.fetch_and(!CODE, Ordering::AcqRel);
            }
        }
    }

    /// The mask that every guest physical address passes through: all ones, or bit 20 clear while the A20
    /// gate is closed.
    #[inline]
    pub fn a20_mask(&self) -> u64 {
        self.a20_mask.load(Ordering::Acquire)
    }

    /// Opens or closes the A20 gate.
    pub fn set_a20(&self, open: bool) {
        let mask = if open { !0 } else { !(1 << 20) };
        if self.a20_mask.swap(mask, Ordering::AcqRel) != mask {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Grows whenever the meaning of a physical address has changed, so that cached translations are stale.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Calls `f` with the region, the offset in it, the bytes done before and the length of each contiguous
    /// piece of a range. Checks the whole range first, so that a failed access has no effect.
    fn pieces(
        &self,
        address: GuestAddress,
        len: u64,
        mut f: impl FnMut(&Region, u64, usize, usize),
    ) -> Result<(), MemoryError> {
        let out_of_range = || MemoryError::OutOfRange { address, len };
        address.checked_add(len).ok_or_else(out_of_range)?;
        let piece = |done: u64| {
            let at = GuestAddress(address.0 + done);
            let region = self.region(at).ok_or_else(out_of_range)?;
            Ok((region, at.0 - region.range.start.0, (region.range.end() - at.0).min(len - done)))
        };
        let mut done = 0;
        while done < len {
            done += piece(done)?.2;
        }
        done = 0;
        while done < len {
            let (region, offset, n) = piece(done)?;
            f(region, offset, done as usize, n as usize);
            done += n;
        }
        Ok(())
    }

    /// Whether every byte of a range is in guest memory, and with `write` in RAM. True of no bytes at all.
    pub fn holds(&self, address: GuestAddress, len: u64, write: bool) -> bool {
        let Some(end) = address.checked_add(len) else { return false };
        let mut at = address;
        while at < end {
            match self.region(at) {
                Some(region) if !write || region.kind == RegionKind::Ram => {
                    at = GuestAddress(region.range.end());
                }
                _ => return false,
            }
        }
        true
    }

    /// Copies guest memory into `into`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte is in a hole; `into` is untouched then.
    pub fn read_bytes(&self, address: GuestAddress, into: &mut [u8]) -> Result<(), MemoryError> {
        self.pieces(address, into.len() as u64, |region, offset, done, n| {
            // SAFETY: `pieces` keeps offset and length inside the region's mapping.
            unsafe { host::copy_from(region.mapping.base().add(offset as usize), &mut into[done..done + n]) };
        })
    }

    /// Copies `from` into guest memory, ROM included, and tells the code observer.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte is in a hole; guest memory is untouched then.
    pub fn write_bytes(&self, address: GuestAddress, from: &[u8]) -> Result<(), MemoryError> {
        self.pieces(address, from.len() as u64, |region, offset, done, n| {
            // SAFETY: `pieces` keeps offset and length inside the region's mapping.
            unsafe { host::copy_to(&from[done..done + n], region.mapping.base().add(offset as usize)) };
            self.notify(region, offset, n as u64);
        })
    }

    /// Fills guest memory with one byte, as [`GuestMemory::write_bytes`] would.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte is in a hole; guest memory is untouched then.
    pub fn fill(&self, address: GuestAddress, byte: u8, len: u64) -> Result<(), MemoryError> {
        self.pieces(address, len, |region, offset, _, n| {
            // SAFETY: `pieces` keeps offset and length inside the region's mapping.
            unsafe { host::fill(region.mapping.base().add(offset as usize), byte, n) };
            self.notify(region, offset, n as u64);
        })
    }

    /// Gives the host back the memory behind the whole pages of a range of RAM, which read as zeroes afterwards. What
    /// is not RAM, and what the host does not take, stays as it is. Returns how many bytes went back. Tells the code
    /// observer.
    pub fn release(&self, address: GuestAddress, len: u64) -> u64 {
        let first = address.0.saturating_add(0xfff) & !0xfff;
        let last = address.0.saturating_add(len) & !0xfff;
        let mut released = 0;
        for region in self.regions.iter().filter(|region| region.kind == RegionKind::Ram) {
            let (start, end) = (region.range.start.0.max(first), region.range.end().min(last));
            if start >= end {
                continue;
            }
            let offset = start - region.range.start.0;
            if region.mapping.release(offset as usize, (end - start) as usize) {
                released += end - start;
                self.notify(region, offset, end - start);
            }
        }
        released
    }

    /// Reads one little-endian integer; aligned ones are atomic.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte is in a hole.
    #[inline]
    pub fn read<T: Scalar>(&self, address: GuestAddress) -> Result<T, MemoryError> {
        if let Some(region) = self.region(address)
            && address.0 - region.range.start.0 <= region.range.len - T::SIZE as u64
        {
            let offset = (address.0 - region.range.start.0) as usize;
            // SAFETY: the whole access lies inside the region's mapping, as just checked.
            return Ok(unsafe { T::load(region.mapping.base().add(offset)) });
        }
        let mut bytes = [0; 8];
        self.read_bytes(address, &mut bytes[..T::SIZE])?;
        Ok(T::truncate(u64::from_le_bytes(bytes)))
    }

    /// Writes one little-endian integer; aligned ones are atomic. Tells the code observer.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte is in a hole.
    pub fn write<T: Scalar>(&self, address: GuestAddress, value: T) -> Result<(), MemoryError> {
        if let Some(region) = self.region(address)
            && region.range.contains(address, T::SIZE as u64)
        {
            let offset = address.0 - region.range.start.0;
            // SAFETY: the whole access lies inside the region's mapping, as just checked.
            unsafe { value.store(region.mapping.base().add(offset as usize)) };
            self.notify(region, offset, T::SIZE as u64);
            return Ok(());
        }
        self.write_bytes(address, &value.widen().to_le_bytes()[..T::SIZE])
    }

    /// Tells the observer that a device or the host's kernel has written `len` bytes from `address` through the
    /// host addresses of [`GuestMemory::page`]. Call it when the bytes are there and before the guest can know.
    /// Parts in a hole are left out.
    pub fn notify_written(&self, address: GuestAddress, len: u64) {
        let end = address.0.saturating_add(len);
        for region in &self.regions {
            let (start, stop) = (region.range.start.0.max(address.0), region.range.end().min(end));
            if start < stop {
                self.notify(region, start - region.range.start.0, stop - start);
            }
        }
    }

    /// Tells the write observer that a page walk has changed `len` bytes from `address`.
    pub fn note_walk(&self, address: GuestAddress, len: u64) {
        if let Some(observer) = self.write_observer.get() {
            observer.written(address, len);
        }
    }

    /// Tells the code observer of each marked page in a range of a region, and the write observer of it all.
    fn notify(&self, region: &Region, offset: u64, len: u64) {
        if let Some(observer) = self.write_observer.get() {
            observer.written(GuestAddress(region.range.start.0 + offset), len);
        }
        let Some(observer) = self.observer.get() else { return };
        let mut at = offset;
        while at < offset + len {
            let page_end = (at | 0xfff) + 1;
            let n = page_end.min(offset + len) - at;
            if region.flags[(at >> 12) as usize].load(Ordering::Acquire) & CODE != 0 {
                observer.code_written(GuestAddress(region.range.start.0 + at), n);
            }
            at += n;
        }
    }
}

#[cfg(test)]
mod tests;
