//! The interrupt pins of PCI functions and the four lines they share (PCI Local Bus 3.0, 2.2.6).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};

use ringfence_engine::{InterruptSink, IrqLine};

use super::PciAddress;
use crate::device::lock;
use crate::platform::PCI_INTERRUPT_BASE;

/// A level-triggered line that is high while any of its functions asserts it.
#[derive(Debug, Default)]
struct SharedLine {
    line: OnceLock<IrqLine>,
    asserting: Mutex<BTreeSet<u16>>,
}

/// The four lines.
#[derive(Debug, Default)]
pub(super) struct Lines([Arc<SharedLine>; 4]);

impl Lines {
    /// Connects the interrupt controller. The first one counts.
    pub(super) fn connect(&self, interrupts: &Arc<dyn InterruptSink>) {
        for (gsi, shared) in (PCI_INTERRUPT_BASE..).zip(&self.0) {
            let asserting = lock(&shared.asserting);
            let line = shared.line.get_or_init(|| IrqLine::new(Arc::clone(interrupts), gsi));
            if !asserting.is_empty() {
                line.set(true);
            }
        }
    }

    /// Pin INTA of a function.
    pub(super) fn pin(&self, address: PciAddress) -> IntxPin {
        // The swizzle that the ACPI tables describe: devices side by side use different lines.
        let index = usize::from(address.device() & 3);
        let line = self.0.get(index).map_or_else(Arc::default, Arc::clone);
        IntxPin { line, source: address.bits(), gsi: PCI_INTERRUPT_BASE + index as u32 }
    }
}

/// A function's interrupt pin.
#[derive(Clone, Debug)]
pub struct IntxPin {
    line: Arc<SharedLine>,
    source: u16,
    gsi: u32,
}

impl IntxPin {
    /// The global system interrupt it leads to.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Asserts or deasserts the pin.
    pub fn set(&self, level: bool) {
        let mut asserting = lock(&self.line.asserting);
        let before = !asserting.is_empty();
        if level {
            asserting.insert(self.source);
        } else {
            asserting.remove(&self.source);
        }
        let after = !asserting.is_empty();
        // Driven with the lock held, so that levels arrive in the order in which they were set.
        if before != after
            && let Some(line) = self.line.line.get()
        {
            line.set(after);
        }
    }
}
