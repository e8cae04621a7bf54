//! A disk's features and configuration (5.2.3 and 5.2.4).

use ringfence_disk::DiskInfo;

/// Feature bits.
pub(super) mod feature {
    const SIZE_MAX: u64 = 1 << 1;
    const SEG_MAX: u64 = 1 << 2;
    pub(in crate::virtio::blk) const READ_ONLY: u64 = 1 << 5;
    const BLOCK_SIZE: u64 = 1 << 6;
    pub(in crate::virtio::blk) const FLUSH: u64 = 1 << 9;
    const TOPOLOGY: u64 = 1 << 10;
    pub(in crate::virtio::blk) const CONFIG_CACHE: u64 = 1 << 11;
    const MULTI_QUEUE: u64 = 1 << 12;
    pub(in crate::virtio::blk) const DISCARD: u64 = 1 << 13;
    pub(in crate::virtio::blk) const WRITE_ZEROES: u64 = 1 << 14;
    /// Those of every disk.
    pub(in crate::virtio::blk) const ALWAYS: u64 =
        SIZE_MAX | SEG_MAX | BLOCK_SIZE | FLUSH | TOPOLOGY | CONFIG_CACHE | MULTI_QUEUE;
}

/// Bytes in a sector, the unit of everything here.
pub(super) const SECTOR: u64 = 512;
/// Bytes in a segment of data, at most.
const MAX_SEGMENT: u32 = 128 << 10;
/// Segments of data in a request, at most: a queue's entries without header and status.
const MAX_SEGMENTS: u32 = 254;
/// Sectors in one range to be discarded or zeroed: 1 GiB.
pub(super) const MAX_RANGE: u32 = 2 << 20;
/// Ranges in a discard request.
pub(super) const MAX_DISCARDS: u32 = 64;
/// Offset of the field that switches the cache.
pub(super) const WRITEBACK: u64 = 32;

/// The configuration as the driver reads it.
pub(super) fn bytes(info: &DiskInfo, block: u32, queues: u16, cached: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(60);
    bytes.extend((info.size / SECTOR).to_le_bytes());
    bytes.extend(MAX_SEGMENT.to_le_bytes());
    bytes.extend(MAX_SEGMENTS.to_le_bytes());
    // Cylinders, heads and sectors: not offered.
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    // Topology: one logical block in a physical one, none left over, I/O of at least one block, 1 MiB at best.
    bytes.extend([0, 0]);
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(((1 << 20) / block).to_le_bytes());
    bytes.extend([u8::from(cached), 0]);
    bytes.extend(queues.to_le_bytes());
    bytes.extend(MAX_RANGE.to_le_bytes());
    bytes.extend(MAX_DISCARDS.to_le_bytes());
    bytes.extend((block / SECTOR as u32).to_le_bytes());
    bytes.extend(MAX_RANGE.to_le_bytes());
    // One range in a request to write zeroes, whose space may be given back.
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend([1, 0, 0, 0]);
    bytes
}
