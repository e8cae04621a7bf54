//! What can go wrong with guest memory.

use crate::GuestAddress;

/// An error of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the backing.
    #[error("cannot map {size} bytes of host memory for the guest: {source}; ask for less with --memory")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A region is empty, unaligned or collides with another.
    #[error(
        "guest memory region at {start} of {len:#x} bytes is empty, not page-aligned, or overlaps another"
    )]
    BadRegion {
        /// Where the region was to start.
        start: GuestAddress,
        /// Its length in bytes.
        len: u64,
    },
    /// An access touched an address that no region holds.
    #[error("{len} bytes at guest physical address {address} are not all in guest memory")]
    OutOfRange {
        /// First address of the access.
        address: GuestAddress,
        /// Its length in bytes.
        len: u64,
    },
}
