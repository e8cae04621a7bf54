//! Caches as CPUID describes them. The engine has none; the description is the same for every model, so that guests
//! find the same machine on every host.

use super::{CpuidResult, CpuidTable, Vendor};

/// One cache.
struct Cache {
    /// 1 data, 2 instruction, 3 unified (SDM 2A CPUID, leaf 4).
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
    /// Shared by all CPUs, or each has its own.
    shared: bool,
}

const LINE: u32 = 64;
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 3, level: 2, ways: 16, sets: 1024, shared: false },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384, shared: true },
];

/// Adds the leaves that describe caches, for `cpus` CPUs.
pub(super) fn describe(table: &mut CpuidTable, vendor: Vendor, cpus: u32) {
    let last = cpus.max(1) - 1;
    // Ids that a package can hold: a power of two, less one.
    let last_id = cpus.max(1).next_power_of_two() - 1;
    let intel = vendor == Vendor::Intel;
    let leaf = if intel { 4 } else { 0x8000_001d };
    for (i, cache) in (0..).zip(&CACHES) {
        let shared = if !cache.shared {
            0
        } else if intel {
            last_id
        } else {
            last
        };
        let cores = if intel { last_id << 26 } else { 0 };
        let self_initialising = 1 << 8;
        table.set(
            leaf,
            i,
            CpuidResult {
                eax: cache.kind | cache.level << 5 | self_initialising | shared << 14 | cores,
                ebx: (LINE - 1) | (cache.ways - 1) << 22,
                ecx: cache.sets - 1,
                edx: 0,
            },
        );
    }
    table.set(leaf, CACHES.len() as u32, CpuidResult::default());
    if intel {
        // "See leaf 4" (SDM 2A CPUID, leaf 2).
        table.set(2, 0, CpuidResult::new(0x00ff_0001, 0, 0, 0));
        return;
    }
    // APM 3 E.4.4, E.4.5: L1 32 KiB, 8 ways; L2 1 MiB, 16 ways; L3 16 MiB, 16 ways.
    let l1 = 32 << 24 | 8 << 16 | 1 << 8 | LINE;
    table.set(0x8000_0005, 0, CpuidResult::new(0xff40_ff40, 0xff40_ff40, l1, l1));
    let l2 = 1024 << 16 | 8 << 12 | 1 << 8 | LINE;
    let l3 = 32 << 18 | 8 << 12 | 1 << 8 | LINE;
    table.set(0x8000_0006, 0, CpuidResult::new(0x5c00_2200, 0x6c00_4200, l2, l3));
}
