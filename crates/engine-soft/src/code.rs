//! Which guest pages hold decoded code.
//!
//! Whoever decodes code first marks its granules here and only then reads the bytes; whoever writes to a
//! marked page asks here whether a granule in use was hit. Between the two no write can slip through unseen:
//! marking a page also takes it out of every soft TLB's writable entries.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ringfence_memory::{CodeObserver, GuestAddress, GuestMemory};

use crate::hash::AddressMap;

/// Bytes in a granule: the unit in which writes are compared with code.
pub const GRANULE: u64 = 64;

/// The granules that `len` bytes from `offset` in a page touch, one bit each. The range is cut at the page's end.
pub fn granules(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = (offset / GRANULE) as u32;
    let last = ((offset + len - 1).min(0xfff) / GRANULE) as u32;
    (u64::MAX >> (63 - (last - first))) << first
}

/// One vCPU's list of granules whose code is stale.
#[derive(Debug, Default)]
pub struct StaleCode {
    any: AtomicBool,
    list: Mutex<Vec<(GuestAddress, u64)>>,
}

impl StaleCode {
    /// Whether there is anything to take.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// What [`StaleCode::any`] reads, for code that is generated.
    pub fn flag(&self) -> &AtomicBool {
        &self.any
    }

    /// Takes the list: page addresses and granule masks.
    pub fn take(&self) -> Vec<(GuestAddress, u64)> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut *list)
    }

    fn push(&self, page: GuestAddress, mask: u64) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push((page, mask));
        self.any.store(true, Ordering::Release);
    }
}

/// Writes beside its code that a page bears before its code is given up. Every one takes the slow path; a page that once
/// held code and now holds data would otherwise never get rid of it. Decoding anew costs about as much as so many writes, so
/// a page that is really both is at most twice as slow.
const PATIENCE: u32 = 128;

/// A page with decoded code.
#[derive(Default)]
struct Marked {
    /// Granules in use.
    granules: u64,
    /// Writes to others.
    beside: u32,
}

#[derive(Default)]
struct Pages {
    marked: AddressMap<Marked>,
    vcpus: Vec<Arc<StaleCode>>,
}

/// The code map of one virtual machine, shared by its vCPUs.
pub struct CodeMap {
    memory: Arc<GuestMemory>,
    pages: Mutex<Pages>,
}

impl std::fmt::Debug for CodeMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeMap").finish_non_exhaustive()
    }
}

impl CodeMap {
    /// A code map that hears of device writes to `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Arc<Self> {
        let map = Arc::new(Self { memory: Arc::clone(&memory), pages: Mutex::default() });
        memory.set_code_observer(Arc::new(Observer(Arc::downgrade(&map))));
        map
    }

    /// Adds a vCPU, which will be told of stale code through the list returned.
    pub fn register(&self) -> Arc<StaleCode> {
        let stale = Arc::new(StaleCode::default());
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).vcpus.push(Arc::clone(&stale));
        stale
    }

    /// Marks `len` bytes from `address` (in one page) as decoded. True if the page held no code before: its
    /// writable soft-TLB entries must go before the bytes are read.
    pub fn mark(&self, address: GuestAddress, len: u64) -> bool {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let page = pages.marked.entry(address.page()).or_default();
        let fresh = page.granules == 0;
        page.granules |= granules(address.page_offset(), len);
        if fresh {
            self.memory.set_code_page(address, true);
        }
        fresh
    }

    /// `len` bytes from `address` (in one page) were written: hands code made from them to the vCPUs' lists, and code
    /// beside them if it has been written beside for long. True if there was any.
    pub fn written(&self, address: GuestAddress, len: u64) -> bool {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let page = address.page();
        let Some(marked) = pages.marked.get_mut(&page) else { return false };
        if marked.granules & granules(address.page_offset(), len) == 0 {
            marked.beside += 1;
            if marked.beside < PATIENCE {
                return false;
            }
        }
        // A block may span granules, so the bits of one cannot be cleared alone: drop the page as a whole.
        let stale = marked.granules;
        pages.marked.remove(&page);
        self.memory.set_code_page(address, false);
        for vcpu in &pages.vcpus {
            vcpu.push(page, stale);
        }
        true
    }
}

/// Breaks the cycle between guest memory and code map.
struct Observer(std::sync::Weak<CodeMap>);

impl CodeObserver for Observer {
    fn code_written(&self, address: GuestAddress, len: u64) {
        if let Some(map) = self.0.upgrade() {
            map.written(address, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_cover_first_to_last_byte() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(63, 2), 0b11);
        assert_eq!(granules(0xfff, 16), 1 << 63);
        assert_eq!(granules(0, 0x1000), u64::MAX);
    }

    #[test]
    fn device_write_to_decoded_bytes_reaches_every_vcpu() {
        let memory = Arc::new(GuestMemory::flat(0x4000).unwrap());
        let map = CodeMap::new(Arc::clone(&memory));
        let vcpus = [map.register(), map.register()];
        assert!(map.mark(GuestAddress(0x1010), 8));
        assert!(!map.mark(GuestAddress(0x1018), 8));
        memory.write::<u8>(GuestAddress(0x1800), 1).unwrap();
        assert!(!vcpus[0].any());
        memory.write::<u8>(GuestAddress(0x1012), 1).unwrap();
        for vcpu in &vcpus {
            assert!(vcpu.any());
            assert_eq!(vcpu.take(), [(GuestAddress(0x1000), 1)]);
        }
        assert!(map.mark(GuestAddress(0x1010), 8), "the page was given up as a whole");
    }

    #[test]
    fn page_that_is_written_beside_its_code_for_long_gives_it_up() {
        let memory = Arc::new(GuestMemory::flat(0x4000).unwrap());
        let map = CodeMap::new(Arc::clone(&memory));
        map.mark(GuestAddress(0x1010), 8);
        let until = (1..).find(|_| map.written(GuestAddress(0x1800), 8)).unwrap();
        assert_eq!(until, PATIENCE);
        assert!(!memory.page(GuestAddress(0x1000)).unwrap().code);
    }
}
