//! Who has which part of guest memory.

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange};

use crate::BootError;

/// End of the lowest RAM that software may use: the extended BIOS data area follows (1 KiB below 640 KiB).
pub(crate) const LOW_END: u64 = 0x9_fc00;
/// Where RAM goes on above the VGA window and the firmware's segments.
pub(crate) const HIGH_START: u64 = 0x10_0000;
/// Where RAM below 4 GiB ends at the latest: devices have their addresses there. Used for advice only.
pub(crate) const LOW_RAM_LIMIT: u64 = 3 << 30;
/// The end of the 32-bit address space.
pub(crate) const FOUR_GIB: u64 = 1 << 32;

/// The claim of whatever kernel is loaded.
pub(crate) const KERNEL: &str = "the kernel";

/// A part of guest memory that something occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Where.
    pub range: GuestRange,
    /// By what.
    pub what: &'static str,
}

/// What of guest memory is RAM and who occupies which part of it while booting.
#[derive(Clone, Debug)]
pub struct Layout {
    /// RAM, ascending, neighbours merged.
    ram: Vec<GuestRange>,
    claims: Vec<Claim>,
}

impl Layout {
    /// The layout of a memory; the interrupt vectors and BIOS data (the first 4 KiB) and everything from the
    /// extended BIOS data area up to 1 MiB are taken.
    pub fn new(memory: &GuestMemory) -> Self {
        let mut ram: Vec<GuestRange> = Vec::new();
        for range in memory.ram() {
            match ram.last_mut() {
                Some(last) if last.end() == range.start.0 => last.len += range.len,
                _ => ram.push(range),
            }
        }
        let claims = vec![
            Claim { range: GuestRange::new(0, 0x1000), what: "the BIOS data area" },
            Claim {
                range: GuestRange::new(LOW_END, HIGH_START - LOW_END),
                what: "the firmware's area below 1 MiB",
            },
        ];
        Self { ram, claims }
    }

    /// The parts of RAM, ascending.
    pub fn ram(&self) -> &[GuestRange] {
        &self.ram
    }

    /// Everything claimed so far.
    pub fn claims(&self) -> &[Claim] {
        &self.claims
    }

    /// The end of the RAM that begins at or below 1 MiB and lies below 4 GiB; 0 if there is none.
    pub fn low_ram_end(&self) -> u64 {
        let holds = |r: &&GuestRange| r.contains(GuestAddress(HIGH_START), 1);
        self.ram.iter().find(holds).map_or(0, |r| r.end().min(FOUR_GIB))
    }

    fn collision(&self, range: &GuestRange) -> Option<&Claim> {
        self.claims.iter().find(|c| c.range.overlaps(range))
    }

    /// Whether a range is RAM that nobody has claimed.
    pub fn is_free(&self, range: &GuestRange) -> bool {
        self.ram.iter().any(|r| r.contains(range.start, range.len)) && self.collision(range).is_none()
    }

    /// Claims exactly this range for a part of the kernel.
    ///
    /// # Errors
    /// [`BootError::KernelDoesNotFit`] if it is not all RAM, [`BootError::Overlap`] if it is taken.
    pub fn claim(&mut self, range: GuestRange, what: &'static str) -> Result<(), BootError> {
        let (start, end) = (range.start.0, range.end());
        if !self.ram.iter().any(|r| r.contains(range.start, range.len)) {
            // What lies at the top of RAM moves up with it, so it counts on top.
            let above: u64 =
                self.claims.iter().filter(|c| c.range.start.0 > HIGH_START).map(|c| c.range.len).sum();
            return Err(BootError::KernelDoesNotFit { start, end, needed: end.saturating_add(above) });
        }
        if let Some(other) = self.collision(&range) {
            return Err(BootError::Overlap { what, start, end, other: other.what });
        }
        self.claims.push(Claim { range, what });
        Ok(())
    }

    /// Gives up every claim of this name.
    pub(crate) fn release(&mut self, what: &'static str) {
        self.claims.retain(|c| c.what != what);
    }

