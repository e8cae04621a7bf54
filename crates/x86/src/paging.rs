//! Paging-structure entries and page-fault error codes (SDM 3A 4.2 to 4.7).

use bitflags::bitflags;

bitflags! {
    /// Flags of a paging-structure entry, the same at every level.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Entry: u64 {
        /// Present.
        const PRESENT = 1 << 0;
        /// Writable.
        const WRITABLE = 1 << 1;
        /// Accessible at CPL 3.
        const USER = 1 << 2;
        /// Write-through.
        const PWT = 1 << 3;
        /// Cache disable.
        const PCD = 1 << 4;
        /// Accessed.
        const ACCESSED = 1 << 5;
        /// Dirty (leaf entries).
        const DIRTY = 1 << 6;
        /// Page size: the entry maps a large page (PAT in a 4 KiB leaf).
        const LARGE = 1 << 7;
        /// Global (leaf entries).
        const GLOBAL = 1 << 8;
        /// No execute.
        const NX = 1 << 63;
    }

    /// Error code of a page fault (SDM 3A 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct FaultCode: u16 {
        /// A protection violation rather than a missing page.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was made at CPL 3.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
    }
}

/// Bytes in a small page.
pub const PAGE_SIZE: u64 = 4096;
/// Offset bits within a small page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// Whether a linear address is canonical with 48 implemented bits (SDM 1 3.3.7.1).
pub const fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}
