//! The memory map as firmware reports it (ACPI 6.5 15.1).

use ringfence_memory::GuestRange;

use crate::PlatformDescription;
use crate::acpi::AcpiTables;
use crate::layout::{HIGH_START, LOW_END, Layout};

/// What a range of the map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables; free once they have been read.
    AcpiData = 3,
    /// ACPI's own memory; to be kept.
    AcpiNvs = 4,
}

/// An entry of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// Where.
    pub range: GuestRange,
    /// What.
    pub kind: E820Kind,
}

/// The start of the segment that firmware keeps for itself and its tables.
const FIRMWARE: u64 = 0xe_0000;

/// The map of a machine: its RAM, less what firmware keeps. Ascending, without overlaps.
pub(crate) fn map(layout: &Layout, acpi: &AcpiTables, platform: &PlatformDescription) -> Vec<E820Entry> {
    let mut kept = vec![
        E820Entry { range: GuestRange::new(LOW_END, 0xa_0000 - LOW_END), kind: E820Kind::Reserved },
        E820Entry { range: GuestRange::new(FIRMWARE, HIGH_START - FIRMWARE), kind: E820Kind::Reserved },
        E820Entry { range: acpi.data_range(), kind: E820Kind::AcpiData },
        E820Entry { range: acpi.facs_range(), kind: E820Kind::AcpiNvs },
    ];
    if let Some(ecam) = platform.pci_ecam {
        let len = ecam.last.saturating_sub(ecam.start).saturating_add(1);
        kept.push(E820Entry { range: GuestRange::new(ecam.start, len), kind: E820Kind::Reserved });
    }
    kept.sort_by_key(|e| e.range.start);
    let mut entries = kept.clone();
    for ram in layout.ram() {
        // RAM between the VGA window and 1 MiB shadows ROM; no operating system counts on it.
        let mut at =
            if ram.start.0 < HIGH_START && ram.start.0 >= LOW_END { HIGH_START } else { ram.start.0 };
        let mut cuts: Vec<GuestRange> = kept.iter().map(|e| e.range).collect();
        cuts.push(GuestRange::new(LOW_END, HIGH_START - LOW_END));
        cuts.push(GuestRange::new(ram.end(), 0));
        cuts.sort_by_key(|c| (c.start, c.end()));
        for cut in cuts {
            let end = cut.start.0.min(ram.end());
            if end > at {
                entries.push(E820Entry { range: GuestRange::new(at, end - at), kind: E820Kind::Ram });
            }
            at = at.max(cut.end());
        }
    }
    entries.sort_by_key(|e| e.range.start);
    entries
}

#[cfg(test)]
mod tests {
    use ringfence_memory::{GuestMemory, RegionKind, RegionSpec};

    use super::*;

    #[test]
    fn map_of_a_large_machine_has_both_sides_of_the_hole() {
        let region = |start, end, kind| RegionSpec { range: GuestRange::new(start, end - start), kind };
        let memory = GuestMemory::new(&[
            region(0, 0xa_0000, RegionKind::Ram),
            region(0xc_0000, 0x10_0000, RegionKind::Rom),
            region(0x10_0000, 0xc000_0000, RegionKind::Ram),
            region(1 << 32, 5 << 30, RegionKind::Ram),
        ])
        .unwrap();
        let acpi = AcpiTables::build(&PlatformDescription::default(), 1, 0xbfff_0000).unwrap();
        let map = map(&Layout::new(&memory), &acpi, &PlatformDescription::default());
        let text: Vec<_> = map.iter().map(|e| (e.range.start.0, e.range.end(), e.kind)).collect();
        let (data, facs) = (acpi.data_range(), acpi.facs_range());
        assert_eq!(facs.end(), data.start.0);
        let expected = [
            (0, 0x9_fc00, E820Kind::Ram),
            (0x9_fc00, 0xa_0000, E820Kind::Reserved),
            (0xe_0000, 0x10_0000, E820Kind::Reserved),
            (0x10_0000, 0xbfff_0000, E820Kind::Ram),
            (0xbfff_0000, 0xbfff_1000, E820Kind::AcpiNvs),
            (0xbfff_1000, data.end(), E820Kind::AcpiData),
            (data.end(), 0xc000_0000, E820Kind::Ram),
            (0xc000_0000, 0xd000_0000, E820Kind::Reserved),
            (1 << 32, 5 << 30, E820Kind::Ram),
        ];
        assert_eq!(text, expected);
    }

    #[test]
    fn flat_memory_leaves_out_the_window_below_one_mib() {
        let memory = GuestMemory::flat(16 << 20).unwrap();
        let acpi = AcpiTables::build(&PlatformDescription::default(), 1, 0xff_0000).unwrap();
        let map = map(&Layout::new(&memory), &acpi, &PlatformDescription::default());
        assert!(map.windows(2).all(|w| w[0].range.end() <= w[1].range.start.0), "{map:?}");
        let usable = |at: u64| {
            map.iter()
                .any(|e| e.kind == E820Kind::Ram && e.range.contains(ringfence_memory::GuestAddress(at), 1))
        };
        assert!(usable(0x1000) && !usable(0xa_0000) && !usable(0xd_0000) && usable(0x10_0000));
    }
}
