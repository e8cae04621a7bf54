//! Which sectors of a disk a layer above it holds.

use std::collections::BTreeMap;

use crate::SECTOR;

/// Sectors in a chunk: one word of bits times 64, which is 2 MiB of disk.
const CHUNK: u64 = 64 * 64;

#[derive(Clone, Debug)]
enum Chunk {
    Some(Box<[u64; 64]>),
    All,
}

/// A set of sectors. What is empty takes no room, a full chunk hardly any: a disk of 1 TiB that is held wholly
/// takes some 24 MiB, at worst (scattered sectors in every chunk) 256 MiB.
#[derive(Clone, Debug, Default)]
pub(crate) struct SectorSet {
    chunks: BTreeMap<u64, Chunk>,
}

/// A part of a range that is wholly inside or wholly outside the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) inside: bool,
}

impl SectorSet {
    /// Adds the sectors of a range of bytes that starts and ends on a sector boundary.
    pub(crate) fn insert(&mut self, offset: u64, len: u64) {
        let (mut sector, end) = (offset / SECTOR, offset.saturating_add(len) / SECTOR);
        while sector < end {
            let key = sector / CHUNK;
            let stop = end.min((key + 1) * CHUNK);
            if stop - sector == CHUNK {
                self.chunks.insert(key, Chunk::All);
            } else if let Chunk::Some(bits) =
                self.chunks.entry(key).or_insert_with(|| Chunk::Some(Box::new([0; 64])))
            {
                set(bits, sector % CHUNK, sector % CHUNK + (stop - sector));
                if bits.iter().all(|word| *word == u64::MAX) {
                    self.chunks.insert(key, Chunk::All);
                }
            }
            sector = stop;
        }
    }

    fn contains(&self, sector: u64) -> bool {
        match self.chunks.get(&(sector / CHUNK)) {
            None => false,
            Some(Chunk::All) => true,
            Some(Chunk::Some(bits)) => {
                let at = sector % CHUNK;
                bits[(at / 64) as usize] >> (at % 64) & 1 != 0
            }
        }
    }

    /// The first sector from `sector` on, before `end`, that is inside or not as `inside` says; else `end`.
    fn find(&self, sector: u64, end: u64, inside: bool) -> u64 {
        let mut at = sector;
        while at < end {
            let (key, index) = (at / CHUNK, at % CHUNK / 64);
            let word = match self.chunks.get(&key) {
                None if inside => {
                    // What is missing can be skipped up to the next chunk there is.
                    at = self.chunks.range(key..).next().map_or(end, |(next, _)| next * CHUNK);
                    continue;
                }
                Some(Chunk::All) if !inside => {
                    at = (key + 1) * CHUNK;
                    continue;
                }
                None | Some(Chunk::All) => return at,
                Some(Chunk::Some(bits)) if inside => bits[index as usize],
                Some(Chunk::Some(bits)) => !bits[index as usize],
            };
            match word & (u64::MAX << (at % 64)) {
                0 => at = (at / 64 + 1) * 64,
                found => return (at / 64 * 64 + u64::from(found.trailing_zeros())).min(end),
            }
        }
        end
    }

    /// Splits a range of bytes into runs, in order.
    pub(crate) fn runs(&self, offset: u64, len: u64) -> impl Iterator<Item = Run> + '_ {
        let (mut at, end) = (offset / SECTOR, offset.saturating_add(len) / SECTOR);
        std::iter::from_fn(move || {
            let from = (at < end).then_some(at)?;
            let inside = self.contains(from);
            at = self.find(from + 1, end, !inside);
            Some(Run { offset: from * SECTOR, len: (at - from) * SECTOR, inside })
        })
    }
}

/// Sets the bits from `from` to before `to`.
fn set(bits: &mut [u64; 64], from: u64, to: u64) {
    for (index, word) in (0_u64..).zip(bits.iter_mut()) {
        let (low, high) = (from.max(index * 64), to.min(index * 64 + 64));
        if low < high {
            *word |= (u64::MAX >> (64 - (high - low))) << (low % 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_what_was_inserted() {
        let mut set = SectorSet::default();
        set.insert(2 * SECTOR, 3 * SECTOR);
        set.insert((CHUNK - 1) * SECTOR, 2 * SECTOR);
        let runs: Vec<_> = set
            .runs(0, (CHUNK + 4) * SECTOR)
            .map(|r| (r.offset / SECTOR, r.len / SECTOR, r.inside))
            .collect();
        let expected =
            [(0, 2, false), (2, 3, true), (5, CHUNK - 6, false), (CHUNK - 1, 2, true), (CHUNK + 1, 3, false)];
        assert_eq!(runs, expected);
    }

    #[test]
    fn chunk_filled_in_pieces_becomes_whole() {
        let mut set = SectorSet::default();
        set.insert(0, 5 * SECTOR);
        set.insert(5 * SECTOR, (3 * CHUNK - 5) * SECTOR);
        assert!(set.chunks.values().all(|c| matches!(c, Chunk::All)) && set.chunks.len() == 3);
        let whole = Run { offset: SECTOR, len: (3 * CHUNK - 1) * SECTOR, inside: true };
        assert_eq!(set.runs(SECTOR, (3 * CHUNK - 1) * SECTOR).collect::<Vec<_>>(), [whole]);
    }

    #[test]
    fn random_ranges_agree_with_a_plain_table() {
        let mut plain = vec![false; 3 * CHUNK as usize];
        let mut set = SectorSet::default();
        let mut random = 7_u64;
        for _ in 0..200 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (from, len) = ((random >> 40) % (3 * CHUNK - 300), (random >> 20) % 300 + 1);
            set.insert(from * SECTOR, len * SECTOR);
            plain[from as usize..(from + len) as usize].fill(true);
            let mut seen = Vec::new();
            for run in set.runs(0, 3 * CHUNK * SECTOR) {
                seen.extend(std::iter::repeat_n(run.inside, (run.len / SECTOR) as usize));
            }
            assert_eq!(seen, plain);
        }
    }
}
