//! A host mapping that backs one region.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::MemoryError;

/// A mapping, freed on drop. Its address is stable.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut u8,
    size: usize,
}

// SAFETY: the mapping is plain memory reachable from any thread; races on its contents are dealt with by the
// access functions of `host`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` hands out raw pointers only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes (page-aligned, not zero) of zeroed memory, committed on first touch and backed by
    /// transparent huge pages where the host has them.
    pub(crate) fn anonymous(size: u64) -> Result<Self, MemoryError> {
        let fail = |source| MemoryError::Map { size, source };
        let bytes =
            usize::try_from(size).map_err(|_| fail(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(fail(std::io::Error::last_os_error()));
        }
        // SAFETY: advice on our own mapping; failure (no huge pages on this host) changes nothing.
        unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        Ok(Self { base: base.cast(), size: bytes })
    }

    /// Maps the first `size` bytes (not zero) of `file`, which is memory that others may have mapped too.
    pub(crate) fn shared(file: BorrowedFd<'_>, size: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), size })
    }

    /// Gives the host back what backs `len` bytes from `offset`, both multiples of 4096 and inside the mapping: they
    /// read as zeroes then, and take no memory until they are written to again. Returns whether the host did so.
    pub(crate) fn release(&self, offset: usize, len: usize) -> bool {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        if !inside || (offset | len) & 0xfff != 0 {
            return false;
        }
        // SAFETY: the range is inside our own mapping, which nothing refers to but through the access functions of
        // `host`; for them it is as if somebody had written zeroes.
        unsafe { libc::madvise(self.base.wrapping_add(offset).cast(), len, libc::MADV_DONTNEED) == 0 }
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and size are those of our own live mapping.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}
