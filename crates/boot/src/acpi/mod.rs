//! ACPI tables: how the guest learns of its CPUs, interrupts and fixed hardware (ACPI 6.5 5.2).
//!
//! The tables lie together in RAM at an address of the caller's choice, the firmware ACPI control structure
//! first, on a page of its own because it is memory that the guest writes to; the root pointer lies below 1 MiB, where
//! operating systems search for it (ACPI 6.5 5.2.5.1).

mod dsdt;
mod fadt;
mod madt;
mod pci;
mod resource;
mod wdat;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs};
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange};

use crate::{BootError, PlatformDescription};

/// The most vCPUs that the tables describe.
pub const MAX_CPUS: u32 = 1024;
/// Where the root pointer lies.
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);

/// Who made the tables.
const OEM: [u8; 6] = *b"RINGFN";
const OEM_TABLE: [u8; 8] = *b"RINGFNCE";
const OEM_REVISION: u32 = 1;

/// An empty table with a header.
fn table(signature: &[u8; 4], revision: u8) -> Sdt {
    Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION)
}

/// Finished tables, made for one address.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    base: u64,
    /// From `base`: the FACS page, then the tables.
    data: Vec<u8>,
    rsdp: [u8; 36],
}

/// Bytes set aside for the FACS.
const FACS_PAGE: u64 = 0x1000;
/// Where the VM generation ID is in the same page, away from the cache lines of the FACS.
const GENERATION_ID: u64 = 0x800;

impl AcpiTables {
    /// Makes the tables for a machine with `cpus` vCPUs and no more RAM than below 4 GiB, to lie at `base`
    /// (page-aligned, below 4 GiB).
    ///
    /// # Errors
    /// [`BootError::CpuCount`] or [`BootError::BadPlatform`].
    pub fn build(platform: &PlatformDescription, cpus: u32, base: u64) -> Result<Self, BootError> {
        Self::build_above(platform, cpus, base, &[])
    }

    /// As [`AcpiTables::build`], with the 64-bit PCI window above the given RAM.
    ///
    /// # Errors
    /// [`BootError::CpuCount`] or [`BootError::BadPlatform`].
    pub fn build_above(
        platform: &PlatformDescription,
        cpus: u32,
        base: u64,
        ram: &[GuestRange],
    ) -> Result<Self, BootError> {
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(BootError::CpuCount(cpus));
        }
        let mut facs = Vec::new();
        facs::FACS::new().to_aml_bytes(&mut facs);
        let mut tables = Tables { base, data: facs };
        tables.data.resize(FACS_PAGE as usize, 0);
        if let (Some(id), Some(place)) =
            (platform.generation_id, tables.data.get_mut(GENERATION_ID as usize..GENERATION_ID as usize + 16))
        {
            place.copy_from_slice(&id);
        }

        let dsdt = tables.add(&dsdt::build(platform, cpus, ram, base + GENERATION_ID)?)?;
        let fadt = tables.add(&fadt::build(platform, dsdt, tables.base32()?))?;
        let madt = tables.add(madt::build(platform, cpus).as_slice())?;
        let mut found = vec![fadt, madt];
        if let Some(ecam) = platform.pci_ecam {
            found.push(tables.add(pci::mcfg(ecam).as_slice())?);
        }
        if let Some(watchdog) = platform.watchdog {
            found.push(tables.add(wdat::build(&watchdog).as_slice())?);
        }
        let (mut rsdt, mut xsdt) = (table(b"RSDT", 1), table(b"XSDT", 1));
        for address in found {
            rsdt.append_slice(&address.to_le_bytes());
            xsdt.append_slice(&u64::from(address).to_le_bytes());
        }
        let rsdt = tables.add(rsdt.as_slice())?;
        let xsdt = tables.add(xsdt.as_slice())?;
        Ok(Self { base, data: tables.data, rsdp: rsdp(rsdt, xsdt) })
    }

    /// Bytes in all, the root pointer not counted.
    pub fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// The tables' memory, which the guest may reuse once it has read them; whole pages.
    pub fn data_range(&self) -> GuestRange {
        GuestRange::new(self.base + FACS_PAGE, (self.size() - FACS_PAGE).next_multiple_of(0x1000))
    }

    /// The FACS's memory, which the guest must keep; one page.
    pub fn facs_range(&self) -> GuestRange {
        GuestRange::new(self.base, FACS_PAGE)
    }

    /// Where the VM generation ID is, if there is one.
    pub fn generation_id(&self) -> GuestAddress {
        GuestAddress(self.base + GENERATION_ID)
    }

    /// Writes the tables and the root pointer.
    ///
    /// # Errors
    /// [`BootError::Memory`] if there is no memory at their address or at [`RSDP`].
    pub fn write(&self, memory: &GuestMemory) -> Result<(), BootError> {
        memory.write_bytes(GuestAddress(self.base), &self.data).map_err(BootError::memory("ACPI tables"))?;
        memory.write_bytes(RSDP, &self.rsdp).map_err(BootError::memory("the ACPI root pointer"))
    }
}

struct Tables {
    base: u64,
    data: Vec<u8>,
}

impl Tables {
    fn base32(&self) -> Result<u32, BootError> {
        u32::try_from(self.base).map_err(|_| BootError::BadPlatform("the ACPI tables must lie below 4 GiB"))
    }

    /// Appends a table, aligned to 64 bytes, and returns its address.
    fn add(&mut self, bytes: &[u8]) -> Result<u32, BootError> {
        let offset = self.data.len().next_multiple_of(64);
        self.data.resize(offset, 0);
        self.data.extend_from_slice(bytes);
        let too_high = BootError::BadPlatform("the ACPI tables must lie below 4 GiB");
        u32::try_from(offset).ok().and_then(|o| self.base32().ok()?.checked_add(o)).ok_or(too_high)
    }
}

/// The root pointer (ACPI 6.5 5.2.5.3). It names the 32-bit table, too, for systems that know only ACPI 1.0.
fn rsdp(rsdt: u32, xsdt: u32) -> [u8; 36] {
    let mut p = [0; 36];
    p[0..8].copy_from_slice(b"RSD PTR ");
    p[9..15].copy_from_slice(&OEM);
    p[15] = 2;
    p[16..20].copy_from_slice(&rsdt.to_le_bytes());
    p[20..24].copy_from_slice(&36_u32.to_le_bytes());
    p[24..32].copy_from_slice(&u64::from(xsdt).to_le_bytes());
    p[8] = checksum(&p[0..20]);
    p[32] = checksum(&p);
    p
}

/// The byte that makes the sum of all bytes zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests;
