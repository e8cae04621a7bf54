//! Resource descriptors and devices in AML that several tables' parts share.

use acpi_tables::aml::{Device, EISAName, IO, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

/// A device's object name.
pub(super) fn path(name: &str) -> acpi_tables::aml::Path {
    acpi_tables::aml::Path::new(name)
}

/// A small interrupt descriptor: an ISA interrupt, edge-triggered, active high (ACPI 6.5 6.4.2.1).
pub(super) struct IsaInterrupt(pub(super) u8);

impl Aml for IsaInterrupt {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1_u16.checked_shl(self.0.into()).unwrap_or(0));
    }
}

/// A device identifier: seven characters are an EISA one, which is a number; others are text (ACPI 6.5 6.1.5).
struct Identifier(&'static str);

impl Aml for Identifier {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        if self.0.len() == 7 { EISAName::new(self.0).to_aml_bytes(sink) } else { self.0.to_aml_bytes(sink) }
    }
}

/// An ISA device by its identifier.
pub(super) struct IsaDevice {
    pub(super) name: String,
    pub(super) id: &'static str,
    pub(super) uid: u8,
    /// First port and number.
    pub(super) ports: Vec<(u16, u8)>,
    pub(super) irq: Option<u8>,
}

impl Aml for IsaDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports: Vec<IO> = self.ports.iter().map(|&(first, n)| IO::new(first, first, 1, n)).collect();
        let irq = self.irq.map(IsaInterrupt);
        let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
        resources.extend(irq.iter().map(|i| i as &dyn Aml));
        Device::new(
            path(&self.name),
            vec![
                &Name::new(path("_HID"), &Identifier(self.id)),
                &Name::new(path("_UID"), &self.uid),
                &Name::new(path("_CRS"), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(sink);
    }
}
