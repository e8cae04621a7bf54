//! Physical region pages: where a command's data is in guest memory (4.3).

use ringfence_memory::{GuestAddress, GuestMemory};

use super::spec::{PAGE, Status};

/// The pieces of guest memory that the two entries of a command describe for `len` bytes. The memory itself is
/// not checked here; entries are read from guest memory once each.
///
/// # Errors
/// The status the command ends with: a wrong offset, or a list that is not in memory.
pub(super) fn pieces(
    memory: &GuestMemory,
    prp1: u64,
    prp2: u64,
    len: u64,
) -> Result<Vec<(GuestAddress, u64)>, Status> {
    if prp1 & 3 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let first = len.min(PAGE - prp1 % PAGE);
    let mut pieces = vec![(GuestAddress(prp1), first)];
    let mut left = len - first;
    if left == 0 {
        return Ok(pieces);
    }
    if left <= PAGE {
        pieces.push((page(prp2)?, left));
        return Ok(pieces);
    }
    if prp2 & 7 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    pieces.reserve(left.div_ceil(PAGE) as usize);
    let mut at = GuestAddress(prp2);
    while left > 0 {
        let entry = memory.read::<u64>(at).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        // The last entry of a page that does not end the list points to the next page of it. A page has 512
        // entries and only the first can start late, so the number of pages is bounded by the length.
        if at.page_offset() == PAGE - 8 && left > PAGE {
            at = page(entry)?;
            continue;
        }
        let n = left.min(PAGE);
        pieces.push((page(entry)?, n));
        left -= n;
        at = at.checked_add(8).ok_or(Status::DATA_TRANSFER_ERROR)?;
    }
    Ok(pieces)
}

/// An entry that must be a whole page.
fn page(entry: u64) -> Result<GuestAddress, Status> {
    if entry.is_multiple_of(PAGE) { Ok(GuestAddress(entry)) } else { Err(Status::INVALID_PRP_OFFSET) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(pieces: &[(GuestAddress, u64)]) -> Vec<(u64, u64)> {
        pieces.iter().map(|(address, len)| (address.0, *len)).collect()
    }

    #[test]
    fn two_entries_cover_up_to_two_pages() {
        let memory = GuestMemory::flat(0x1000).unwrap();
        let two = |prp1, prp2, len| pieces(&memory, prp1, prp2, len).map(|p| at(&p));
        assert_eq!(two(0x1e04, 0xdead, 0x1fc).unwrap(), [(0x1e04, 0x1fc)]);
        assert_eq!(two(0x1e00, 0x5000, 0x400).unwrap(), [(0x1e00, 0x200), (0x5000, 0x200)]);
        assert_eq!(two(0x1000, 0x5000, 0x2000).unwrap(), [(0x1000, 0x1000), (0x5000, 0x1000)]);
        assert_eq!(two(0x1e00, 0x5004, 0x400), Err(Status::INVALID_PRP_OFFSET));
        assert_eq!(two(0x1e01, 0x5000, 0x400), Err(Status::INVALID_PRP_OFFSET));
    }

    #[test]
    fn list_starts_anywhere_and_goes_on_in_further_pages() {
        let memory = GuestMemory::flat(0x1_0000).unwrap();
        let put = |address, value: u64| memory.write(GuestAddress(address), value).unwrap();
        // Two entries are left in the first page of the list: one for data, one for the next page.
        put(0x2ff0, 0x10_0000);
        put(0x2ff8, 0x4000);
        for i in 0..511 {
            put(0x4000 + i * 8, 0x20_0000 + i * 0x1000);
        }
        put(0x4ff8, 0x6000);
        put(0x6000, 0x80_0000);
        put(0x6008, 0x90_0000);
        let data = pieces(&memory, 0x80_0800, 0x2ff0, 0x800 + 0x1000 * 513 + 4).unwrap();
        let data = at(&data);
        assert_eq!(data.len(), 1 + 513 + 1);
        assert_eq!(data[..3], [(0x80_0800, 0x800), (0x10_0000, 0x1000), (0x20_0000, 0x1000)]);
        assert_eq!(data[512..], [(0x20_0000 + 510 * 0x1000, 0x1000), (0x80_0000, 0x1000), (0x90_0000, 4)]);
        // An entry that is the last in its page and the last of all is for data.
        put(0x2ff8, 0x7000);
        let data = pieces(&memory, 0, 0x2ff0, 0x3000).unwrap();
        assert_eq!(at(&data)[2], (0x7000, 0x1000));
    }

    #[test]
    fn wrong_lists_are_refused() {
        let memory = GuestMemory::flat(0x3000).unwrap();
        let list = |prp2| pieces(&memory, 0, prp2, 0x3000).map(|_| ());
        assert_eq!(list(0x2004), Err(Status::INVALID_PRP_OFFSET));
        assert_eq!(list(0x3000), Err(Status::DATA_TRANSFER_ERROR));
        memory.write(GuestAddress(0x2ff8), 0x2008_u64).unwrap();
        assert_eq!(list(0x2ff8), Err(Status::INVALID_PRP_OFFSET), "the next page of a list is a whole page");
        assert_eq!(list(u64::MAX - 7), Err(Status::DATA_TRANSFER_ERROR));
        memory.write(GuestAddress(0x2000), 0x1008_u64).unwrap();
        assert_eq!(list(0x2000), Err(Status::INVALID_PRP_OFFSET));
        // A list that leads to itself ends with the data.
        memory.write(GuestAddress(0x2ff8), 0x2000_u64).unwrap();
        memory.write(GuestAddress(0x2000), 0_u64).unwrap();
        assert!(pieces(&memory, 0, 0x2ff8, 1 << 20).is_ok());
    }
}
