//! Segment registers, selectors and descriptors (SDM 3A 3.4, 3.5; APM 2 4.7, 4.8).

use serde::{Deserialize, Serialize};

/// A segment selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Selector(pub u16);

impl Selector {
    /// Requested privilege level, 0 to 3.
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// Whether it names the local descriptor table.
    pub const fn is_local(self) -> bool {
        self.0 & 4 != 0
    }

    /// The byte offset of the descriptor in its table.
    pub const fn offset(self) -> u32 {
        (self.0 & !7) as u32
    }

    /// Null: index zero of the global table, whatever the RPL.
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    /// The error code that faults on this selector push: RPL cleared.
    pub const fn error_code(self) -> u16 {
        self.0 & !3
    }
}

/// A segment register with its hidden part, or LDTR and TR.
///
/// `attributes` is in the layout of descriptor bits 40 to 55: type in bits 0-3, S in 4, DPL in 5-6, P in 7,
/// AVL in 12, L in 13, D/B in 14, G in 15 (bits 8-11 are zero). `limit` is in bytes, expanded by G.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: Selector,
    /// Linear base address.
    pub base: u64,
    /// Highest valid offset, in bytes (for expand-down segments: the highest invalid one).
    pub limit: u32,
    /// Access rights; see the type's description.
    pub attributes: u16,
}

/// Attribute bits of [`Segment::attributes`].
pub mod attribute {
    /// Accessed (code and data segments).
    pub const ACCESSED: u16 = 1 << 0;
    /// Readable code, or writable data.
    pub const READ_WRITE: u16 = 1 << 1;
    /// Conforming code, or expand-down data.
    pub const CONFORMING_DOWN: u16 = 1 << 2;
    /// Code rather than data.
    pub const CODE: u16 = 1 << 3;
    /// Code or data rather than a system segment.
    pub const S: u16 = 1 << 4;
    /// Present.
    pub const PRESENT: u16 = 1 << 7;
    /// 64-bit code.
    pub const LONG: u16 = 1 << 13;
    /// Default operand size of code, size of the stack pointer.
    pub const DB: u16 = 1 << 14;
    /// Limit counted in 4 KiB units.
    pub const GRANULARITY: u16 = 1 << 15;
}

/// Types of system descriptors, bits 0-3 of the attributes with S clear (SDM 3A table 3-2).
pub mod system_type {
    /// 16-bit TSS, available.
    pub const TSS16_AVAILABLE: u8 = 1;
    /// Local descriptor table.
    pub const LDT: u8 = 2;
    /// 16-bit TSS, busy.
    pub const TSS16_BUSY: u8 = 3;
    /// 16-bit call gate.
    pub const CALL_GATE16: u8 = 4;
    /// Task gate.
    pub const TASK_GATE: u8 = 5;
    /// 16-bit interrupt gate.
    pub const INTERRUPT_GATE16: u8 = 6;
    /// 16-bit trap gate.
    pub const TRAP_GATE16: u8 = 7;
    /// 32-bit (or 64-bit) TSS, available.
    pub const TSS_AVAILABLE: u8 = 9;
    /// 32-bit (or 64-bit) TSS, busy.
    pub const TSS_BUSY: u8 = 11;
    /// 32-bit (or 64-bit) call gate.
    pub const CALL_GATE: u8 = 12;
    /// 32-bit (or 64-bit) interrupt gate.
    pub const INTERRUPT_GATE: u8 = 14;
    /// 32-bit (or 64-bit) trap gate.
    pub const TRAP_GATE: u8 = 15;
}

impl Segment {
    /// A real-mode segment: base is sixteen times the selector, limit 64 KiB, writable data.
    pub const fn real_mode(selector: u16) -> Self {
        Self { selector: Selector(selector), base: (selector as u64) << 4, limit: 0xffff, attributes: 0x93 }
    }

    /// Builds the register from an eight-byte descriptor, expanding the limit (SDM 3A 3.4.5).
    pub const fn from_descriptor(selector: Selector, descriptor: u64) -> Self {
        let raw = ((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)) as u32;
        let attributes = ((descriptor >> 40) & 0xf0ff) as u16;
        let limit = if attributes & attribute::GRANULARITY != 0 { (raw << 12) | 0xfff } else { raw };
        let base = ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000);
        Self { selector, base, limit, attributes }
    }

    /// The eight-byte descriptor that [`Segment::from_descriptor`] would turn into this register.
    pub const fn to_descriptor(&self) -> u64 {
        let raw =
            if self.attributes & attribute::GRANULARITY != 0 { self.limit >> 12 } else { self.limit } as u64;
        (raw & 0xffff)
            | ((self.base & 0xff_ffff) << 16)
            | ((self.attributes as u64 & 0xf0ff) << 40)
            | ((raw & 0xf_0000) << 32)
            | ((self.base & 0xff00_0000) << 32)
    }

    /// Type field, 0 to 15.
    pub const fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }

    /// Whether all bits of `mask` (see [`attribute`]) are set.
    pub const fn has(&self, mask: u16) -> bool {
        self.attributes & mask == mask
    }

    /// Code segment.
    pub const fn is_code(&self) -> bool {
        self.has(attribute::S | attribute::CODE)
    }

    /// Writable data segment.
    pub const fn is_writable(&self) -> bool {
        self.attributes & (attribute::S | attribute::CODE | attribute::READ_WRITE)
            == attribute::S | attribute::READ_WRITE
    }

    /// Readable: any data segment, or a readable code segment.
    pub const fn is_readable(&self) -> bool {
        self.has(attribute::S)
            && (self.attributes & attribute::CODE == 0 || self.attributes & attribute::READ_WRITE != 0)
    }

    /// Expand-down data segment.
    pub const fn is_expand_down(&self) -> bool {
        self.attributes & (attribute::S | attribute::CODE | attribute::CONFORMING_DOWN)
            == attribute::S | attribute::CONFORMING_DOWN
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Highest valid byte offset.
    pub limit: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_round_trip_keeps_every_field() {
        for d in
            [0x00cf_9a00_0000_ffff_u64, 0x00af_9b00_0000_ffff, 0x8f40_93ab_cdef_1234, 0x0000_8b12_3456_0067]
        {
            let segment = Segment::from_descriptor(Selector(8), d);
            assert_eq!(segment.to_descriptor(), d, "{d:#018x}");
        }
    }

    #[test]
    fn granular_limit_is_expanded_to_bytes() {
        let flat = Segment::from_descriptor(Selector(8), 0x00cf_9a00_0000_ffff);
        assert_eq!((flat.base, flat.limit, flat.dpl()), (0, 0xffff_ffff, 0));
        assert!(flat.is_code() && flat.has(attribute::PRESENT | attribute::DB));
    }
}
