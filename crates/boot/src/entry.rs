//! The states in which kernels are entered.

use ringfence_engine::CpuState;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::paging::Entry;
use ringfence_x86::{
    Cr0, Cr4, DescriptorTable, Efer, Gpr, Segment, SegmentRegister, Selector, msr, segment::attribute,
};

use crate::BootError;
use crate::layout::Layout;

/// The code selector that Linux expects (`__BOOT_CS`).
const CODE: u16 = 0x10;
/// The data selector that Linux expects (`__BOOT_DS`).
const DATA: u16 = 0x18;
/// The task state, which no instruction uses.
const TASK: u16 = 0x20;

/// How much of the address space the page tables map one to one.
const MAPPED_GIB: u64 = 4;

const CODE_ATTRIBUTES: u16 = attribute::PRESENT
    | attribute::S
    | attribute::CODE
    | attribute::READ_WRITE
    | attribute::ACCESSED
    | attribute::GRANULARITY;
const DATA_ATTRIBUTES: u16 = attribute::PRESENT
    | attribute::S
    | attribute::READ_WRITE
    | attribute::ACCESSED
    | attribute::GRANULARITY
    | attribute::DB;

const fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector: Selector(selector), base: 0, limit: u32::MAX, attributes }
}

/// Registers as any boot loader leaves them: flat segments, interrupts off, no interrupt table, memory cached.
fn common(code_attributes: u16, entry: GuestAddress) -> CpuState {
    let mut state = CpuState { rip: entry.0, cr0: (Cr0::PE | Cr0::ET).bits(), ..CpuState::default() };
    state.segments = [flat(DATA, DATA_ATTRIBUTES); 6];
    state.segments[SegmentRegister::Cs as usize] = flat(CODE, code_attributes);
    // A busy 32- or 64-bit TSS; hardware virtualization insists on one.
    state.tr =
        Segment { selector: Selector(TASK), base: 0, limit: 0x67, attributes: attribute::PRESENT | 11 };
    state.ldtr = Segment { selector: Selector(0), base: 0, limit: 0, attributes: attribute::PRESENT | 2 };
    state.idtr = DescriptorTable::default();
    // Firmware has switched the memory type ranges on; write-back is the default type, and devices are uncached
    // by the guest's page tables (SDM 3A 11.11.2.1: E is bit 11, type 6).
    state.msrs.insert(msr::MTRR_DEFAULT_TYPE, 0x806);
    state
}

/// Writes a GDT with the boot segments and points the state at it.
fn write_gdt(memory: &GuestMemory, layout: &mut Layout, state: &mut CpuState) -> Result<(), BootError> {
    let code = state.segments[SegmentRegister::Cs as usize].to_descriptor();
    let table = [0, 0, code, flat(DATA, DATA_ATTRIBUTES).to_descriptor(), state.tr.to_descriptor(), 0];
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    let range = layout.claim_small(bytes.len() as u64, 16, "the boot GDT")?;
    memory.write_bytes(range.start, &bytes).map_err(BootError::memory("the boot GDT"))?;
    state.gdtr = DescriptorTable { base: range.start.0, limit: bytes.len() as u16 - 1 };
    Ok(())
}

/// Writes page tables that map the first 4 GiB one to one with 2 MiB pages, and returns CR3.
fn write_page_tables(memory: &GuestMemory, layout: &mut Layout) -> Result<u64, BootError> {
    let table = (Entry::PRESENT | Entry::WRITABLE).bits();
    let leaf = (Entry::PRESENT | Entry::WRITABLE | Entry::LARGE).bits();
    let size = (2 + MAPPED_GIB) * 0x1000;
    let root = layout.claim_small(size, 0x1000, "the boot page tables")?.start.0;
    let mut entries = vec![0_u64; size as usize / 8];
    entries[0] = (root + 0x1000) | table;
    for gib in 0..MAPPED_GIB {
        entries[(512 + gib) as usize] = (root + 0x2000 + gib * 0x1000) | table;
    }
    for (index, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = (index as u64) << 21 | leaf;
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    memory.write_bytes(GuestAddress(root), &bytes).map_err(BootError::memory("the boot page tables"))?;
    Ok(root)
}

/// The 64-bit Linux entry (Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol"): paging on with an identity
/// mapping, selectors 10 and 18, RSI at the zero page, interrupts off.
pub(crate) fn long_mode(
    memory: &GuestMemory,
    layout: &mut Layout,
    entry: GuestAddress,
    zero_page: GuestAddress,
) -> Result<CpuState, BootError> {
    let mut state = common(CODE_ATTRIBUTES | attribute::LONG, entry);
    write_gdt(memory, layout, &mut state)?;
    state.cr3 = write_page_tables(memory, layout)?;
    state.cr0 |= Cr0::PG.bits();
    state.cr4 = Cr4::PAE.bits();
    state.efer = (Efer::LME | Efer::LMA).bits();
    state.gpr[Gpr::Rsi as usize] = zero_page.0;
    let stack = layout.claim_small(0x1000, 0x1000, "the boot stack")?;
    state.gpr[Gpr::Rsp as usize] = stack.end();
    Ok(state)
}

/// 32-bit protected mode without paging, for PVH (Xen, docs/misc/pvh.pandoc), Multiboot (Multiboot 0.6.96, 3.2) and 32-bit Linux: flat
/// segments, interrupts off.
pub(crate) fn protected_mode(
    memory: &GuestMemory,
    layout: &mut Layout,
    entry: GuestAddress,
) -> Result<CpuState, BootError> {
    let mut state = common(CODE_ATTRIBUTES | attribute::DB, entry);
    write_gdt(memory, layout, &mut state)?;
    Ok(state)
}