    /// Claims the highest free `size` bytes that end at or below `limit`. `align` is a power of two.
    pub fn claim_highest(
        &mut self,
        size: u64,
        align: u64,
        limit: u64,
        what: &'static str,
    ) -> Option<GuestRange> {
        let range = self.ram.iter().rev().find_map(|ram| {
            let mut top = ram.end().min(limit);
            loop {
                let start = top.checked_sub(size)? & !(align - 1);
                let range = GuestRange::new(start, size);
                if !ram.contains(range.start, size) {
                    return None;
                }
                match self.collision(&range) {
                    None => return Some(range),
                    Some(claim) => top = claim.range.start.0,
                }
            }
        })?;
        self.claims.push(Claim { range, what });
        Some(range)
    }

    /// Claims the lowest free `size` bytes between `floor` and `limit`. `align` is a power of two.
    pub fn claim_lowest(
        &mut self,
        size: u64,
        align: u64,
        floor: u64,
        limit: u64,
        what: &'static str,
    ) -> Option<GuestRange> {
        let range = self.ram.iter().find_map(|ram| {
            let mut bottom = ram.start.0.max(floor);
            loop {
                let start = bottom.checked_next_multiple_of(align)?;
                let range = GuestRange::new(start, size);
                if !ram.contains(range.start, size) || range.end() > limit {
                    return None;
                }
                match self.collision(&range) {
                    None => return Some(range),
                    Some(claim) => bottom = claim.range.end(),
                }
            }
        })?;
        self.claims.push(Claim { range, what });
        Some(range)
    }

    /// Claims room below 640 KiB for a structure that the loader hands over.
    ///
    /// # Errors
    /// [`BootError::NoRoom`].
    pub(crate) fn claim_small(
        &mut self,
        size: u64,
        align: u64,
        what: &'static str,
    ) -> Result<GuestRange, BootError> {
        self.claim_lowest(size, align, 0x1000, LOW_END, what).ok_or(BootError::NoRoom { what, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: u64) -> Layout {
        Layout::new(&GuestMemory::flat(size).unwrap())
    }

    #[test]
    fn highest_goes_below_what_is_there() {
        let mut layout = layout(16 << 20);
        let first = layout.claim_highest(0x1800, 0x1000, FOUR_GIB, "a").unwrap();
        let second = layout.claim_highest(0x1800, 0x1000, FOUR_GIB, "b").unwrap();
        assert_eq!(first.start.0, 0xff_e000);
        assert_eq!(second.start.0, 0xff_c000);
        assert!(!layout.is_free(&first));
        layout.release("a");
        assert!(layout.is_free(&first));
    }

    #[test]
    fn lowest_skips_claims_and_alignment() {
        let mut layout = layout(16 << 20);
        assert_eq!(layout.claim_small(0x10, 16, "a").unwrap().start.0, 0x1000);
        assert_eq!(layout.claim_small(0x1000, 0x1000, "b").unwrap().start.0, 0x2000);
        assert_eq!(layout.claim_lowest(0x20_0000, 0x1000, 0, FOUR_GIB, "c").unwrap().start.0, HIGH_START);
    }

    #[test]
    fn no_room_gives_none() {
        let mut layout = layout(2 << 20);
        assert!(layout.claim_highest(2 << 20, 1, FOUR_GIB, "a").is_none());
        assert!(layout.claim_lowest(u64::MAX, 0x1000, 0, u64::MAX, "a").is_none());
        assert!(layout.claim_highest(u64::MAX, 0x1000, u64::MAX, "a").is_none());
    }

    #[test]
    fn outside_and_overlapping_claims_are_refused() {
        let mut layout = layout(2 << 20);
        let outside = layout.claim(GuestRange::new(0x1f_f000, 0x2000), "kernel").unwrap_err();
        assert!(matches!(outside, BootError::KernelDoesNotFit { needed: 0x20_1000, .. }), "{outside}");
        layout.claim(GuestRange::new(0x10_0000, 0x2000), "kernel").unwrap();
        let twice = layout.claim(GuestRange::new(0x10_1fff, 1), "more").unwrap_err();
        assert!(matches!(twice, BootError::Overlap { other: "kernel", .. }), "{twice}");
        assert!(layout.claim(GuestRange::new(u64::MAX - 4, 8), "wrapping").is_err());
    }
}
