//! Tests of the local APIC. A bench has a chip and several local APICs on a counted clock.

mod ipi;
mod modes;
mod priority;
mod state;
mod timer;

use std::sync::Arc;

use ringfence_engine::{ClockMode, VirtualClock, VirtualTime};

use super::*;
use crate::IrqChipConfig;

pub(super) struct Bench {
    pub(super) chip: Arc<IrqChip>,
    pub(super) clock: Arc<VirtualClock>,
    pub(super) cpu: Vec<LocalApic>,
}

impl Bench {
    /// `cpus` local APICs in reset state.
    pub(super) fn cold(cpus: u32) -> Self {
        let config = IrqChipConfig { cpus, physical_bits: 39, x2apic: true, tsc_deadline: true };
        let chip = IrqChip::new(config);
        let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
        let cpu = (0..cpus).map(|id| chip.add_local_apic(id, Arc::clone(&clock)).unwrap()).collect();
        Self { chip, clock, cpu }
    }

    /// The same, enabled by software.
    pub(super) fn new(cpus: u32) -> Self {
        let mut bench = Self::cold(cpus);
        for cpu in &mut bench.cpu {
            cpu.write32(0xf0, 0x1ff);
        }
        bench
    }

    /// The same, in x2APIC mode.
    pub(super) fn x2apic(cpus: u32) -> Self {
        let mut bench = Self::new(cpus);
        for cpu in &mut bench.cpu {
            let base = cpu.apic_base();
            cpu.msr_write(0x1b, base | 0x400).unwrap();
        }
        bench
    }

    /// Time goes on by `ns`, with timers run where they are due.
    pub(super) fn pass(&mut self, ns: u64) {
        let now = self.clock.now().after(ns);
        self.clock.advance_to(now);
        for cpu in &mut self.cpu {
            if cpu.next_deadline() <= now {
                cpu.run_timer(now);
            }
        }
    }
}

impl LocalApic {
    pub(super) fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write32(&mut self, offset: u64, value: u32) {
        self.mmio_write(offset, &value.to_le_bytes());
    }

    /// Takes all interrupts that can be taken, without ending them.
    pub(super) fn drain(&mut self) -> Vec<u8> {
        let mut vectors = Vec::new();
        while self.pending_interrupt().is_some() {
            vectors.push(self.acknowledge());
        }
        vectors
    }

    /// Takes and ends the one interrupt there is.
    pub(super) fn take(&mut self) -> Option<u8> {
        self.pending_interrupt()?;
        let vector = self.acknowledge();
        self.eoi();
        Some(vector)
    }
}
