//! Memory that disk data comes from or goes to.
//!
//! The host's kernel reads and writes this memory while the guest may do the same, so it is never a Rust slice.
//! This module makes the pointers and is the only one to follow them; everything else passes [`Buffers`] on.

use std::alloc::Layout;
use std::sync::Arc;

use ringfence_memory::{GuestAddress, GuestMemory, host};

/// What a request does with its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data is taken from them: a write to the disk.
    Take,
    /// Data is put into them: a read from the disk. Memory that the guest cannot write to is refused.
    Fill,
}

/// Why guest memory cannot be a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// The range touches an address that holds no memory, or none that a device may write to.
    #[error("a device's buffer at guest physical address {0} is not in memory it may use")]
    NotMemory(GuestAddress),
}

/// Memory of our own with a fixed address and alignment, zeroed at first.
pub struct HostBuffer {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: the memory is plain bytes; races on them are dealt with by the access functions of `host`.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; a `HostBuffer` hands out no references to its memory.
unsafe impl Sync for HostBuffer {}

impl std::fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBuffer({})", self.layout.size())
    }
}

impl HostBuffer {
    /// `len` bytes (at least one is allocated) at a multiple of 4 KiB, which suits direct I/O.
    pub fn new(len: usize) -> Arc<Self> {
        // A power of two and a size that came from an existing request: always a valid layout.
        let layout = Layout::from_size_align(len.max(1), 4096).unwrap_or(Layout::new::<[u8; 4096]>());
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Arc::new(Self { base, layout })
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Never: at least one byte is allocated.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Copies bytes out, as many as there are from `offset` on; returns how many.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        let n = into.len().min(self.len().saturating_sub(offset));
        if let Some(into) = into.get_mut(..n) {
            // SAFETY: `offset + n` does not pass the end of the allocation.
            unsafe { host::copy_from(self.base.wrapping_add(offset), into) };
        }
        n
    }

    /// Copies bytes in, as many as fit from `offset` on; returns how many.
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let n = from.len().min(self.len().saturating_sub(offset));
        if let Some(from) = from.get(..n) {
            // SAFETY: `offset + n` does not pass the end of the allocation.
            unsafe { host::copy_to(from, self.base.wrapping_add(offset)) };
        }
        n
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nothing points to it any more: `Buffers` hold the `Arc`.
        unsafe { std::alloc::dealloc(self.base, self.layout) };
    }
}

#[derive(Clone, Debug)]
enum Owner {
    Guest(Arc<GuestMemory>),
    Host(#[expect(dead_code, reason = "held to keep the memory alive")] Arc<HostBuffer>),
}

/// A contiguous piece of a buffer.
#[derive(Clone, Copy, Debug)]
struct Segment {
    host: *mut u8,
    len: usize,
    /// Where the guest sees it; of no meaning in a [`HostBuffer`].
    guest: GuestAddress,
}

/// Pieces of memory, in order, that a request reads from or writes to. Holding it keeps the memory alive.
#[derive(Clone, Debug)]
pub struct Buffers {
    owner: Owner,
    segments: Vec<Segment>,
    len: u64,
}

// SAFETY: the pointers are to memory of `owner`, which may be used from any thread by the functions of `host`.
unsafe impl Send for Buffers {}
// SAFETY: as above.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// The given pieces of guest memory (address and length in bytes), one after the other.
    ///
    /// # Errors
    /// [`BufferError`] if any byte of them is not in memory, or not in RAM when it is to be filled.
    pub fn guest(
        memory: &Arc<GuestMemory>,
        access: Access,
        pieces: impl IntoIterator<Item = (GuestAddress, u64)>,
    ) -> Result<Self, BufferError> {
        let mut buffers = Self { owner: Owner::Guest(Arc::clone(memory)), segments: Vec::new(), len: 0 };
        for (start, len) in pieces {
            let mut done = 0;
            while done < len {
                let at = start.checked_add(done).ok_or(BufferError::NotMemory(start))?;
                let page = memory.page(at).ok_or(BufferError::NotMemory(at))?;
                if access == Access::Fill && !page.writable {
                    return Err(BufferError::NotMemory(at));
                }
                let n = (len - done).min(0x1000 - at.page_offset());
                let host = page.host.wrapping_add(at.page_offset() as usize);
                buffers.push(Segment { host, len: n as usize, guest: at });
                done += n;
            }
        }
        Ok(buffers)
    }

    /// The first `len` bytes of a buffer of our own.
    pub fn host(buffer: &Arc<HostBuffer>, len: usize) -> Self {
        let len = len.min(buffer.len());
        let segment = Segment { host: buffer.base, len, guest: GuestAddress(0) };
        Self { owner: Owner::Host(Arc::clone(buffer)), segments: vec![segment], len: len as u64 }
    }

