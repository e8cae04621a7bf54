//! The differentiated system description table: devices that cannot be discovered otherwise (ACPI 6.5 5.2.11.1).

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Package, Scope};
use ringfence_memory::GuestRange;

use super::pci::{Ecam, HostBridge};
use super::resource::{IsaDevice, path};
use super::table;
use crate::{BootError, MemoryWindow, PlatformDescription};

pub(super) fn build(
    platform: &PlatformDescription,
    cpus: u32,
    ram: &[GuestRange],
    generation_id: u64,
) -> Result<Vec<u8>, BootError> {
    check(platform)?;
    let mut aml = Vec::new();
    let s5 = platform.s5_sleep_type;
    // PM1a and PM1b sleep types, then two reserved entries (ACPI 6.5 7.4.2).
    Name::new(path("_S5_"), &Package::new(vec![&s5, &s5, &0_u8, &0_u8])).to_aml_bytes(&mut aml);
    let (processors, ecam) = (Processors(cpus), platform.pci_ecam.map(Ecam));
    let bridge = HostBridge { platform, window_64: platform.pci_window_64(ram) };
    let mut devices: Vec<&dyn Aml> = vec![&processors, &bridge];
    devices.extend(ecam.iter().map(|e| e as &dyn Aml));
    let generation = platform.generation_id.map(|_| GenerationId(generation_id));
    devices.extend(generation.iter().map(|g| g as &dyn Aml));
    Scope::new(path("_SB_"), devices).to_aml_bytes(&mut aml);
    let mut dsdt = table(b"DSDT", 2);
    dsdt.append_slice(&aml);
    Ok(dsdt.as_slice().to_vec())
}

/// What would make wrong AML.
fn check(platform: &PlatformDescription) -> Result<(), BootError> {
    let windows = [Some(platform.pci_window), platform.pci_window_64, platform.pci_ecam];
    let bad = |w: &MemoryWindow| w.start > w.last || w.start == 0;
    let problem = if windows.iter().flatten().any(bad) {
        "a PCI memory window is empty or starts at 0"
    } else if platform.pci_window.last > u64::from(u32::MAX) {
        "the 32-bit PCI window ends above 4 GiB"
    } else if platform.pci_ecam.is_some_and(|w| w.start & 0xfff_ffff != 0 || w.last != w.start + 0xfff_ffff) {
        "PCI configuration space must be 256 MiB at a multiple of that"
    } else if platform.pci_ecam.is_some_and(|w| w.last > u64::from(u32::MAX)) {
        "PCI configuration space lies above 4 GiB"
    } else if platform.serial.len() > 4 || platform.serial.iter().any(|s| s.irq > 15) {
        "there are more than four serial ports, or one has an IRQ above 15"
    } else if platform.sci_irq > 15 || platform.rtc_irq > 15 || platform.pci_interrupt_base > 20 {
        "an interrupt is out of range"
    } else if platform.s5_sleep_type > 7 {
        "SLP_TYP has three bits"
    } else {
        return Ok(());
    };
    Err(BootError::BadPlatform(problem))
}

/// One processor device for each vCPU; their `_UID` is that of the MADT.
struct Processors(u32);

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for cpu in 0..self.0 {
            let id = Name::new(path("_HID"), &"ACPI0007");
            let uid = Name::new(path("_UID"), &cpu);
            Device::new(path(&format!("C{cpu:03X}")), vec![&id, &uid]).to_aml_bytes(sink);
        }
    }
}

/// The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): a device that says where 16 bytes are.
struct GenerationId(u64);

impl Aml for GenerationId {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (low, high) = (self.0 as u32, (self.0 >> 32) as u32);
        let id = Name::new(path("_HID"), &"RNGF0001");
        // Drivers go by this one.
        let compatible = Name::new(path("_CID"), &"VM_Gen_Counter");
        let name = Name::new(path("_DDN"), &"VM_Gen_Counter");
        let address = Name::new(path("ADDR"), &Package::new(vec![&low, &high]));
        Device::new(path("VGEN"), vec![&id, &compatible, &name, &address]).to_aml_bytes(sink);
    }
}

/// The devices on the ISA bus, behind the PCI host bridge.
pub(super) struct IsaDevices<'a>(pub(super) &'a PlatformDescription);

impl Aml for IsaDevices<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let p = self.0;
        let device = |name: &str, id, uid, ports: &[(u16, u8)], irq| IsaDevice {
            name: name.to_owned(),
            id,
            uid,
            ports: ports.to_vec(),
            irq,
        };
        let mut devices = vec![
            device("RTC_", "PNP0B00", 0, &[(p.rtc_port, 2)], Some(p.rtc_irq)),
            device("TIMR", "PNP0100", 0, &[(0x40, 4)], Some(0)),
            device("SYSR", "PNP0C02", 0, &p.reserved_ports, None),
        ];
        if p.legacy_pics {
            devices.push(device("PIC_", "PNP0000", 0, &[(0x20, 2), (0xa0, 2), (0x4d0, 2)], Some(2)));
        }
        // The identifiers that QEMU's specifications give these two devices.
        if let Some(port) = p.fw_cfg {
            devices.push(device("FWCF", "QEMU0002", 0, &[(port, 12)], None));
        }
        if let Some(port) = p.pvpanic {
            devices.push(device("PEVT", "QEMU0001", 0, &[(port, 1)], None));
        }
        if p.keyboard {
            devices.push(device("KBD_", "PNP0303", 0, &[(0x60, 1), (0x64, 1)], Some(1)));
        }
        if p.mouse {
            devices.push(device("MOU_", "PNP0F13", 0, &[], Some(12)));
        }
        for (index, serial) in (1_u8..).zip(&p.serial) {
            let name = format!("COM{index}");
            devices.push(device(&name, "PNP0501", index, &[(serial.port, 8)], Some(serial.irq)));
        }
        for device in devices {
            device.to_aml_bytes(sink);
        }
    }
}
