//! Memory for generated code: one memfd mapped twice, writable here and executable there.
//!
//! No address is ever writable and executable. Both mappings are made when the memory is, so nothing needs to be
//! mapped once the process has fenced itself in.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Why no memory for code could be had.
#[derive(Debug, thiserror::Error)]
pub enum CodeMemoryError {
    /// The host refuses a memory file.
    #[error("cannot create a memory file of {size} bytes for generated code; is memfd_create allowed here?")]
    File {
        /// Bytes asked for.
        size: usize,
        /// The system's reason.
        source: io::Error,
    },
    /// The host refuses a mapping.
    #[error(
        "cannot map {size} bytes of generated code as {access}; a security policy may forbid executable memory files"
    )]
    Map {
        /// Bytes asked for.
        size: usize,
        /// `writable` or `executable`.
        access: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The host does not let it handle signals.
    #[error("cannot handle the signal that the host makes of floating-point exceptions (SIGFPE)")]
    Signal {
        /// The system's reason.
        source: io::Error,
    },
}

/// Two views of the same bytes.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
}

// SAFETY: the pointers are to mappings of our own, which any thread may use; writing asks for `&mut self`, or for
// the care described at `write_shared`.
unsafe impl Send for CodeMemory {}
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `size` bytes, rounded up to pages; at least one.
    pub(crate) fn new(size: usize) -> Result<Self, CodeMemoryError> {
        let size = size.max(1).next_multiple_of(4096);
        crate::landing::heed().map_err(|source| CodeMemoryError::Signal { source })?;
        // SAFETY: a constant name; the result is checked.
        let raw = unsafe { libc::memfd_create(c"ringfence-code".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(CodeMemoryError::File { size, source: io::Error::last_os_error() });
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(CodeMemoryError::File { size, source: io::Error::last_os_error() });
        }
        let writable = map(&file, size, libc::PROT_READ | libc::PROT_WRITE, "writable")?;
        match map(&file, size, libc::PROT_READ | libc::PROT_EXEC, "executable") {
            Ok(executable) => Ok(Self { writable, executable, size }),
            Err(error) => {
                // SAFETY: our own mapping, of which no pointer is left.
                unsafe { libc::munmap(writable.as_ptr().cast(), size) };
                Err(error)
            }
        }
    }

    /// Bytes in all.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The address of the first byte where it can be written.
    pub(crate) fn writable_address(&self) -> u64 {
        self.writable.as_ptr() as u64
    }

    /// Addresses of all bytes where they are executed.
    pub(crate) fn executed(&self) -> std::ops::Range<u64> {
        let start = self.executable.as_ptr() as u64;
        start..start + self.size as u64
    }

    /// Where the byte at `offset` is executed.
    pub(crate) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.size);
        // SAFETY: within the executable mapping.
        unsafe { self.executable.add(offset) }
    }

    /// Asks for host memory for `length` bytes from `offset`, both multiples of a page's size, all at once: page by page, as
    /// they are first touched, it costs several times as much. Nothing is lost if the host does not know how.
    pub(crate) fn populate(&self, offset: usize, length: usize) {
        assert!(offset <= self.size && length <= self.size - offset);
        // SAFETY: within our own mappings, whose bytes this leaves as they are.
        unsafe {
            libc::madvise(self.writable.add(offset).as_ptr().cast(), length, libc::MADV_POPULATE_WRITE);
            libc::madvise(self.executable.add(offset).as_ptr().cast(), length, libc::MADV_POPULATE_READ);
        }
    }

    /// A copy of the code at `offset`.
    pub(crate) fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset <= self.size && length <= self.size - offset);
        let mut bytes = vec![0; length];
        // SAFETY: within the writable mapping; only a holder of `&mut self`, or one who excludes us, writes there.
        unsafe {
            std::ptr::copy_nonoverlapping(self.writable.add(offset).as_ptr(), bytes.as_mut_ptr(), length)
        };
        bytes
    }

    /// Writes code at `offset`.
    pub(crate) fn write(&mut self, offset: usize, code: &[u8]) {
        // SAFETY: nobody else can write, since `self` is borrowed exclusively.
        unsafe { self.write_shared(offset, code) };
    }

    /// Writes code at `offset` through a shared reference.
    ///
    /// # Safety
    /// No other thread writes or executes these bytes meanwhile.
    pub(crate) unsafe fn write_shared(&self, offset: usize, code: &[u8]) {
        assert!(offset <= self.size && code.len() <= self.size - offset);
        // SAFETY: within the writable mapping, which no reference points into; the caller excludes other writers.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(offset).as_ptr(), code.len());
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: our own mappings; whoever runs code in them holds `self`.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.size);
            libc::munmap(self.executable.as_ptr().cast(), self.size);
        }
    }
}

fn map(
    file: &OwnedFd,
    size: usize,
    protection: libc::c_int,
    access: &'static str,
) -> Result<NonNull<u8>, CodeMemoryError> {
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(CodeMemoryError::Map { size, access, source: io::Error::last_os_error() });
    }
    NonNull::new(address.cast()).ok_or(CodeMemoryError::Map {
        size,
        access,
        source: io::Error::from_raw_os_error(libc::ENOMEM),
    })
}
