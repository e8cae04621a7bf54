//! How much host memory a machine costs beyond what the guest touched.

use std::fs;
use std::ops::Range;

use ringfence_memory::{GuestAddress, GuestMemory};

/// Resident host memory of this process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// What the guest's memory takes: the pages that guest or loader have touched, in the granule of the host.
    pub guest: u64,
    /// Everything else: code, heap, stacks, caches of the engine.
    pub overhead: u64,
}

/// Asks the host; `None` where `/proc` is not mounted.
pub(crate) fn measure(memory: &GuestMemory) -> Option<MemoryUse> {
    let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
    let mut guest: Vec<Range<u64>> = Vec::new();
    for range in memory.ram() {
        if let Some(page) = memory.page(GuestAddress(range.start.0)) {
            let host = page.host as u64;
            guest.push(host..host.saturating_add(range.len));
        }
    }
    Some(sum(&smaps, &guest))
}

/// Adds up the `Rss` lines of mappings inside the ranges, and of the others.
///
/// A mapping can be larger than a range, since the host merges neighbours; it counts for the guest by its share.
fn sum(smaps: &str, guest: &[Range<u64>]) -> MemoryUse {
    let mut total = MemoryUse::default();
    let mut mapping = 0..0;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().strip_suffix("kB").and_then(|n| n.trim().parse().ok()).unwrap_or(0);
            let bytes = kib.saturating_mul(1024);
            let shared: u64 = guest
                .iter()
                .map(|range| mapping.end.min(range.end).saturating_sub(mapping.start.max(range.start)))
                .sum();
            // The host's own mappings are small beside the guest's, so what fits the guest's share is the guest's.
            let guests = bytes.min(shared);
            total.guest += guests;
            total.overhead += bytes - guests;
        } else if let Some(range) = address_range(line) {
            mapping = range;
        }
    }
    total
}

/// `start-end` at the beginning of a line.
fn address_range(line: &str) -> Option<Range<u64>> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_mapping_is_told_apart() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nRss:  8 kB\n4000-8000 r-xp 00000000 08:01 5 /bin/x\nRss: 12 kB\n";
        let sum = sum(smaps, std::slice::from_ref(&(0x1000..0x3000)));
        assert_eq!(sum, MemoryUse { guest: 8192, overhead: 12288 });
    }

    #[test]
    fn touched_guest_page_is_counted() {
        let memory = GuestMemory::flat(16 << 20).unwrap();
        memory.fill(GuestAddress(0), 1, 8 << 20).unwrap();
        let measured = measure(&memory).unwrap();
        assert!(measured.guest >= 8 << 20 && measured.guest <= 17 << 20, "{measured:?}");
        assert!(measured.overhead > 0);
    }
}
