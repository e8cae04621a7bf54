//! Page walks: 32-bit, PAE and four-level paging (SDM 3A 4.3 to 4.7; accessed and dirty bits 4.8).

use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::paging::{Entry, FaultCode};
use ringfence_x86::{Cr0, Cr4, Efer};

use crate::hostop::Int;

/// What the walk depends on besides the tables.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// CR0.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// EFER.
    pub efer: Efer,
    /// The four PAE page-directory-pointer entries, loaded with CR3 (SDM 3A 4.4.1).
    pub pdpte: [u64; 4],
    /// Physical addresses have this many bits.
    pub physical_bits: u32,
}

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or load and store.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// With whose rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// CPL 3 (and not an implicit supervisor access).
    pub user: bool,
    /// A supervisor access may touch user pages: SMAP is off, or EFLAGS.AC is set and the access is explicit.
    pub smap_open: bool,
}

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address, A20 applied.
    pub address: GuestAddress,
    /// Whether a write with the same rights would succeed with no further change of the tables (dirty is set).
    pub writable: bool,
    /// Bytes in the page mapped.
    pub page_size: u64,
    /// Global page.
    pub global: bool,
    /// Page of user mode, which SMAP and SMEP keep a supervisor from.
    pub user: bool,
}

/// A page fault's error code. CR2 is the address walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault(pub FaultCode);

/// One level of a paging structure.
struct Level {
    /// Lowest linear-address bit that indexes it.
    shift: u32,
    /// How many bits index it.
    bits: u32,
    /// Whether an entry can map a page itself.
    leaf: bool,
}

const FOUR_LEVEL: [Level; 4] = [
    Level { shift: 39, bits: 9, leaf: false },
    Level { shift: 30, bits: 9, leaf: true },
    Level { shift: 21, bits: 9, leaf: true },
    Level { shift: 12, bits: 9, leaf: true },
];
const PAE: [Level; 2] = [Level { shift: 21, bits: 9, leaf: true }, Level { shift: 12, bits: 9, leaf: true }];
const LEGACY: [Level; 2] =
    [Level { shift: 22, bits: 10, leaf: true }, Level { shift: 12, bits: 10, leaf: true }];

/// An entry on the path, kept so that its accessed and dirty bits can be set once the walk has succeeded.
#[derive(Clone, Copy, Default)]
struct Step {
    at: u64,
    entry: u64,
}

/// Translates `linear` for an access, setting accessed and dirty bits as the processor does.
///
/// # Errors
/// [`PageFault`] with the error code the processor would push.
pub fn translate(
    memory: &GuestMemory,
    context: &Context,
    linear: u64,
    access: Access,
    rights: Rights,
) -> Result<Translation, PageFault> {
    let a20 = memory.a20_mask();
    if !context.cr0.contains(Cr0::PG) {
        let address = GuestAddress(linear & 0xffff_ffff & a20);
        return Ok(Translation { address, writable: true, page_size: 4096, global: false, user: false });
    }
    loop {
        // Another CPU may change an entry between our reading and marking it: walk again then.
        if let Some(result) = attempt(memory, context, linear, access, rights, a20) {
            return result;
        }
    }
}

