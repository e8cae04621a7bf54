//! SMBIOS: what the machine is called and made of (DMTF DSP0134 3.7).

use ringfence_memory::{GuestAddress, GuestMemory};

use crate::acpi::checksum;
use crate::{BootError, PlatformDescription};

/// Where the entry point lies; operating systems search the segment F000 for it.
pub const ENTRY_POINT: GuestAddress = GuestAddress(0xf_0000);
/// Where the structures lie.
const TABLE: GuestAddress = GuestAddress(0xf_0020);

/// The maker's name.
const MAKER: &str = "Ringfence";
/// A value that is "unknown" in most enumerations.
const UNKNOWN: u8 = 2;

/// Structures under construction.
#[derive(Debug, Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    longest: u16,
}

impl Structures {
    /// Appends a structure; `handle` names it, `fields` are those after the handle.
    fn add(&mut self, kind: u8, handle: u16, fields: &[u8], strings: &[&str]) {
        let start = self.bytes.len();
        self.bytes.extend([kind, fields.len() as u8 + 4]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(fields);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        // The set of strings ends with another NUL; an empty one has two.
        self.bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
        self.count += 1;
        self.longest = self.longest.max((self.bytes.len() - start) as u16);
    }
}

/// Memory size for types 16, 17 and 19, in bytes.
fn structures(platform: &PlatformDescription, cpus: u32, memory_bytes: u64) -> Structures {
    let mut all = Structures::default();
    let cpus = cpus.min(0xffff) as u16;
    let cpus_byte = u8::try_from(cpus).unwrap_or(0xff);
    let kib = memory_bytes >> 10;
    let mib = memory_bytes >> 20;

    // BIOS information: vendor, version, segment, date, size, characteristics ("not supported"), then the
    // extension bytes: ACPI; virtual machine.
    let mut bios = vec![1, 2, 0, 0xe8, 3, 0];
    bios.extend((1_u64 << 3).to_le_bytes());
    bios.extend([1, 1 << 4, 0, 0, 0xff, 0xff]);
    all.add(0, 0, &bios, &[MAKER, env!("CARGO_PKG_VERSION"), "01/01/2025"]);

    // System: maker, product, version, serial number, UUID, wake-up by the power switch, SKU, family.
    let mut system = vec![1, 2, 3, 0];
    system.extend(platform.uuid);
    system.extend([6, 0, 0]);
    all.add(1, 0x100, &system, &[MAKER, "Ringfence virtual machine", env!("CARGO_PKG_VERSION")]);

    // Chassis: maker, type "other", the rest unknown or safe.
    all.add(3, 0x300, &[1, 1, 0, 0, 0, 3, 3, 3, UNKNOWN, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[MAKER]);

    // Processor: socket, central processor, family "see family 2", maker, identifier, version, voltage, clocks
    // unknown, populated and enabled, upgrade, caches not given, cores and threads, 64-bit capable.
    let mut cpu = vec![1, 3, 0xfe, 2];
    cpu.extend([0; 8]);
    cpu.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x41, 1]);
    cpu.extend([0xff; 6]);
    cpu.extend([0, 0, 0, cpus_byte, cpus_byte, cpus_byte, 0x04, 0x00, 0x01, 0x00]);
    for _ in 0..3 {
        cpu.extend(cpus.to_le_bytes());
    }
    all.add(4, 0x400, &cpu, &["CPU 0", MAKER]);

    // Physical memory array: on the board, system memory, no error correction; in KiB if that fits.
    let mut array = vec![1, 3, 3];
    array.extend(u32::try_from(kib).ok().filter(|k| *k < 0x8000_0000).unwrap_or(0x8000_0000).to_le_bytes());
    array.extend([0xfe, 0xff, 1, 0]);
    array.extend(memory_bytes.to_le_bytes());
    all.add(16, 0x1000, &array, &[]);

