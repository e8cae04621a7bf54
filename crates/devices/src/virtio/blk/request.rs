//! A request: header, data, status byte (5.2.6).

use ringfence_disk::{Access, Extent, IoError, Operation};

use super::Blk;
use super::config::{MAX_DISCARDS, MAX_RANGE, SECTOR};
use crate::virtio::Chain;

/// Values of the status byte.
pub(super) const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Bytes of a disk's identification.
pub(super) const ID_SIZE: usize = 20;

/// Types of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

const HEADER: u64 = 16;
/// Bytes of data in a request; a driver that keeps to the configuration has half of it at most.
const MAX_DATA: u64 = 64 << 20;
/// Bytes of a range to be discarded or zeroed.
const RANGE: u64 = 16;
/// Flag of such a range: its space may be given back.
const UNMAP: u32 = 1;

/// What a request asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// The serial number.
    Id,
    Operation(Operation),
}

/// Why nothing is asked of the disk.
#[derive(Debug, PartialEq)]
pub(super) enum Refusal {
    /// There is no place to say so.
    NoStatus,
    Status(u8),
}

const FAILED: Refusal = Refusal::Status(ERROR);

/// What the guest is told of a disk's error.
pub(super) fn status(error: IoError) -> u8 {
    match error {
        IoError::OutOfRange | IoError::Misaligned | IoError::ReadOnly => ERROR,
        IoError::NoSpace | IoError::Abandoned | IoError::Host(_) => ERROR,
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.iter().skip(at).take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at + 4)) << 32 | u64::from(word(bytes, at))
}

impl Blk {
    /// Sectors as bytes, if the disk has them and they are whole blocks.
    fn extent(&self, sector: u64, len: u64) -> Result<Extent, Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(FAILED)?;
        let end = offset.checked_add(len).ok_or(FAILED)?;
        let whole = (offset | len).is_multiple_of(u64::from(self.block));
        if end > self.info.size || !whole || len == 0 { Err(FAILED) } else { Ok(Extent { offset, len }) }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.info.read_only { Err(FAILED) } else { Ok(()) }
    }
}

/// Reads a request.
pub(super) fn parse(chain: &Chain, blk: &Blk) -> Result<Asked, Refusal> {
    let mut header = [0; HEADER as usize];
    let room = chain.writable_len();
    if chain.read(0, &mut header) < header.len() || room == 0 {
        return Err(Refusal::NoStatus);
    }
    let (kind, sector) = (word(&header, 0), long(&header, 8));
    let (given, wanted) = (chain.readable_len() - HEADER, room - 1);
    let durable = !blk.is_cached();
    let operation = match kind {
        kind::IN => {
            let Extent { offset, len } = blk.extent(sector, limited(wanted)?)?;
            let buffers = blk.buffers(Access::Fill, chain.writable(0, len)).ok_or(FAILED)?;
            Operation::Read { offset, buffers }
        }
        kind::OUT => {
            blk.check_writable()?;
            let Extent { offset, len } = blk.extent(sector, limited(given)?)?;
            let buffers = blk.buffers(Access::Take, chain.readable(HEADER, len)).ok_or(FAILED)?;
            Operation::Write { offset, buffers, durable }
        }
        kind::FLUSH => Operation::Flush,
        kind::GET_ID => return Ok(Asked::Id),
        kind::DISCARD => {
            blk.check_writable()?;
            let ranges = ranges(chain, blk, given, MAX_DISCARDS)?;
            if ranges.iter().any(|(_, flags)| *flags != 0) {
                // Unmap means nothing here and must not be set (5.2.6.2).
                return Err(Refusal::Status(UNSUPPORTED));
            }
            Operation::Discard(ranges.into_iter().map(|(extent, _)| extent).collect())
        }
        kind::WRITE_ZEROES => {
            blk.check_writable()?;
            let ranges = ranges(chain, blk, given, 1)?;
            let Some(&(extent, flags)) = ranges.first() else { return Err(FAILED) };
            if flags & !UNMAP != 0 {
                return Err(Refusal::Status(UNSUPPORTED));
            }
            Operation::WriteZeroes { extent, deallocate: flags & UNMAP != 0, durable }
        }
        _ => return Err(Refusal::Status(UNSUPPORTED)),
    };
    Ok(Asked::Operation(operation))
}

fn limited(len: u64) -> Result<u64, Refusal> {
    if len > MAX_DATA { Err(FAILED) } else { Ok(len) }
}

/// The ranges of a request to discard or zero, with their flags.
fn ranges(chain: &Chain, blk: &Blk, given: u64, most: u32) -> Result<Vec<(Extent, u32)>, Refusal> {
    if given == 0 || !given.is_multiple_of(RANGE) || given / RANGE > u64::from(most) {
        return Err(FAILED);
    }
    let mut bytes = vec![0; given as usize];
    chain.read(HEADER, &mut bytes);
    let range = |bytes: &[u8]| {
        let (sector, count, flags) = (long(bytes, 0), word(bytes, 8), word(bytes, 12));
        if count > MAX_RANGE {
            return Err(FAILED);
        }
        Ok((blk.extent(sector, u64::from(count) * SECTOR)?, flags))
    };
    bytes.chunks_exact(RANGE as usize).map(range).collect()
}
