//! Where code that is translated is, and how it is read.

use ringfence_memory::GuestAddress;

/// The physical address of code, and whether it is 32-bit code: the same bytes are other instructions then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct CodeAddress(u64);

impl CodeAddress {
    /// Set for 32-bit code. No physical address has this bit (SDM 3A 4.1.4: at most 52 bits).
    const NARROW: u64 = 1 << 62;

    /// Code at an address: 32-bit code (`narrow`), or 64-bit code.
    #[inline(always)]
    pub fn new(address: GuestAddress, narrow: bool) -> Self {
        Self(address.0 | Self::tag(narrow))
    }

    /// What is added to a physical address.
    #[inline(always)]
    pub(crate) const fn tag(narrow: bool) -> u64 {
        if narrow { Self::NARROW } else { 0 }
    }

    /// Both as one number.
    #[inline(always)]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// The physical address.
    #[inline(always)]
    pub fn physical(self) -> GuestAddress {
        GuestAddress(self.0 & !Self::NARROW)
    }

    /// Whether it is 32-bit code.
    #[inline(always)]
    pub fn is_narrow(self) -> bool {
        self.0 & Self::NARROW != 0
    }

    /// The start of its page, in the same mode.
    #[inline(always)]
    pub fn page(self) -> Self {
        Self(self.0 & !0xfff)
    }

    /// Its distance from that.
    #[inline(always)]
    pub fn page_offset(self) -> u64 {
        self.0 & 0xfff
    }

    /// What is at an offset in its page, in the same mode.
    #[inline(always)]
    pub fn in_page(self, offset: u32) -> Self {
        self.page().behind(offset.into())
    }

    /// What is so many bytes behind it, in the same mode.
    #[inline(always)]
    pub fn behind(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}
