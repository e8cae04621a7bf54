//! Where the initrd goes.

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange};

use crate::layout::{FOUR_GIB, HIGH_START, KERNEL, LOW_RAM_LIMIT, Layout};
use crate::{BootError, BootSpec, Initrd};

/// Each initrd starts at a multiple of this, which the kernel's unpacker expects of an archive's headers.
const ALIGN: u64 = 4;

/// Claims room for all initrds as high as possible: below `limit`, below the hole under 4 GiB, and beside the
/// kernel, which has been claimed before. `None` if there is nothing to place.
///
/// # Errors
/// [`BootError::InitrdDoesNotFit`].
pub(crate) fn place(
    spec: &BootSpec<'_>,
    layout: &mut Layout,
    limit: u64,
) -> Result<Option<GuestRange>, BootError> {
    let size = spec.initrd_size(ALIGN);
    if size == 0 {
        return Ok(None);
    }
    let limit = limit.min(FOUR_GIB);
    let range = layout.claim_highest(size, 0x1000, limit, "the initrd").filter(|r| r.start.0 >= HIGH_START);
    Ok(Some(range.ok_or_else(|| BootError::InitrdDoesNotFit {
        size,
        limit,
        needed: needed(layout, size, limit),
    })?))
}

/// The memory with which `size` bytes would fit: up to the kernel's end, then what lies above it now, then they.
/// `None` if they would not end below `limit` or below the hole under 4 GiB.
pub(crate) fn needed(layout: &Layout, size: u64, limit: u64) -> Option<u64> {
    let claims = || layout.claims().iter();
    let kernel = claims().filter(|c| c.what == KERNEL).map(|c| c.range.end()).max().unwrap_or(HIGH_START);
    let above: u64 = claims().filter(|c| c.range.start.0 >= kernel).map(|c| c.range.len).sum();
    let end = kernel.checked_next_multiple_of(0x1000)?.checked_add(size.checked_next_multiple_of(0x1000)?)?;
    (end <= limit && end + above <= LOW_RAM_LIMIT).then_some(end + above)
}

/// Writes the initrds one after the other, with zeros between.
///
/// # Errors
/// [`BootError::Memory`].
pub(crate) fn write(
    memory: &GuestMemory,
    initrds: &[Initrd<'_>],
    range: GuestRange,
) -> Result<(), BootError> {
    let fail = BootError::memory("the initrd");
    let mut at = range.start.0;
    for initrd in initrds {
        let len = initrd.data.len() as u64;
        let padded = len.next_multiple_of(ALIGN);
        memory.write_bytes(GuestAddress(at), initrd.data).map_err(&fail)?;
        memory.fill(GuestAddress(at + len), 0, padded - len).map_err(&fail)?;
        at += padded;
    }
    Ok(())
}