fn attempt(
    memory: &GuestMemory,
    context: &Context,
    linear: u64,
    access: Access,
    rights: Rights,
    a20: u64,
) -> Option<Result<Translation, PageFault>> {
    let long = context.efer.contains(Efer::LMA);
    let pae = context.cr4.contains(Cr4::PAE);
    let nxe = context.efer.contains(Efer::NXE) && (long || pae);
    let mut code = FaultCode::empty();
    code.set(FaultCode::WRITE, access == Access::Write);
    code.set(FaultCode::USER, rights.user);
    // The fetch bit is pushed only where fetches can be denied on their own (SDM 3A 4.7).
    code.set(FaultCode::FETCH, access == Access::Fetch && (nxe || context.cr4.contains(Cr4::SMEP)));
    let fault = |extra: FaultCode| Some(Err(PageFault(code | extra)));

    let address_mask = ((1_u64 << context.physical_bits) - 1) & !0xfff;
    let (levels, mut table, wide): (&[Level], u64, bool) = if long {
        (&FOUR_LEVEL, context.cr3 & address_mask, true)
    } else if pae {
        let entry = context.pdpte[(linear >> 30) as usize & 3];
        if entry & Entry::PRESENT.bits() == 0 {
            return fault(FaultCode::empty());
        }
        (&PAE, entry & address_mask, true)
    } else {
        (&LEGACY, context.cr3 & 0xffff_f000, false)
    };

    let mut steps = [Step::default(); 4];
    let mut allowed = Entry::WRITABLE | Entry::USER;
    let mut no_execute = false;
    for (depth, level) in levels.iter().enumerate() {
        let slot = (linear >> level.shift) & ((1 << level.bits) - 1);
        let at = (table + slot * if wide { 8 } else { 4 }) & a20;
        // Tables outside memory read as all ones on a PC, which has reserved bits set; as "not present" the
        // guest gets a fault it can understand.
        let entry = if wide {
            memory.read::<u64>(GuestAddress(at)).unwrap_or(0)
        } else {
            u64::from(memory.read::<u32>(GuestAddress(at)).unwrap_or(0))
        };
        let flags = Entry::from_bits_retain(entry);
        if !flags.contains(Entry::PRESENT) {
            return fault(FaultCode::empty());
        }
        let last = level.shift == 12;
        let large =
            !last && level.leaf && flags.contains(Entry::LARGE) && (wide || context.cr4.contains(Cr4::PSE));
        let leaf = last || large;
        if reserved(context, level, flags, wide, long, nxe, large) {
            return fault(FaultCode::PRESENT | FaultCode::RESERVED);
        }
        allowed &= flags;
        no_execute |= nxe && flags.contains(Entry::NX);
        if let Some(step) = steps.get_mut(depth) {
            *step = Step { at, entry };
        }
        if !leaf {
            table = entry & if wide { address_mask } else { 0xffff_f000 };
            continue;
        }

        let user_page = allowed.contains(Entry::USER);
        let writable = allowed.contains(Entry::WRITABLE) || (!rights.user && !context.cr0.contains(Cr0::WP));
        let denied = match access {
            _ if rights.user && !user_page => true,
            Access::Fetch => no_execute || (!rights.user && user_page && context.cr4.contains(Cr4::SMEP)),
            Access::Read | Access::Write if !rights.user && user_page && !rights.smap_open => true,
            Access::Read => false,
            Access::Write => !writable,
        };
        if denied {
            return fault(FaultCode::PRESENT);
        }
        if !mark(memory, &steps[..=depth], access == Access::Write, wide) {
            return None;
        }
        let page_size = 1_u64 << level.shift;
        let base = if wide || last {
            entry & address_mask & !(page_size - 1)
        } else {
            // PSE-36: bits 13 to 20 hold address bits 32 to 39 (SDM 3A table 4-4).
            (entry & 0xffc0_0000) | ((entry >> 13 & 0xff) << 32)
        };
        let dirty = access == Access::Write || flags.contains(Entry::DIRTY);
        return Some(Ok(Translation {
            address: GuestAddress((base | linear & (page_size - 1)) & a20),
            writable: writable && dirty,
            page_size,
            global: flags.contains(Entry::GLOBAL) && context.cr4.contains(Cr4::PGE),
            user: user_page,
        }));
    }
    // Every table of levels ends with a leaf.
    fault(FaultCode::empty())
}

/// Whether an entry has a reserved bit set (SDM 3A tables 4-4 to 4-20).
fn reserved(
    context: &Context,
    level: &Level,
    entry: Entry,
    wide: bool,
    long: bool,
    nxe: bool,
    large: bool,
) -> bool {
    let bits = entry.bits();
    if !wide {
        // PSE-36 with 40 physical bits: only bit 21 of a 4 MiB entry is reserved.
        return large && bits & (1 << 21) != 0;
    }
    let physical = !((1_u64 << context.physical_bits) - 1);
    // Bits 52 to 62 are ignored in long mode and reserved in PAE; bit 63 is reserved without NXE.
    let mut mask = physical & if long { 0x000f_ffff_ffff_ffff } else { 0x7fff_ffff_ffff_ffff };
    if !nxe {
        mask |= Entry::NX.bits();
    }
    if large {
        mask |= ((1 << level.shift) - 1) & !0x1fff;
    } else if !level.leaf {
        mask |= Entry::LARGE.bits();
    }
    bits & mask != 0
}

/// Sets accessed on every entry and dirty on the leaf. False if one has changed meanwhile.
fn mark(memory: &GuestMemory, steps: &[Step], dirty: bool, wide: bool) -> bool {
    steps.iter().enumerate().all(|(i, step)| {
        let mut wanted = step.entry | Entry::ACCESSED.bits();
        if dirty && i + 1 == steps.len() {
            wanted |= Entry::DIRTY.bits();
        }
        wanted == step.entry || exchange(memory, *step, wanted, wide)
    })
}

/// Replaces an entry if it is still what was read. Tables in ROM keep their bits, as on hardware.
fn exchange(memory: &GuestMemory, step: Step, wanted: u64, wide: bool) -> bool {
    let address = GuestAddress(step.at);
    let Some(page) = memory.page(address) else { return true };
    if !page.writable {
        return true;
    }
    let at = page.host.wrapping_add(address.page_offset() as usize);
    // SAFETY: entries are aligned to their size, so `at` and the bytes after it lie in the page just looked up.
    let done = unsafe {
        if wide {
            u64::compare_exchange(at, step.entry, wanted) == step.entry
        } else {
            u32::compare_exchange(at, step.entry as u32, wanted as u32) == step.entry as u32
        }
    };
    let len = if wide { 8 } else { 4 };
    match done {
        // A table may be code as well.
        true if page.code => memory.notify_written(address, len),
        true => memory.note_walk(address, len),
        false => {}
    }
    done
}

#[cfg(test)]
mod tests;
