//! Reading guest memory by guest virtual address, for diagnostics.
//!
//! This is not the engine's page walk: it changes nothing, checks no rights and gives up quietly.

use ringfence_engine::CpuState;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::paging::{Entry, PAGE_MASK, PAGE_SIZE};
use ringfence_x86::{Cr0, Cr4, Efer};

/// Bits of a long-mode or PAE entry that hold an address (SDM 3A 4.5.4).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest physical address behind a linear address, if it is mapped.
fn translate(memory: &GuestMemory, state: &CpuState, linear: u64) -> Option<GuestAddress> {
    if state.cr0 & Cr0::PG.bits() == 0 {
        return Some(GuestAddress(linear & 0xffff_ffff));
    }
    let long = state.efer & Efer::LMA.bits() != 0;
    let pae = long || state.cr4 & Cr4::PAE.bits() != 0;
    if long && state.cr4 & Cr4::LA57.bits() != 0 {
        return None;
    }
    let levels: u32 = if long {
        4
    } else if pae {
        3
    } else {
        2
    };
    let (index_bits, entry_size) = if pae { (9, 8) } else { (10, 4) };
    let mut table = state.cr3
        & if long {
            ADDRESS
        } else if pae {
            0xffff_ffe0
        } else {
            0xffff_f000
        };
    for level in (0..levels).rev() {
        let shift = 12 + index_bits * level;
        let index = (linear >> shift) & ((1 << index_bits) - 1);
        // Three-level paging has four entries on top.
        let index = if pae && !long && level == 2 { index & 3 } else { index };
        let at = GuestAddress(table.checked_add(index * entry_size)?);
        let entry = if pae { memory.read::<u64>(at).ok()? } else { u64::from(memory.read::<u32>(at).ok()?) };
        let bits = Entry::from_bits_retain(entry);
        if !bits.contains(Entry::PRESENT) {
            return None;
        }
        let large = level > 0 && bits.contains(Entry::LARGE) && !(pae && !long && level == 2);
        let base = entry & if pae { ADDRESS } else { 0xffff_f000 };
        if large || level == 0 {
            let inside = (1_u64 << shift) - 1;
            return Some(GuestAddress((base & !inside) | (linear & inside)));
        }
        table = base;
    }
    None
}

/// Up to `len` bytes from a linear address, as many as are mapped.
pub(crate) fn read_linear(memory: &GuestMemory, state: &CpuState, linear: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = linear.wrapping_add(bytes.len() as u64);
        let Some(physical) = translate(memory, state, at) else { break };
        let in_page = (PAGE_SIZE - (at & PAGE_MASK)) as usize;
        let mut piece = vec![0; in_page.min(len - bytes.len())];
        if memory.read_bytes(physical, &mut piece).is_err() {
            break;
        }
        bytes.append(&mut piece);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpaged_address_is_physical() {
        let memory = GuestMemory::flat(1 << 20).unwrap();
        memory.write_bytes(GuestAddress(0xffc), &[1, 2, 3, 4, 5, 6]).unwrap();
        let state = CpuState::default();
        assert_eq!(read_linear(&memory, &state, 0xffc, 6), [1, 2, 3, 4, 5, 6]);
        assert!(read_linear(&memory, &state, 1 << 20, 4).is_empty());
    }

    #[test]
    fn four_levels_and_a_large_page_are_followed() {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        let linear: u64 = 0xffff_8000_0020_1234;
        for (table, index, entry) in [
            (0x1000_u64, (linear >> 39) & 511, 0x2003_u64),
            (0x2000, (linear >> 30) & 511, 0x3003),
            (0x3000, (linear >> 21) & 511, 0x20_0083),
        ] {
            memory.write(GuestAddress(table + index * 8), entry).unwrap();
        }
        memory.write(GuestAddress(0x20_1234), 0x0b0f_u16).unwrap();
        let state = CpuState {
            cr0: Cr0::PG.bits() | Cr0::PE.bits(),
            cr3: 0x1000,
            cr4: Cr4::PAE.bits(),
            efer: Efer::LMA.bits() | Efer::LME.bits(),
            ..CpuState::default()
        };
        assert_eq!(read_linear(&memory, &state, linear, 2), [0x0f, 0x0b]);
        assert!(read_linear(&memory, &state, 0x1000, 2).is_empty());
    }
}