    /// Appends a segment, merged with the last one where they touch in both address spaces.
    fn push(&mut self, segment: Segment) {
        self.len += segment.len as u64;
        if let Some(last) = self.segments.last_mut()
            && last.host.wrapping_add(last.len) == segment.host
            && last.guest.checked_add(last.len as u64) == Some(segment.guest)
        {
            last.len += segment.len;
        } else {
            self.segments.push(segment);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` on, cut off at the end.
    pub fn slice(&self, offset: u64, len: u64) -> Self {
        let mut part = Self { owner: self.owner.clone(), segments: Vec::new(), len: 0 };
        self.each(offset, len, |segment| part.push(segment));
        part
    }

    /// Calls `f` with the segments, cut to `len` bytes from `offset` on.
    fn each(&self, offset: u64, len: u64, mut f: impl FnMut(Segment)) {
        let (mut skip, mut left) = (offset, len);
        for segment in &self.segments {
            if left == 0 {
                return;
            }
            if skip >= segment.len as u64 {
                skip -= segment.len as u64;
                continue;
            }
            // `skip` is less than the segment's length, so both fit.
            let n = (segment.len as u64 - skip).min(left);
            f(Segment {
                host: segment.host.wrapping_add(skip as usize),
                len: n as usize,
                guest: GuestAddress(segment.guest.0.wrapping_add(skip)),
            });
            (skip, left) = (0, left - n);
        }
    }

    /// Copies bytes out from `offset` on; returns how many there were.
    pub fn copy_to(&self, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        self.each(offset, into.len() as u64, |segment| {
            if let Some(into) = into.get_mut(done..done + segment.len) {
                // SAFETY: the segment lies in memory that `owner` keeps.
                unsafe { host::copy_from(segment.host, into) };
            }
            done += segment.len;
        });
        done
    }

    /// Copies bytes in from `offset` on; returns how many fitted. Call [`Buffers::written`] before the guest can
    /// know.
    pub fn copy_from(&self, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        self.each(offset, from.len() as u64, |segment| {
            if let Some(from) = from.get(done..done + segment.len) {
                // SAFETY: the segment lies in memory that `owner` keeps, and in RAM if the guest's.
                unsafe { host::copy_to(from, segment.host) };
            }
            done += segment.len;
        });
        done
    }

    /// Fills `len` bytes from `offset` on with zeroes.
    pub fn zero(&self, offset: u64, len: u64) {
        self.each(offset, len, |segment| {
            // SAFETY: the segment lies in memory that `owner` keeps, and in RAM if the guest's.
            unsafe { host::fill(segment.host, 0, segment.len) };
        });
    }

    /// Tells guest memory that these bytes have changed. Disks call it when a read is done, before its callback.
    pub fn written(&self) {
        if let Owner::Guest(memory) = &self.owner {
            for segment in &self.segments {
                memory.notify_written(segment.guest, segment.len as u64);
            }
        }
    }

    /// Whether every segment starts at a multiple of `address` and is a multiple of `len` bytes long (powers of
    /// two), as direct I/O demands.
    pub(crate) fn is_aligned(&self, address: usize, len: usize) -> bool {
        self.segments.iter().all(|s| s.host.addr() & (address - 1) == 0 && s.len & (len - 1) == 0)
    }

    /// The segments from byte `offset` on as the kernel wants them, at most `most` of them.
    pub(crate) fn io_vectors(&self, offset: u64, most: usize) -> Vec<libc::iovec> {
        let mut vectors = Vec::with_capacity(self.segments.len().min(most));
        self.each(offset, u64::MAX, |segment| {
            if vectors.len() < most {
                vectors.push(libc::iovec { iov_base: segment.host.cast(), iov_len: segment.len });
            }
        });
        vectors
    }
}

#[cfg(test)]
mod tests {
    use ringfence_memory::{GuestRange, RegionKind, RegionSpec};

    use super::*;

    fn memory() -> Arc<GuestMemory> {
        let spec = |start, kind| RegionSpec { range: GuestRange::new(start, 0x4000), kind };
        Arc::new(GuestMemory::new(&[spec(0, RegionKind::Ram), spec(0x4000, RegionKind::Rom)]).unwrap())
    }

    #[test]
    fn contiguous_pages_become_one_segment() {
        let at = GuestAddress;
        let pieces = [(at(0x800), 0x800), (at(0x1000), 0x1000), (at(0x3000), 0x10)];
        let buffers = Buffers::guest(&memory(), Access::Fill, pieces).unwrap();
        assert_eq!(buffers.len(), 0x1810);
        let lens: Vec<_> = buffers.io_vectors(0, 1024).iter().map(|v| v.iov_len).collect();
        assert_eq!(lens, [0x1800, 0x10]);
        assert_eq!(buffers.io_vectors(0x1700, 1024).len(), 2);
        assert_eq!(buffers.slice(0x1700, 0x108).io_vectors(0, 9).last().unwrap().iov_len, 8);
        assert!(buffers.is_aligned(512, 16) && !buffers.is_aligned(4096, 16) && !buffers.is_aligned(16, 32));
    }

    #[test]
    fn holes_and_rom_are_refused() {
        let memory = memory();
        let make = |access, start, len| Buffers::guest(&memory, access, [(GuestAddress(start), len)]);
        assert_eq!(
            make(Access::Fill, 0x3ff0, 0x11).unwrap_err(),
            BufferError::NotMemory(GuestAddress(0x4000))
        );
        assert!(make(Access::Take, 0x3ff0, 0x11).is_ok());
        assert_eq!(
            make(Access::Take, 0x7ff0, 0x11).unwrap_err(),
            BufferError::NotMemory(GuestAddress(0x8000))
        );
        assert!(make(Access::Take, u64::MAX - 1, 8).is_err());
    }

    #[test]
    fn copies_scatter_and_gather() {
        let memory = memory();
        let pieces = [(GuestAddress(0xffe), 3), (GuestAddress(0x2000), 3)];
        let buffers = Buffers::guest(&memory, Access::Fill, pieces).unwrap();
        assert_eq!(buffers.copy_from(1, b"abcdefgh"), 5);
        let mut back = [0xff; 8];
        assert_eq!(buffers.copy_to(0, &mut back), 6);
        assert_eq!(&back, b"\0abcde\xff\xff");
        assert_eq!(memory.read::<u8>(GuestAddress(0x2001)).unwrap(), b'd');
        buffers.zero(3, 2);
        buffers.copy_to(0, &mut back);
        assert_eq!(&back[..6], b"\0ab\0\0e");
    }
}
