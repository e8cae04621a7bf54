//! CPUID: what a processor says of itself.

use std::collections::BTreeMap;

/// The four result registers of one CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What CPUID answers, by leaf and subleaf. Leaves without subleaves stand under subleaf 0.
///
/// Parts of some leaves are not constants: the executing engine fills in the APIC id (leaves 1, 0xB, 0x1F),
/// OSXSAVE (leaf 1) and the XSAVE area sizes (leaf 0xD) from the vCPU's state.
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

    /// Every entry, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), CpuidResult)> + '_ {
        self.leaves.iter().map(|(&key, &result)| (key, result))
    }
}
