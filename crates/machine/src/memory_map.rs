//! Where things lie in the guest's physical memory.
//!
//! ```text
//! 0          – A0000       RAM
//! A0000      – C0000       hole: VGA
//! C0000      – 100000      ROM: option ROMs, firmware tables
//! 100000     – C0000000    RAM, up to 3 GiB
//! C0000000   – 100000000   hole: PCI devices, I/O APIC, local APICs
//! 100000000  –             the rest of the RAM
//! ```

use ringfence_memory::{GuestMemory, GuestRange, MemoryError, RegionKind, RegionSpec};

/// Where the VGA window starts and the first piece of RAM ends.
const VGA: u64 = 0xa_0000;
/// Where option ROMs and the firmware's segment start.
const ROM: u64 = 0xc_0000;
/// Where RAM goes on above the first MiB.
const HIGH_RAM: u64 = 0x10_0000;
/// Where RAM stops below 4 GiB.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// Where RAM goes on.
pub const ABOVE_4G: u64 = 0x1_0000_0000;

/// The least memory a machine can have, in bytes: the first MiB and one more.
pub const SMALLEST: u64 = 2 << 20;
/// The most memory a machine can have, in bytes; keeps addresses well inside the 48 bits of a guest CPU.
pub const LARGEST: u64 = 8 << 40;

/// The regions of a machine with `size` bytes of memory, a multiple of 4 KiB from [`SMALLEST`] to [`LARGEST`].
///
/// As on a real PC, the 384 KiB between A0000 and 100000 count as memory but cannot be used as such.
pub fn regions(size: u64) -> Vec<RegionSpec> {
    let region = |start: u64, end: u64, kind| RegionSpec { range: GuestRange::new(start, end - start), kind };
    let mut regions = vec![
        region(0, VGA, RegionKind::Ram),
        region(ROM, HIGH_RAM, RegionKind::Rom),
        region(HIGH_RAM, size.clamp(SMALLEST, PCI_HOLE), RegionKind::Ram),
    ];
    if size > PCI_HOLE {
        regions.push(region(ABOVE_4G, ABOVE_4G + (size.min(LARGEST) - PCI_HOLE), RegionKind::Ram));
    }
    regions
}

/// Guest memory of `size` bytes laid out as above.
///
/// # Errors
/// [`MemoryError`] if the host has not enough address space.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    GuestMemory::new(&regions(size))
}

#[cfg(test)]
mod tests {
    use ringfence_memory::GuestAddress;

    use super::*;

    #[test]
    fn small_memory_stays_below_the_hole() {
        let memory = allocate(512 << 20).unwrap();
        assert_eq!(memory.ram_size(), (512 << 20) - (HIGH_RAM - VGA));
        assert!(memory.page(GuestAddress(VGA)).is_none());
        assert!(!memory.page(GuestAddress(0xf_0000)).unwrap().writable);
        assert!(memory.page(GuestAddress(512 << 20)).is_none());
    }

    #[test]
    fn large_memory_goes_on_above_4_gib() {
        let ram: Vec<_> = regions(5 << 30).into_iter().filter(|r| r.kind == RegionKind::Ram).collect();
        assert_eq!(ram[1].range.end(), PCI_HOLE);
        assert_eq!((ram[2].range.start.0, ram[2].range.end()), (4 << 30, 6 << 30));
    }
}