    // Memory device: part of that array, widths unknown, size in MiB (extended if it does not fit), DIMM, RAM.
    let mut device = 0x1000_u16.to_le_bytes().to_vec();
    device.extend([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    device.extend(u16::try_from(mib).ok().filter(|m| *m < 0x7fff).unwrap_or(0x7fff).to_le_bytes());
    device.extend([9, 0, 1, 0, 7, 2, 0]);
    device.extend([0, 0, 2, 0, 0, 0, 0]);
    device.extend((u32::try_from(mib).unwrap_or(u32::MAX) & 0x7fff_ffff).to_le_bytes());
    device.extend([0; 8]);
    all.add(17, 0x1100, &device, &["DIMM 0", MAKER]);

    // Where the array is mapped: addresses in KiB, extended ones in bytes.
    let mut mapped = Vec::new();
    match u32::try_from(kib.saturating_sub(1)) {
        Ok(last) if last < u32::MAX => {
            mapped.extend(0_u32.to_le_bytes());
            mapped.extend(last.to_le_bytes());
        }
        _ => mapped.extend([0xff; 8]),
    }
    mapped.extend(0x1000_u16.to_le_bytes());
    mapped.push(1);
    mapped.extend(0_u64.to_le_bytes());
    mapped.extend(memory_bytes.saturating_sub(1).to_le_bytes());
    all.add(19, 0x1300, &mapped, &[]);

    // Boot information: no errors. End of table.
    all.add(32, 0x2000, &[0, 0, 0, 0, 0, 0, 0], &[]);
    all.add(127, 0x7f00, &[], &[]);
    all
}

/// Writes the tables. All RAM is told as one module.
///
/// # Errors
/// [`BootError::Memory`] if there is no memory in segment F000.
pub fn write(memory: &GuestMemory, platform: &PlatformDescription, cpus: u32) -> Result<(), BootError> {
    // The hole below 1 MiB belongs to the module, though it cannot be used.
    let size = memory.ram_size().next_multiple_of(1 << 20);
    let all = structures(platform, cpus, size);
    let fail = BootError::memory("the SMBIOS tables");
    memory.write_bytes(TABLE, &all.bytes).map_err(&fail)?;
    memory.write_bytes(ENTRY_POINT, &entry_point(&all)).map_err(&fail)
}

/// The 32-bit entry point (DSP0134 5.2.1), version 2.8.
fn entry_point(all: &Structures) -> [u8; 31] {
    let mut p = [0; 31];
    p[0..4].copy_from_slice(b"_SM_");
    p[5] = 31;
    (p[6], p[7]) = (2, 8);
    p[8..10].copy_from_slice(&all.longest.to_le_bytes());
    p[16..21].copy_from_slice(b"_DMI_");
    p[22..24].copy_from_slice(&(all.bytes.len() as u16).to_le_bytes());
    p[24..28].copy_from_slice(&(TABLE.0 as u32).to_le_bytes());
    p[28..30].copy_from_slice(&all.count.to_le_bytes());
    p[30] = 0x28;
    p[21] = checksum(&p[16..31]);
    p[4] = checksum(&p);
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at};

    /// The structures as an operating system finds them: type, formatted part, strings.
    fn walk(table: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let (mut rest, mut found) = (table, Vec::new());
        while rest.len() >= 4 {
            let (fixed, tail) = rest.split_at(rest[1].into());
            let end = tail.windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = tail[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            found.push((
                fixed[0],
                fixed.to_vec(),
                strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect(),
            ));
            rest = &tail[end + 2..];
        }
        assert!(rest.is_empty());
        found
    }

    #[test]
    fn structures_walk_to_the_end_with_their_lengths() {
        let memory = GuestMemory::flat(64 << 20).unwrap();
        write(&memory, &PlatformDescription { uuid: [7; 16], ..Default::default() }, 3).unwrap();
        let mut entry = [0; 31];
        memory.read_bytes(ENTRY_POINT, &mut entry).unwrap();
        assert_eq!((&entry[..4], checksum(&entry), checksum(&entry[16..])), (&b"_SM_"[..], 0, 0));
        let mut table = vec![0; u16_at(&entry, 22).unwrap().into()];
        memory.read_bytes(GuestAddress(u32_at(&entry, 24).unwrap().into()), &mut table).unwrap();
        let all = walk(&table);
        // Lengths of DSP0134's version 2.8 (type 4: 3.0) of each structure.
        let lengths: Vec<_> = all.iter().map(|s| (s.0, s.1.len())).collect();
        let expected = [(0, 24), (1, 27), (3, 22), (4, 48), (16, 23), (17, 40), (19, 31), (32, 11), (127, 4)];
        assert_eq!(lengths, expected);
        assert_eq!(all.len(), usize::from(u16_at(&entry, 28).unwrap()));
        assert_eq!(all[1].1[8..24], [7; 16]);
        assert_eq!(all[1].2[0], "Ringfence");
        assert_eq!((all[3].1[0x23], u16_at(&all[3].1, 0x2a)), (3, Some(3)), "cores");
        assert_eq!(u16_at(&all[5].1, 12), Some(64), "MiB of the module");
        assert_eq!(u32_at(&all[6].1, 8), Some((64 << 10) - 1), "its last KiB");
    }

    #[test]
    fn large_memory_uses_the_extended_fields() {
        let all = walk(&structures(&PlatformDescription::default(), 1, 4 << 40).bytes);
        assert_eq!(u16_at(&all[5].1, 12), Some(0x7fff));
        assert_eq!(u32_at(&all[5].1, 28), Some(4 << 20));
        assert_eq!(u32_at(&all[6].1, 4), Some(u32::MAX));
        assert_eq!(u32_at(&all[4].1, 7), Some(0x8000_0000));
    }
}
