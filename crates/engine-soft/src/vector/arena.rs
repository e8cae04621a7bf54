//! Memory for generated code: one memfd mapped twice, writable here and executable there.
//!
//! No address is ever writable and executable. Both mappings are made when the arena is, so nothing needs to be
//! mapped once the process has fenced itself in. Thunks are never freed one by one: they are few, since they
//! are kept in a normalised form. When the arena is full (a guest can make it so by running through immediate
//! operands), further thunks share a small area that is rewritten on every use; see [`Arena::transient`].

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Why no memory for code could be had.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
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
}

/// Bytes of the area that thunks share once the arena is full.
const TRANSIENT: usize = 512;

/// A thunk starts on such a boundary.
const ALIGN: usize = 16;

#[derive(Debug)]
struct Inner {
    used: usize,
    cache: HashMap<Box<[u8]>, usize>,
}

/// Code memory and the thunks in it.
#[derive(Debug)]
pub struct Arena {
    id: u64,
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    inner: Mutex<Inner>,
}

// SAFETY: the writable mapping is only touched under `inner`'s lock, and only where no thunk has been handed out
// yet (or in the transient area, under that lock too); the executable one is only run.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// Code that can be called: the arena it lives in and where, or its bytes when the arena was full.
#[derive(Clone, Debug)]
pub struct Thunk {
    arena: Arc<Arena>,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    At(NonNull<u8>),
    Bytes(Arc<[u8]>),
}

// SAFETY: the pointer is into the executable mapping, which lives as long as the arena the thunk holds.
unsafe impl Send for Thunk {}
// SAFETY: as above.
unsafe impl Sync for Thunk {}

impl Arena {
    /// Maps `size` bytes (rounded up to pages; at least one) for code.
    ///
    /// # Errors
    /// When the host refuses a memory file or its mapping.
    pub fn new(size: usize) -> Result<Arc<Self>, ArenaError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let size = size.max(1).next_multiple_of(4096);
        // SAFETY: a constant name; the result is checked.
        let raw = unsafe { libc::memfd_create(c"ringfence-code".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(ArenaError::File { size, source: io::Error::last_os_error() });
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(ArenaError::File { size, source: io::Error::last_os_error() });
        }
        let writable = map(&file, size, libc::PROT_READ | libc::PROT_WRITE, "writable")?;
        let executable = match map(&file, size, libc::PROT_READ | libc::PROT_EXEC, "executable") {
            Ok(mapping) => mapping,
            Err(error) => {
                // SAFETY: our own mapping, of which no pointer is left.
                unsafe { libc::munmap(writable.as_ptr().cast(), size) };
                return Err(error);
            }
        };
        Ok(Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            writable,
            executable,
            size,
            inner: Mutex::new(Inner { used: TRANSIENT, cache: HashMap::new() }),
        }))
    }

    /// Tells arenas apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes taken and bytes in all.
    pub fn usage(&self) -> (usize, usize) {
        (self.inner.lock().unwrap_or_else(PoisonError::into_inner).used, self.size)
    }

    /// The thunk with these bytes, made now if there is none yet. Only the encoder of this module may call it:
    /// the bytes will be run.
    pub(super) fn thunk(self: &Arc<Self>, code: &[u8]) -> Thunk {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&offset) = inner.cache.get(code) {
            return Thunk { arena: Arc::clone(self), place: Place::At(self.at(offset)) };
        }
        let offset = inner.used;
        let end = (offset + code.len()).next_multiple_of(ALIGN);
        if end > self.size {
            return Thunk { arena: Arc::clone(self), place: Place::Bytes(code.into()) };
        }
        self.write(offset, code);
        inner.used = end;
        inner.cache.insert(code.into(), offset);
        Thunk { arena: Arc::clone(self), place: Place::At(self.at(offset)) }
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.size);
        // SAFETY: within the executable mapping.
        unsafe { self.executable.add(offset) }
    }

    fn write(&self, offset: usize, code: &[u8]) {
        assert!(offset <= self.size && code.len() <= self.size - offset);
        // SAFETY: within the writable mapping, which no reference points into; the caller holds the lock.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(offset).as_ptr(), code.len())
        };
    }
}

impl Thunk {
    /// Hands the thunk's address to `run`, which must not keep it.
    ///
    /// A thunk that found no room is written to the area kept for that, under the arena's lock.
    pub(super) fn with_address<R>(&self, run: impl FnOnce(NonNull<u8>) -> R) -> R {
        match &self.place {
            Place::At(address) => run(*address),
            Place::Bytes(code) => self.arena.transient(code, run),
        }
    }
}

impl Arena {
    /// Runs code from the shared area. Slow (a serialising instruction each time), but it needs no memory.
    fn transient<R>(&self, code: &[u8], run: impl FnOnce(NonNull<u8>) -> R) -> R {
        let _inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(code.len() <= TRANSIENT, "a thunk is shorter than the shared area");
        self.write(0, code);
        // Code modified through another linear address wants a serialising instruction (SDM 3A 8.1.3).
        super::call::host_cpuid(0, 0);
        run(self.at(0))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mappings; every thunk that points into them holds the arena.
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
) -> Result<NonNull<u8>, ArenaError> {
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(ArenaError::Map { size, access, source: io::Error::last_os_error() });
    }
    NonNull::new(address.cast()).ok_or(ArenaError::Map {
        size,
        access,
        source: io::Error::from_raw_os_error(libc::ENOMEM),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_code_is_stored_once() {
        let arena = Arena::new(4096).expect("code memory");
        let first = arena.thunk(&[0xc3]);
        let used = arena.usage().0;
        let second = arena.thunk(&[0xc3]);
        assert_eq!(arena.usage().0, used);
        assert_eq!(first.with_address(|a| a), second.with_address(|a| a));
    }

    #[test]
    fn full_arena_still_yields_callable_code() {
        let arena = Arena::new(4096).expect("code memory");
        let mut last = None;
        for i in 0..=255u8 {
            let mut code = vec![0xb8, i, 0, 0, 0, 0xc3];
            code.resize(32, 0xcc);
            last = Some((i, arena.thunk(&code)));
        }
        assert!(arena.usage().0 <= 4096);
        let (value, thunk) = last.expect("a thunk");
        let mut registers = super::super::state::Registers::boxed();
        let result = super::super::call::call(&thunk, &mut registers, &Default::default());
        assert_eq!(result, u32::from(value));
    }
}
