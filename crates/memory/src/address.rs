//! Guest physical addresses and ranges.

use std::fmt;

/// A guest physical address, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddress(pub u64);

impl GuestAddress {
    /// The address `offset` bytes on, or `None` past the end of the address space.
    pub const fn checked_add(self, offset: u64) -> Option<Self> {
        match self.0.checked_add(offset) {
            Some(a) => Some(Self(a)),
            None => None,
        }
    }

    /// The start of the 4 KiB page the address lies in.
    pub const fn page(self) -> Self {
        Self(self.0 & !0xfff)
    }

    /// The offset within the 4 KiB page.
    pub const fn page_offset(self) -> u64 {
        self.0 & 0xfff
    }
}

impl fmt::Debug for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub len: u64,
}

impl GuestRange {
    /// A range of `len` bytes from `start`.
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start: GuestAddress(start), len }
    }

    /// One past the last address (saturating).
    pub const fn end(&self) -> u64 {
        self.start.0.saturating_add(self.len)
    }

    /// Whether `len` bytes from `address` lie wholly inside.
    pub const fn contains(&self, address: GuestAddress, len: u64) -> bool {
        address.0 >= self.start.0
            && match address.0.checked_add(len) {
                Some(end) => end <= self.end(),
                None => false,
            }
    }

    /// Whether the two ranges share an address.
    pub const fn overlaps(&self, other: &GuestRange) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end()
    }
}
