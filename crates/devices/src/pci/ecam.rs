//! The enhanced configuration access mechanism: every function's 4 KiB of configuration space in memory
//! (PCI Express Base 4.0, 7.2.2).

use std::sync::Arc;

use ringfence_engine::BusDevice;

use super::{PciAddress, PciBus};

/// The window; where it lies is [`PCI_ECAM`](crate::platform::PCI_ECAM).
#[derive(Debug)]
pub(super) struct Ecam(pub(super) Arc<PciBus>);

/// Bus, device and function, and the register.
fn target(offset: u64) -> (PciAddress, u16) {
    (PciAddress::from_bits((offset >> 12) as u16), (offset & 0xfff) as u16)
}

/// How much of an access from `offset` lies in the same 4-byte register.
fn piece(offset: u64, len: usize) -> usize {
    len.min(4 - (offset & 3) as usize)
}

impl BusDevice for Ecam {
    fn read(&self, mut offset: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let n = piece(offset, data.len());
            let (part, rest) = data.split_at_mut(n);
            let (address, register) = target(offset);
            self.0.config_read(address, register, part);
            (offset, data) = (offset + n as u64, rest);
        }
    }

    fn write(&self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let n = piece(offset, data.len());
            let (part, rest) = data.split_at(n);
            let (address, register) = target(offset);
            self.0.config_write(address, register, part);
            (offset, data) = (offset + n as u64, rest);
        }
    }
}
