//! Memory that is shared with another process, which is not trusted.
//!
//! It is a memfd that can neither shrink nor grow, so no page of a mapping can go away under its reader and end that with a
//! SIGBUS. What is in it changes at any moment: every access is one instruction of [`host`], or a copy, and what has been
//! read is the reader's own. Nothing that is read twice is the same.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use crate::mapping::Mapping;
use crate::{Scalar, host};

/// What a file must have before it is mapped.
const FIXED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Memory that cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The host's refusal.
    #[error("the host gives no memory to share with another process")]
    Host(#[from] io::Error),
    /// Another process could take it away.
    #[error("shared memory that is not sealed against shrinking and growing")]
    NotSealed,
    /// It is not what was agreed on.
    #[error("shared memory of {is} bytes in place of {wanted}")]
    Size {
        /// Bytes that it has.
        is: u64,
        /// Bytes that it should have.
        wanted: usize,
    },
}

impl From<rustix::io::Errno> for SharedError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Host(error.into())
    }
}

/// A mapping of such memory, shared between threads as it is between processes. Offsets are in bytes, and the caller's own, as
/// a slice's index is: one that the other process has had a say in is checked before.
#[derive(Debug)]
pub struct SharedMemory {
    mapping: Mapping,
}

impl SharedMemory {
    /// New memory of `size` bytes, all zero, and the file to give to the other process. `name` is what the host's tools show.
    ///
    /// # Errors
    /// [`SharedError::Host`].
    pub fn create(name: &str, size: usize) -> Result<(Self, OwnedFd), SharedError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            // Hosts before Linux 6.3.
            Err(rustix::io::Errno::INVAL) => memfd_create(name, flags),
            other => other,
        }?;
        ftruncate(&file, size as u64)?;
        fcntl_add_seals(&file, FIXED)?;
        Ok((Self::open(file.as_fd(), size)?, file))
    }

    /// Maps what another process has made.
    ///
    /// # Errors
    /// [`SharedError`] if it is not of `size` bytes for good.
    pub fn open(file: BorrowedFd<'_>, size: usize) -> Result<Self, SharedError> {
        // Files of other kinds have no seals.
        if !fcntl_get_seals(file).unwrap_or(SealFlags::empty()).contains(FIXED) {
            return Err(SharedError::NotSealed);
        }
        let is = fstat(file)?.st_size as u64;
        if is != size as u64 {
            return Err(SharedError::Size { is, wanted: size });
        }
        Ok(Self { mapping: Mapping::shared(file, size)? })
    }

    /// Leaves the mappings that there are the only way to `file`: none for writing can be added, nor can its pages be taken
    /// away. A host that does not know how (before Linux 5.1) changes nothing; a page that is gone reads as zeroes.
    pub fn close(file: &OwnedFd) {
        let _ = fcntl_add_seals(file, SealFlags::FUTURE_WRITE | SealFlags::SEAL);
    }

    /// Its length in bytes.
    pub fn size(&self) -> usize {
        self.mapping.size()
    }

    /// The host's address of `len` bytes at `at`.
    fn at(&self, at: usize, len: usize) -> *mut u8 {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.size());
        assert!(inside, "{len} bytes at {at:#x} are not in shared memory of {:#x} bytes", self.size());
        self.mapping.base().wrapping_add(at)
    }

    /// Reads one integer; an aligned one at once, and before anything that is read later.
    ///
    /// # Panics
    /// If it is not inside.
    #[inline]
    pub fn load<T: Scalar>(&self, at: usize) -> T {
        let from = self.at(at, T::SIZE);
        // SAFETY: `at` has checked that it is in the mapping.
        unsafe { T::load(from) }
    }

    /// Writes one integer; an aligned one at once, and after everything that was written before.
    ///
    /// # Panics
    /// If it is not inside.
    #[inline]
    pub fn store<T: Scalar>(&self, at: usize, value: T) {
        let into = self.at(at, T::SIZE);
        // SAFETY: `at` has checked that it is in the mapping.
        unsafe { value.store(into) };
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        let from = self.at(at, into.len());
        // SAFETY: `at` has checked that they are in the mapping.
        unsafe { host::copy_from(from, into) };
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If there is no room for them inside.
    pub fn write(&self, at: usize, from: &[u8]) {
        let into = self.at(at, from.len());
        // SAFETY: `at` has checked that they are in the mapping.
        unsafe { host::copy_to(from, into) };
    }

    /// What was written before is there for the other process before anything is read after: the one order that processors
    /// do not keep by themselves (SDM 3A 8.2.3.4).
    pub fn settle(&self) {
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
