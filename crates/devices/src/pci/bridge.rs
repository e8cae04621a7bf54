//! The host bridge as a function on its own bus.

use super::PciFunction;

/// Vendor and device of a virtual PCI Express host bridge, a pair no driver attaches quirks to.
const VENDOR_AND_DEVICE: [u8; 4] = [0x36, 0x1b, 0x08, 0x00];
/// Base class 06 (bridge), subclass 00 (host).
const CLASS: [u8; 4] = [0, 0, 0, 6];

/// A type 0 header without base address registers (PCI 3.0 6.1). Nothing in it can be written.
pub(super) struct HostBridge;

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let register = match offset & !3 {
            0x00 => VENDOR_AND_DEVICE,
            0x08 => CLASS,
            _ => [0; 4],
        };
        let from = register.iter().skip(usize::from(offset & 3));
        for (byte, value) in data.iter_mut().zip(from) {
            *byte = *value;
        }
    }

    fn config_write(&self, _: u16, _: &[u8]) {}
}
