//! Where the controllers answer on the bus.

use std::sync::Arc;

use ringfence_engine::{AddressSpace, BusDevice, Placement};
use ringfence_memory::GuestRange;

use crate::IrqChip;

/// Where the I/O APIC's page is.
pub(crate) const IOAPIC_BASE: u64 = 0xfec0_0000;

/// The command and mask ports of one 8259A.
struct PicPorts {
    chip: Arc<IrqChip>,
    controller: usize,
}

impl BusDevice for PicPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..2).zip(data) {
            *byte = self.chip.with_pic(|pic| pic.read(self.controller, port as u8));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..2).zip(data) {
            self.chip.with_pic(|pic| pic.write(self.controller, port as u8, *byte));
        }
    }
}

/// The edge/level control registers.
struct ElcrPorts {
    chip: Arc<IrqChip>,
}

impl BusDevice for ElcrPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..2).zip(data) {
            *byte = self.chip.with_pic(|pic| pic.read_elcr(port as usize));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..2).zip(data) {
            self.chip.with_pic(|pic| pic.write_elcr(port as usize, *byte));
        }
    }
}

/// The I/O APIC's page.
struct IoApicPage {
    chip: Arc<IrqChip>,
}

impl BusDevice for IoApicPage {
    /// Registers are 32 bits wide at multiples of 16; a narrower read gives part of one, what lies between
    /// registers reads as zero.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let register = self.chip.read_ioapic(offset & !0xf).to_le_bytes();
        let within = (offset & 0xf) as usize;
        for (at, byte) in (within..).zip(data) {
            *byte = register.get(at).copied().unwrap_or(0);
        }
    }

    /// Registers are written whole; the index register and the EOI register, which use 8 bits, also by a byte.
    fn write(&self, offset: u64, data: &[u8]) {
        match *data {
            [a, b, c, d, ..] => self.chip.write_ioapic(offset, u32::from_le_bytes([a, b, c, d])),
            [low, ..] if matches!(offset, 0x00 | 0x40) => self.chip.write_ioapic(offset, u32::from(low)),
            _ => {}
        }
    }
}

impl IrqChip {
    /// What answers on the bus: the 8259 pair, its edge/level control registers, and the I/O APIC.
    pub fn placements(self: &Arc<Self>) -> Vec<Placement> {
        let chip = || Arc::clone(self);
        let port = |name, start, device| Placement {
            name,
            space: AddressSpace::Port,
            range: GuestRange::new(start, 2),
            device,
        };
        vec![
            port("pic-master", 0x20, Arc::new(PicPorts { chip: chip(), controller: 0 })),
            port("pic-slave", 0xa0, Arc::new(PicPorts { chip: chip(), controller: 1 })),
            port("elcr", 0x4d0, Arc::new(ElcrPorts { chip: chip() })),
            Placement {
                name: "ioapic",
                space: AddressSpace::Memory,
                range: GuestRange::new(IOAPIC_BASE, 0x1000),
                device: Arc::new(IoApicPage { chip: chip() }),
            },
        ]
    }
}
