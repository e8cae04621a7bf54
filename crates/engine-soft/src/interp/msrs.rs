//! The model-specific registers that are mere storage.

use std::collections::BTreeMap;
use std::mem::offset_of;

use ringfence_x86::msr;

/// Those that instructions use which programs and kernels execute all the time, by their places in [`Msrs::apart`].
const APART: [u32; 9] = [
    msr::KERNEL_GS_BASE,
    msr::STAR,
    msr::LSTAR,
    msr::FMASK,
    msr::TSC_ADJUST,
    msr::TSC_AUX,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
];

/// Where a register is that is kept apart.
const fn place(number: u32) -> Option<usize> {
    let mut i = 0;
    while i < APART.len() {
        if APART[i] == number {
            return Some(i);
        }
        i += 1;
    }
    None
}

/// Values by number. Those that system calls and time-stamps use are kept apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Msrs {
    apart: [u64; APART.len()],
    others: BTreeMap<u32, u64>,
}

impl Msrs {
    /// How far from the start of this structure translated code finds a register that is kept apart.
    ///
    /// # Panics
    /// For any other, where the number is constant: when that is compiled.
    pub(crate) const fn distance(number: u32) -> usize {
        match place(number) {
            Some(place) => offset_of!(Self, apart) + place * size_of::<u64>(),
            None => panic!("not kept apart"),
        }
    }

    /// The value of a register that has been written.
    #[inline]
    pub fn get(&self, number: u32) -> Option<u64> {
        match place(number) {
            Some(place) => Some(self.apart[place]),
            None => self.others.get(&number).copied(),
        }
    }

    /// Writes a register.
    pub fn insert(&mut self, number: u32, value: u64) {
        match place(number) {
            Some(place) => self.apart[place] = value,
            None => drop(self.others.insert(number, value)),
        }
    }

    /// As after power-on.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// All that have been written.
    pub fn to_map(&self) -> BTreeMap<u32, u64> {
        let mut map = self.others.clone();
        map.extend(APART.into_iter().zip(self.apart).filter(|(_, value)| *value != 0));
        map
    }

    /// From saved values.
    pub fn from_map(map: &BTreeMap<u32, u64>) -> Self {
        let mut others = map.clone();
        let apart = APART.map(|number| others.remove(&number).unwrap_or(0));
        Self { apart, others }
    }
}
