//! Memory shared by the parent and the children, and the records in it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::case::{Case, Vectors};
use crate::layout::DATA_LEN;

/// Cases that one child executes.
pub(crate) const BATCH: usize = 1024;

/// How a record ended: nothing recorded yet.
pub(crate) const END_NONE: u32 = 0;
/// How a record ended: an exception.
pub(crate) const END_EXCEPTION: u32 = 1;
/// How a record ended: a system call was stopped.
pub(crate) const END_SYSTEM_CALL: u32 = 2;
/// How a record ended: out of time.
pub(crate) const END_HUNG: u32 = 3;

/// What the child writes down about a case.
#[repr(C)]
pub(crate) struct Record {
    pub(crate) end: u32,
    pub(crate) vector: u32,
    pub(crate) error: u64,
    pub(crate) address: u64,
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) segments: [u16; 6],
    pub(crate) change_start: u32,
    pub(crate) change_len: u32,
    pub(crate) vectors: Vectors,
    pub(crate) change: [u8; DATA_LEN],
}

/// Everything shared. All zeroes is a valid value.
#[repr(C)]
pub(crate) struct Shared {
    /// The case being executed.
    pub(crate) current: AtomicU32,
    /// The case to end before.
    pub(crate) count: AtomicU32,
    /// Set by the child when it came so far; see `child::Step`.
    pub(crate) step: AtomicU32,
    /// `errno` of the step that failed.
    pub(crate) errno: AtomicU32,
    /// User CPU time after which a case counts as hung, between one and two of these, in microseconds.
    pub(crate) tick: AtomicU32,
    pub(crate) cases: [Case; BATCH],
    pub(crate) records: [Record; BATCH],
}

/// A mapping of [`Shared`] that children inherit.
#[derive(Debug)]
pub(crate) struct Mapping(AtomicPtr<Shared>);

impl Mapping {
    /// Maps zeroed shared memory.
    pub(crate) fn new() -> std::io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no other memory.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self(AtomicPtr::new(at.cast())))
    }

    /// The start of the mapping.
    pub(crate) fn pointer(&self) -> NonNull<Shared> {
        // SAFETY: `new` refused a failed mapping, so the pointer is not null.
        unsafe { NonNull::new_unchecked(self.0.load(Ordering::Relaxed)) }
    }

    /// The shared memory, while no child runs.
    pub(crate) fn get(&mut self) -> &mut Shared {
        // SAFETY: the mapping lives as long as `self`, is page-aligned and large enough; every bit pattern is a
        // valid `Shared`; only children write to it besides the caller, and the caller has reaped them.
        unsafe { self.pointer().as_mut() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.load(Ordering::Relaxed).cast(), size_of::<Shared>()) };
    }
}
