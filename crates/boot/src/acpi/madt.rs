//! The multiple APIC description table: CPUs and interrupt controllers (ACPI 6.5 5.2.12).

use acpi_tables::sdt::Sdt;

use super::table;
use crate::PlatformDescription;

/// Local APIC identifiers from here on can only be told to x2APICs (255 is the broadcast address).
const FIRST_X2APIC: u32 = 255;
/// Interrupt flags: active high, level-triggered (ACPI 6.5 table 5.26).
const LEVEL_HIGH: u16 = 0b1101;
/// Interrupt flags: as the bus has it.
const CONFORMS: u16 = 0;

/// Builds the table; a vCPU's APIC identifier and processor UID are both its index.
pub(super) fn build(platform: &PlatformDescription, cpus: u32) -> Sdt {
    let mut madt = table(b"APIC", 4);
    let mut body = Vec::new();
    body.extend(platform.local_apic.to_le_bytes());
    // PCAT_COMPAT: the 8259 pair must be masked before the APICs are used.
    body.extend(u32::from(platform.legacy_pics).to_le_bytes());
    for cpu in 0..cpus {
        local_apic(&mut body, cpu);
    }
    // I/O APIC, its inputs from global system interrupt 0 on.
    body.extend([1, 12, platform.io_apic_id, 0]);
    body.extend(platform.io_apic.to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    // The PIT is wired to input 2, since the 8259 pair takes input 0.
    source_override(&mut body, 0, 2, CONFORMS);
    source_override(&mut body, platform.sci_irq, platform.sci_irq.into(), LEVEL_HIGH);
    // NMI on LINT1 of every CPU.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    if cpus > FIRST_X2APIC {
        body.extend([0xa, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    madt.append_slice(&body);
    madt
}

fn local_apic(body: &mut Vec<u8>, cpu: u32) {
    const ENABLED: u32 = 1;
    match u8::try_from(cpu) {
        Ok(id) if cpu < FIRST_X2APIC => {
            body.extend([0, 8, id, id]);
            body.extend(ENABLED.to_le_bytes());
        }
        _ => {
            body.extend([9, 16, 0, 0]);
            body.extend(cpu.to_le_bytes());
            body.extend(ENABLED.to_le_bytes());
            body.extend(cpu.to_le_bytes());
        }
    }
}

fn source_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend([2, 10, 0, irq]);
    body.extend(gsi.to_le_bytes());
    body.extend(flags.to_le_bytes());
}
