//! The differentiated system description table: devices that cannot be discovered otherwise (ACPI 6.5 5.2.11.1).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Name, Package, PackageBuilder, ResourceTemplate,
    Scope,
};
use ringfence_memory::GuestRange;

use super::resource::{IsaDevice, path};
use super::table;
use crate::{BootError, MemoryWindow, PlatformDescription, pci_interrupt};

/// Slots on a PCI bus.
const SLOTS: u8 = 32;

pub(super) fn build(
    platform: &PlatformDescription,
    cpus: u32,
    ram: &[GuestRange],
) -> Result<Vec<u8>, BootError> {
    check(platform)?;
    let mut aml = Vec::new();
    let s5 = platform.s5_sleep_type;
    // PM1a and PM1b sleep types, then two reserved entries (ACPI 6.5 7.4.2).
    Name::new(path("_S5_"), &Package::new(vec![&s5, &s5, &0_u8, &0_u8])).to_aml_bytes(&mut aml);
    Scope::new(
        path("_SB_"),
        vec![&Processors(cpus), &HostBridge { platform, window_64: platform.pci_window_64(ram) }],
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = table(b"DSDT", 2);
    dsdt.append_slice(&aml);
    Ok(dsdt.as_slice().to_vec())
}

/// What would make wrong AML.
fn check(platform: &PlatformDescription) -> Result<(), BootError> {
    let windows = [Some(platform.pci_window), platform.pci_window_64];
    let bad = |w: &MemoryWindow| w.start > w.last || w.start == 0;
    let problem = if windows.iter().flatten().any(bad) {
        "a PCI memory window is empty or starts at 0"
    } else if platform.pci_window.last > u64::from(u32::MAX) {
        "the 32-bit PCI window ends above 4 GiB"
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

/// The PCI host bridge and, behind it, the ISA devices.
struct HostBridge<'a> {
    platform: &'a PlatformDescription,
    window_64: MemoryWindow,
}

impl Aml for HostBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let p = self.platform;
        let config = acpi_tables::aml::IO::new(0xcf8, 0xcf8, 1, 8);
        let mut resources: Vec<Box<dyn Aml>> = vec![
            Box::new(AddressSpace::<u16>::new_bus_number(0, 0xff)),
            Box::new(config),
            Box::new(AddressSpace::<u16>::new_io(0, 0xcf7, None)),
            Box::new(AddressSpace::<u16>::new_io(0xd00, 0xffff, None)),
        ];
        let cached = AddressSpaceCacheable::NotCacheable;
        if p.vga {
            resources.push(Box::new(AddressSpace::<u32>::new_memory(cached, true, 0xa_0000, 0xb_ffff, None)));
        }
        let (start, last) = (p.pci_window.start as u32, p.pci_window.last as u32);
        resources.push(Box::new(AddressSpace::<u32>::new_memory(cached, true, start, last, None)));
        let w = self.window_64;
        resources.push(Box::new(AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::PreFetchable,
            true,
            w.start,
            w.last,
            None,
        )));
        let resources = ResourceTemplate::new(resources.iter().map(|r| r.as_ref()).collect());
        Device::new(
            path("PCI0"),
            vec![
                &Name::new(path("_HID"), &EISAName::new("PNP0A03")),
                &Name::new(path("_UID"), &0_u8),
                &Name::new(path("_BBN"), &0_u8),
                &Name::new(path("_CRS"), &resources),
                &Name::new(path("_PRT"), &routing(p)),
                &IsaDevices(p),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The routing of every slot's four pins to global system interrupts (ACPI 6.5 6.2.13).
fn routing(platform: &PlatformDescription) -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..4_u8 {
            let address = u32::from(slot) << 16 | 0xffff;
            let gsi = pci_interrupt(platform, slot, pin);
            routes.add_element(&Package::new(vec![&address, &pin, &0_u8, &gsi]));
        }
    }
    routes
}

struct IsaDevices<'a>(&'a PlatformDescription);

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
