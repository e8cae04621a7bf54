//! Interrupt wires from devices to whatever controller the engine has.

use std::sync::Arc;

/// Where devices send interrupts: an interrupt controller, in the engine or in the host's kernel.
pub trait InterruptSink: Send + Sync {
    /// Drives the global system interrupt `gsi` (0 to 23) high or low. GSIs 0 to 15 are the ISA lines and reach the
    /// 8259 pair as well as the I/O APIC. Drivers of a shared line must combine their levels themselves.
    fn set_gsi(&self, gsi: u32, asserted: bool);
    /// Delivers a message-signalled interrupt (SDM 3A 10.11): `address` is in 0xFEE0_0000 to 0xFEEF_FFFF.
    fn send_msi(&self, address: u64, data: u32);
}

/// One wire to an interrupt controller.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn InterruptSink>,
    gsi: u32,
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IrqLine({})", self.gsi)
    }
}

impl IrqLine {
    /// The wire that drives `gsi`.
    pub fn new(sink: Arc<dyn InterruptSink>, gsi: u32) -> Self {
        Self { sink, gsi }
    }

    /// Drives the wire.
    pub fn set(&self, asserted: bool) {
        self.sink.set_gsi(self.gsi, asserted);
    }

    /// Drives the wire high and low again: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}
