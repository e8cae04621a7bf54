//! CPUID: what a processor says of itself, and the models that a guest can have.
//!
//! [`CpuidTable`] is plain data. [`Model::table`] makes one from the host's, limited to a positive list of what a
//! software engine executes ([`features`]).

mod cache;
pub mod features;
mod model;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use model::{ARCH_CAPABILITIES, MissingFeatures, Mitigations, Model, Platform};

/// The four result registers of one CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidResult {
    /// From the registers in the order EAX, EBX, ECX, EDX.
    pub const fn new(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        Self { eax, ebx, ecx, edx }
    }

    /// One register.
    pub const fn get(&self, register: Output) -> u32 {
        match register {
            Output::Eax => self.eax,
            Output::Ebx => self.ebx,
            Output::Ecx => self.ecx,
            Output::Edx => self.edx,
        }
    }

    /// One register, to be changed.
    pub const fn get_mut(&mut self, register: Output) -> &mut u32 {
        match register {
            Output::Eax => &mut self.eax,
            Output::Ebx => &mut self.ebx,
            Output::Ecx => &mut self.ecx,
            Output::Edx => &mut self.edx,
        }
    }
}

/// A result register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who made the processor, as far as behaviour differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD and whoever else.
    Amd,
}

/// What CPUID answers, by leaf and subleaf. Leaves without subleaves stand under subleaf 0.
///
/// Parts of some leaves are not constants: the executing engine fills in the APIC id (leaves 1, 0xB, 0x1F,
/// 0x8000_001E), OSXSAVE (leaf 1) and the XSAVE area sizes (leaf 0xD) from the vCPU's state.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), CpuidResult>,
}

impl CpuidTable {
    /// Sets one leaf.
    pub fn set(&mut self, leaf: u32, subleaf: u32, result: CpuidResult) {
        self.leaves.insert((leaf, subleaf), result);
    }

    /// The entry as set, or zeroes.
    pub fn get(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.leaves.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    /// Whether a leaf has an entry under a subleaf.
    pub fn contains(&self, leaf: u32, subleaf: u32) -> bool {
        self.leaves.contains_key(&(leaf, subleaf))
    }

    /// Every entry, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), CpuidResult)> + '_ {
        self.leaves.iter().map(|(&key, &result)| (key, result))
    }

    /// One bit.
    pub fn bit(&self, leaf: u32, subleaf: u32, register: Output, bit: u8) -> bool {
        self.get(leaf, subleaf).get(register) >> bit & 1 != 0
    }

    /// Who made the processor.
    pub fn vendor(&self) -> Vendor {
        if self.get(0, 0).ebx == u32::from_le_bytes(*b"Genu") { Vendor::Intel } else { Vendor::Amd }
    }
}
