//! PVH: the entry that Xen defined for kernels without firmware (Xen, docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h).

use ringfence_memory::GuestAddress;
use ringfence_x86::Gpr;

use crate::bytes::u32_at;
use crate::elf::Elf;
use crate::layout::FOUR_GIB;
use crate::load::Context;
use crate::stream::load_elf;
use crate::{BootError, BootPlan, KernelFormat, entry as cpu_entry, linux};

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;
/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
/// Bytes of `hvm_start_info`, of a module and of a memory map entry.
const START_INFO: u64 = 56;
const MODULE: u64 = 32;
const MAP_ENTRY: u64 = 24;

/// The entry that an ELF file's note names, a physical address.
pub(crate) fn entry(elf: &Elf, file: &[u8]) -> Option<u64> {
    // The note has 4 or 8 bytes; the entry is below 4 GiB either way.
    u32_at(elf.note(file, b"Xen\0", PHYS32_ENTRY)?, 0).map(u64::from)
}

/// Loads an ELF file with a PVH note.
pub(crate) fn load(context: &mut Context<'_>, elf: &Elf) -> Result<BootPlan, BootError> {
    elf.require_x86()?;
    let entry = entry(elf, context.spec.kernel)
        .ok_or(BootError::WrongProtocol { wanted: "PVH", why: "it has no PVH entry note" })?;
    let kernel = linux::claim_segments(context, elf)?;
    if !elf.loads().any(|s| s.memory().contains(GuestAddress(entry), 1)) {
        return Err(BootError::BadElf("its PVH entry is outside of every segment"));
    }
    let initrd = linux::place_initrd(context.spec, &mut context.layout, FOUR_GIB)?;
    load_elf(context.memory, context.spec.kernel, &|s| Ok(GuestAddress(s.physical_address)))?;
    if let Some(range) = initrd {
        linux::write_initrd(context.memory, context.spec.initrds, range)?;
    }
    let start_info = write_start_info(context, initrd)?;
    let mut cpu = cpu_entry::protected_mode(context.memory, &mut context.layout, GuestAddress(entry))?;
    cpu.gpr[Gpr::Rbx as usize] = start_info;
    let kaslr = context.kaslr_of_elf()?;
    Ok(BootPlan { initrd, kaslr, ..context.plan(cpu, KernelFormat::Pvh, GuestAddress(entry), kernel) })
}

/// Writes the start information, the command line, the module and the memory map in one piece.
fn write_start_info(
    context: &mut Context<'_>,
    initrd: Option<ringfence_memory::GuestRange>,
) -> Result<u64, BootError> {
    const WHAT: &str = "the PVH start information";
    let line = context.spec.command_line.as_bytes();
    let map = &context.memory_map;
    let size = START_INFO + MODULE + MAP_ENTRY * map.len() as u64 + line.len() as u64 + 1;
    let start = context.layout.claim_small(size, 16, WHAT)?.start.0;
    let modules = start + START_INFO;
    let entries = modules + MODULE;
    let command_line = entries + MAP_ENTRY * map.len() as u64;

    let mut bytes = Vec::new();
    let modules_count = u32::from(initrd.is_some());
    for word in [MAGIC, VERSION, 0, modules_count] {
        bytes.extend(word.to_le_bytes());
    }
    for address in [modules, command_line, context.rsdp.0, entries] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend((map.len() as u64).to_le_bytes());
    // Address, size, command line, reserved.
    let initrd = initrd.map_or([0, 0], |r| [r.start.0, r.len]);
    for value in [initrd[0], initrd[1], 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    for entry in map {
        bytes.extend(entry.range.start.0.to_le_bytes());
        bytes.extend(entry.range.len.to_le_bytes());
        bytes.extend(u64::from(entry.kind as u32).to_le_bytes());
    }
    bytes.extend(line);
    bytes.push(0);
    context.memory.write_bytes(GuestAddress(start), &bytes).map_err(BootError::memory(WHAT))?;
    Ok(start)
}
