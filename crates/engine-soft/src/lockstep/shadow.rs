//! The second memory: made like the first, filled from it, compared with it.

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, MemoryError};

use super::world::executing;

/// Bytes compared at once.
const PIECE: usize = 4096;

/// Memory with the same regions, zeroed.
pub(super) fn like(memory: &GuestMemory) -> Result<GuestMemory, MemoryError> {
    GuestMemory::new(&memory.specs())
}

/// The first differing byte of a range, in both.
fn difference(a: &GuestMemory, b: &GuestMemory, range: GuestRange) -> Option<GuestAddress> {
    let (mut left, mut right) = ([0; PIECE], [0; PIECE]);
    let mut done = 0;
    while done < range.len {
        let at = GuestAddress(range.start.0 + done);
        let len = (range.len - done).min(PIECE as u64) as usize;
        let (left, right) = (&mut left[..len], &mut right[..len]);
        // A range that is no memory is none in either.
        a.read_bytes(at, left).and_then(|()| b.read_bytes(at, right)).ok()?;
        if left != right {
            let first = left.iter().zip(right.iter()).position(|(l, r)| l != r).unwrap_or(0);
            return Some(GuestAddress(at.0 + first as u64));
        }
        done += len as u64;
    }
    None
}

/// The first differing byte of a page.
pub(super) fn page_difference(a: &GuestMemory, b: &GuestMemory, page: GuestAddress) -> Option<GuestAddress> {
    difference(a, b, GuestRange::new(page.0, 0x1000))
}

/// The first differing byte of `len` bytes from `address`.
pub(super) fn range_difference(
    a: &GuestMemory,
    b: &GuestMemory,
    address: GuestAddress,
    len: u64,
) -> Option<GuestAddress> {
    difference(a, b, GuestRange::new(address.0, len))
}

/// The first differing byte of all memory.
pub(super) fn first_difference(a: &GuestMemory, b: &GuestMemory) -> Option<GuestAddress> {
    a.specs().iter().find_map(|spec| difference(a, b, spec.range))
}

/// Makes `to` the same as `from`; pages that are the same already are left alone, so that memory which was never used
/// stays without a backing.
pub(super) fn copy(from: &GuestMemory, to: &GuestMemory) {
    executing(false, || {
        let mut bytes = [0; PIECE];
        for spec in from.specs() {
            let mut at = spec.range.start.0;
            while at < spec.range.end() {
                let page = GuestAddress(at);
                if page_difference(from, to, page).is_some() && from.read_bytes(page, &mut bytes).is_ok() {
                    // The same regions, so this cannot fail where reading did not.
                    let _ = to.write_bytes(page, &bytes);
                }
                at += PIECE as u64;
            }
        }
    });
    to.set_a20(from.a20_mask() == u64::MAX);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_makes_memory_the_same_and_a_changed_byte_is_found() {
        let a = GuestMemory::flat(1 << 20).unwrap();
        a.write::<u64>(GuestAddress(0x12340), 0x1122_3344_5566_7788).unwrap();
        let b = like(&a).unwrap();
        assert_eq!(first_difference(&a, &b), Some(GuestAddress(0x12340)));
        copy(&a, &b);
        assert_eq!(first_difference(&a, &b), None);
        b.write::<u8>(GuestAddress(0x12342), 0).unwrap();
        assert_eq!(page_difference(&a, &b, GuestAddress(0x12000)), Some(GuestAddress(0x12342)));
        assert_eq!(range_difference(&a, &b, GuestAddress(0x12343), 8), None);
    }
}
