//! Where a case lives: the addresses and descriptors that the native process and a machine under test share.
//!
//! Everything is below 2 GiB, so that absolute 32-bit displacements reach it, and within 64 KiB, so that 16-bit
//! code reaches all of it through segments based at [`BASE`]. What is not listed here is not mapped.

use ringfence_x86::Segment;
use ringfence_x86::Selector;
use ringfence_x86::segment::attribute;

/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// Linear address of the window; also the base of the 16-bit segments.
pub const BASE: u64 = 0x1000_0000;
/// Bytes from [`BASE`] that hold mappings and the gaps between them.
pub const WINDOW_LEN: u64 = 0x1_0000;
/// Linear address of the two code pages: readable and executable, filled with INT3 around the case's code.
pub const CODE: u64 = BASE + 0x1000;
/// Bytes of code pages.
pub const CODE_LEN: usize = 2 * PAGE as usize;
/// Linear addresses of the data pages, none of them executable.
pub const DATA: [DataPage; 4] = [
    DataPage { address: BASE + 0x4000, writable: true },
    DataPage { address: BASE + 0x5000, writable: true },
    DataPage { address: BASE + 0x6000, writable: false },
    DataPage { address: BASE + 0x8000, writable: true },
];
/// Bytes of all data pages together, in the order of [`DATA`].
pub const DATA_LEN: usize = DATA.len() * PAGE as usize;

/// A page of data.
#[derive(Clone, Copy, Debug)]
pub struct DataPage {
    /// Linear address.
    pub address: u64,
    /// Whether code may write to it.
    pub writable: bool,
}

/// The offset in the concatenated data pages of linear address `address`, if it is in one.
pub fn data_offset(address: u64) -> Option<usize> {
    DATA.iter()
        .position(|page| address & !(PAGE - 1) == page.address)
        .map(|index| index * PAGE as usize + (address % PAGE) as usize)
}

/// The linear address of byte `offset` of the concatenated data pages.
pub fn data_address(offset: usize) -> u64 {
    let page = DATA[(offset / PAGE as usize) % DATA.len()];
    page.address + offset as u64 % PAGE
}

/// Selectors of the segments, all at CPL 3.
///
/// The first ones are what Linux gives every process; the others stand in the LDT.
pub mod selector {
    /// 32-bit code of the system, flat.
    pub const SYSTEM_CODE32: u16 = 0x23;
    /// Data of the system, flat.
    pub const SYSTEM_DATA: u16 = 0x2b;
    /// 64-bit code of the system.
    pub const SYSTEM_CODE64: u16 = 0x33;
    /// Data of the system that no case uses on purpose: its limit tells the processor's number (the vDSO reads it).
    pub const SYSTEM_PROCESSOR: u16 = 0x7b;
    /// 32-bit code, flat.
    pub const CODE32: u16 = 0x07;
    /// 16-bit code at the window.
    pub const CODE16: u16 = 0x0f;
    /// 32-bit data, flat.
    pub const DATA32: u16 = 0x17;
    /// 16-bit data at the window, limit 64 KiB.
    pub const DATA16: u16 = 0x1f;
    /// 32-bit data at the window that ends with the last data page.
    pub const SHORT: u16 = 0x27;
    /// Read-only data, flat.
    pub const READ_ONLY: u16 = 0x2f;
    /// Expand-down data at the window, above offset 0x4fff.
    pub const EXPAND_DOWN: u16 = 0x37;
    /// Execute-only code.
    pub const EXECUTE_ONLY: u16 = 0x3f;
    /// Data that is not present.
    pub const NOT_PRESENT: u16 = 0x47;
    /// 16-bit expand-down data at the window, above offset 0x4fff and up to 0xffff.
    pub const EXPAND_DOWN16: u16 = 0x4f;
    /// 32-bit data whose base is the first data page.
    pub const OFFSET: u16 = 0x57;
}

const fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> Segment {
    // Linux sets the accessed bit of every LDT entry beforehand, since the table is mapped read-only.
    let common = attribute::S | attribute::ACCESSED | 3 << 5;
    Segment { selector: Selector(selector), base, limit, attributes: attributes | common }
}

const PRESENT: u16 = attribute::PRESENT;
const BIG: u16 = attribute::DB;
const FLAT: u16 = attribute::DB | attribute::GRANULARITY;
const DATA_RW: u16 = attribute::READ_WRITE;
const CODE_READ: u16 = attribute::CODE | attribute::READ_WRITE;

/// The local descriptor table, entry by entry.
pub const LDT: [Segment; 11] = [
    segment(selector::CODE32, 0, u32::MAX, PRESENT | FLAT | CODE_READ),
    segment(selector::CODE16, BASE, 0xffff, PRESENT | CODE_READ),
    segment(selector::DATA32, 0, u32::MAX, PRESENT | FLAT | DATA_RW),
    segment(selector::DATA16, BASE, 0xffff, PRESENT | DATA_RW),
    segment(selector::SHORT, BASE, 0x8fff, PRESENT | BIG | DATA_RW),
    segment(selector::READ_ONLY, 0, u32::MAX, PRESENT | FLAT),
    segment(selector::EXPAND_DOWN, BASE, 0x4fff, PRESENT | BIG | DATA_RW | attribute::CONFORMING_DOWN),
    segment(selector::EXECUTE_ONLY, 0, u32::MAX, PRESENT | FLAT | attribute::CODE),
    segment(selector::NOT_PRESENT, 0, u32::MAX, FLAT | DATA_RW),
    segment(selector::EXPAND_DOWN16, BASE, 0x4fff, PRESENT | DATA_RW | attribute::CONFORMING_DOWN),
    segment(selector::OFFSET, DATA[0].address, u32::MAX, PRESENT | FLAT | DATA_RW),
];

/// The system's descriptors that user code may load, in the global descriptor table.
pub const GDT_USER: [Segment; 4] = [
    segment(selector::SYSTEM_CODE32, 0, u32::MAX, PRESENT | FLAT | CODE_READ),
    segment(selector::SYSTEM_DATA, 0, u32::MAX, PRESENT | FLAT | DATA_RW),
    segment(
        selector::SYSTEM_CODE64,
        0,
        u32::MAX,
        PRESENT | attribute::LONG | attribute::GRANULARITY | CODE_READ,
    ),
    segment(selector::SYSTEM_PROCESSOR, 0, 0, PRESENT | BIG | attribute::CONFORMING_DOWN),
];

/// The descriptor that `selector` names, if it is one of the above.
pub fn descriptor(selector: u16) -> Option<Segment> {
    let found = |segment: &&Segment| segment.selector.0 | 3 == selector | 3;
    LDT.iter().chain(&GDT_USER).find(found).copied()
}
