//! The configuration space of a type 0 function: fixed bits, bits that software can write, a list of capabilities
//! (PCI Local Bus 3.0, 6.1 to 6.2 and 6.7).

/// Register offsets in the header.
pub(super) mod register {
    pub(in crate::pci) const COMMAND: u16 = 0x04;
    pub(in crate::pci) const STATUS: u16 = 0x06;
    pub(in crate::pci) const REVISION: u16 = 0x08;
    pub(in crate::pci) const CLASS: u16 = 0x09;
    pub(in crate::pci) const CACHE_LINE: u16 = 0x0c;
    pub(in crate::pci) const BAR: u16 = 0x10;
    pub(in crate::pci) const SUBSYSTEM: u16 = 0x2c;
    pub(in crate::pci) const CAPABILITIES: u16 = 0x34;
    pub(in crate::pci) const INTERRUPT_LINE: u16 = 0x3c;
    pub(in crate::pci) const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the command register.
pub(super) mod command {
    pub(in crate::pci) const MEMORY: u16 = 1 << 1;
    pub(in crate::pci) const BUS_MASTER: u16 = 1 << 2;
    pub(in crate::pci) const PARITY: u16 = 1 << 6;
    pub(in crate::pci) const SYSTEM_ERROR: u16 = 1 << 8;
    pub(in crate::pci) const INTERRUPT_DISABLE: u16 = 1 << 10;
    pub(in crate::pci) const ALL: u16 = MEMORY | BUS_MASTER | PARITY | SYSTEM_ERROR | INTERRUPT_DISABLE;
}

/// Bits of the status register.
pub(super) mod status {
    pub(in crate::pci) const INTERRUPT: u8 = 1 << 3;
    pub(in crate::pci) const CAPABILITIES: u16 = 1 << 4;
}

/// Bytes of the space that a conventional function has. What lies beyond, up to 4096, reads as zeroes: no
/// extended capability.
const SIZE: usize = 256;
/// Where capabilities start, after the header.
const FIRST_CAPABILITY: u16 = 0x40;

/// What a function says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Base class, subclass and programming interface, such as 0x010802 for NVMe.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// Registers as bytes, each with a mask of the bits that software can write.
#[derive(Clone)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the pointer to the next capability goes.
    link: u16,
    /// Where the next capability goes.
    free: u16,
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConfigSpace({:08x} command {:#06x})", self.u32(0), self.u16(register::COMMAND))
    }
}

impl ConfigSpace {
    /// A header without base address registers and capabilities; subsystem and device are the same.
    pub(super) fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: register::CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        let id = u32::from(identity.device) << 16 | u32::from(identity.vendor);
        config.set(0, &id.to_le_bytes(), &[]);
        config.set(register::COMMAND, &[], &command::ALL.to_le_bytes());
        config.set(register::REVISION, &[identity.revision], &[]);
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        config.set(register::CLASS, &[interface, subclass, class], &[]);
        config.set(register::CACHE_LINE, &[], &[0xff]);
        config.set(register::SUBSYSTEM, &id.to_le_bytes(), &[]);
        config.set(register::INTERRUPT_LINE, &[], &[0xff]);
        config
    }

    /// Sets bytes and masks from `offset` on; what lies past the end is left out.
    pub(super) fn set(&mut self, offset: u16, bytes: &[u8], writable: &[u8]) {
        let at = usize::from(offset);
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        for (to, from) in self.writable.iter_mut().skip(at).zip(writable) {
            *to = *from;
        }
    }

    /// Appends a capability, given without its two bytes of identifier and link. Returns where it starts.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        self.set(self.link, &[at as u8], &[]);
        self.set(at, &[id, 0], &[]);
        self.set(at + 2, body, writable);
        let flags = self.u16(register::STATUS) | status::CAPABILITIES;
        self.set(register::STATUS, &flags.to_le_bytes(), &[]);
        self.link = at + 1;
        self.free = (at + 2 + body.len() as u16).next_multiple_of(4);
        at
    }

    /// What software reads. `data` is at most what is left of the extended space.
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// What software writes: reaches only the bits that it may change.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let registers = self.bytes.iter_mut().zip(&self.writable);
        for ((byte, mask), value) in registers.skip(at).zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    pub(super) fn u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// All registers, for saving.
    pub(super) fn save(&self) -> Vec<u32> {
        (0..SIZE as u16).step_by(4).map(|offset| self.u32(offset)).collect()
    }

    /// Takes over the writable bits of saved registers. Returns whether there were as many as there should be.
    pub(super) fn restore(&mut self, saved: &[u32]) -> bool {
        for (register, offset) in saved.iter().zip((0..SIZE as u16).step_by(4)) {
            self.write(offset, &register.to_le_bytes());
        }
        saved.len() == SIZE / 4
    }
}
