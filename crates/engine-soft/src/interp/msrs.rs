//! The model-specific registers that are mere storage.

use std::collections::BTreeMap;

use ringfence_x86::msr;

/// Values by number. The one that SWAPGS exchanges on every system call is kept apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Msrs {
    /// KERNEL_GS_BASE.
    pub(crate) kernel_gs_base: u64,
    others: BTreeMap<u32, u64>,
}

impl Msrs {
    /// The value of a register that has been written.
    pub fn get(&self, number: u32) -> Option<u64> {
        match number {
            msr::KERNEL_GS_BASE => Some(self.kernel_gs_base),
            _ => self.others.get(&number).copied(),
        }
    }

    /// Writes a register.
    pub fn insert(&mut self, number: u32, value: u64) {
        match number {
            msr::KERNEL_GS_BASE => self.kernel_gs_base = value,
            _ => drop(self.others.insert(number, value)),
        }
    }

    /// As after power-on.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// All that have been written.
    pub fn to_map(&self) -> BTreeMap<u32, u64> {
        let mut map = self.others.clone();
        if self.kernel_gs_base != 0 {
            map.insert(msr::KERNEL_GS_BASE, self.kernel_gs_base);
        }
        map
    }

    /// From saved values.
    pub fn from_map(map: &BTreeMap<u32, u64>) -> Self {
        let mut others = map.clone();
        let kernel_gs_base = others.remove(&msr::KERNEL_GS_BASE).unwrap_or(0);
        Self { kernel_gs_base, others }
    }
}
