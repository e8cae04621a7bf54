//! The PCI host bridge: what it decodes, where its interrupts go, how its configuration space is reached
//! (ACPI 6.5 6.2; PCI Firmware 3.3, 4).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, If,
    Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder, ResourceTemplate, Return,
    Store, Uuid,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::dsdt::IsaDevices;
use super::resource::path;
use super::table;
use crate::{MemoryWindow, PlatformDescription, pci_interrupt};

/// Slots on a PCI bus.
const SLOTS: u8 = 32;

/// The table that tells where configuration space is: segment 0, buses 0 to 255 (PCI Firmware 3.3, 4.1.2).
pub(super) fn mcfg(ecam: MemoryWindow) -> Sdt {
    let mut mcfg = table(b"MCFG", 1);
    let mut body = vec![0; 8];
    body.extend(ecam.start.to_le_bytes());
    body.extend([0, 0, 0, 255, 0, 0, 0, 0]);
    mcfg.append_slice(&body);
    mcfg
}

/// The addresses of configuration space as a motherboard resource, without which Linux does not trust the MCFG.
pub(super) struct Ecam(pub(super) MemoryWindow);

impl Aml for Ecam {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let len = self.0.last.saturating_sub(self.0.start).saturating_add(1);
        let memory = Memory32Fixed::new(true, self.0.start as u32, len as u32);
        Device::new(
            path("ECAM"),
            vec![
                &Name::new(path("_HID"), &EISAName::new("PNP0C02")),
                &Name::new(path("_UID"), &1_u8),
                &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&memory])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The PCI Express host bridge and, behind it, the ISA devices.
pub(super) struct HostBridge<'a> {
    pub(super) platform: &'a PlatformDescription,
    pub(super) window_64: MemoryWindow,
}

impl Aml for HostBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
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
        let conventional = EISAName::new("PNP0A03");
        // Without configuration space in memory it is no PCI Express bridge.
        let id = match p.pci_ecam {
            Some(_) => EISAName::new("PNP0A08"),
            None => EISAName::new("PNP0A03"),
        };
        Device::new(
            path("PCI0"),
            vec![
                &Name::new(path("_HID"), &id),
                &Name::new(path("_CID"), &conventional),
                &Name::new(path("_UID"), &0_u8),
                &Name::new(path("_BBN"), &0_u8),
                &Name::new(path("_SEG"), &0_u8),
                &Name::new(path("_CRS"), &resources),
                &Name::new(path("_PRT"), &routing(p)),
                &ControlNegotiation,
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

/// `_OSC`: what the operating system may control itself (PCI Firmware 3.3, 4.5). It gets the PCI Express
/// capability, which is all there is; there are no hotplug slots, power management events or error reports.
struct ControlNegotiation;

impl Aml for ControlNegotiation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const CAPABILITY_CONTROL: u8 = 1 << 4;
        // Bits of the first word, the status.
        const UNKNOWN_UUID: u8 = 1 << 2;
        const UNKNOWN_REVISION: u8 = 1 << 3;
        const MASKED: u8 = 1 << 4;
        let (status, control, granted) = (path("CDW1"), path("CDW3"), Local(0));
        let (uuid, revision, buffer) = (Arg(0), Arg(1), Arg(3));
        let pci = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
        Method::new(
            path("_OSC"),
            4,
            false,
            vec![
                &CreateDWordField::new(&status, &buffer, &0_u8),
                &If::new(
                    &Equal::new(&uuid, &pci),
                    vec![
                        &CreateDWordField::new(&control, &buffer, &8_u8),
                        &And::new(&granted, &control, &CAPABILITY_CONTROL),
                        &If::new(
                            &NotEqual::new(&revision, &1_u8),
                            vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&control, &granted),
                            vec![&Or::new(&status, &status, &MASKED)],
                        ),
                        &Store::new(&control, &granted),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
                &Return::new(&buffer),
            ],
        )
        .to_aml_bytes(sink);
    }
}
