//! Memory for thunks.
//!
//! Thunks are never freed one by one: they are few, since they
//! are kept in a normalised form. When the arena is full (a guest can make it so by running through immediate
//! operands), further thunks share a small area that is rewritten on every use; see [`Arena::transient`].

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codemem::CodeMemory;
pub use crate::codemem::CodeMemoryError as ArenaError;
use crate::landing::Landing;

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
    memory: CodeMemory,
    inner: Mutex<Inner>,
    /// Where a thunk goes on whose instruction has raised a SIMD exception.
    landing: u64,
}

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
        let mut memory = CodeMemory::new(size)?;
        let landing = super::encode::landing();
        memory.write(TRANSIENT, &landing);
        let used = (TRANSIENT + landing.len()).next_multiple_of(ALIGN);
        Ok(Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            landing: memory.at(TRANSIENT).as_ptr() as u64,
            memory,
            inner: Mutex::new(Inner { used, cache: HashMap::new() }),
        }))
    }

    /// Tells arenas apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes taken and bytes in all.
    pub fn usage(&self) -> (usize, usize) {
        (self.inner.lock().unwrap_or_else(PoisonError::into_inner).used, self.memory.size())
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
        if end > self.memory.size() {
            return Thunk { arena: Arc::clone(self), place: Place::Bytes(code.into()) };
        }
        self.write(offset, code);
        inner.used = end;
        inner.cache.insert(code.into(), offset);
        Thunk { arena: Arc::clone(self), place: Place::At(self.at(offset)) }
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        self.memory.at(offset)
    }

    fn write(&self, offset: usize, code: &[u8]) {
        // SAFETY: the caller holds the lock, and no thunk has been handed out yet for these bytes (or they are the transient
        // area, which is run under that lock only).
        unsafe { self.memory.write_shared(offset, code) };
    }
}

impl Thunk {
    /// Where it goes on if its instruction raises a SIMD exception.
    pub(super) fn landing(&self) -> Landing {
        let Arena { memory, landing, .. } = &*self.arena;
        Landing { code: memory.executed(), to: *landing, note: std::ptr::null_mut() }
    }

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
