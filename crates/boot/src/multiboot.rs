//! Multiboot 1 (Multiboot Specification 0.6.96).

use ringfence_memory::{GuestAddress, GuestRange};
use ringfence_x86::Gpr;

use crate::bytes::u32_at;
use crate::elf::Elf;
use crate::layout::{FOUR_GIB, KERNEL, LOW_END};
use crate::load::Context;
use crate::stream::load_elf;
use crate::{BootError, BootPlan, E820Kind, KaslrOutcome, KernelFormat, entry as cpu_entry, linux};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What a kernel finds in EAX.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies in the first bytes of the file, 4-aligned (3.1).
const HEADER_SEARCH: usize = 8192;

/// Header flags (3.1.2).
mod flag {
    /// Modules start at page boundaries; they always do here.
    pub(super) const ALIGN: u32 = 1 << 0;
    /// Memory information is needed; it is always given.
    pub(super) const MEMORY: u32 = 1 << 1;
    /// The addresses in the header say what to load (the "a.out kludge").
    pub(super) const ADDRESSES: u32 = 1 << 16;
    /// Flags that must not be ignored.
    pub(super) const REQUIRED: u32 = 0xffff;
}

/// Information flags (3.3): memory, command line, modules, memory map, boot loader name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const INFO_SIZE: u64 = 116;
const LOADER_NAME: &[u8] = b"Ringfence\0";

#[derive(Clone, Copy, Debug)]
struct Header {
    /// Where it was found in the file.
    offset: usize,
    flags: u32,
    /// Header, load, load end, bss end and entry address.
    addresses: [u32; 5],
}

/// Finds the header: magic number, flags, and a checksum that makes the sum zero.
fn find(file: &[u8]) -> Option<Header> {
    let end = file.len().min(HEADER_SEARCH);
    (0..end.saturating_sub(11)).step_by(4).find_map(|offset| {
        let word = |index: usize| u32_at(file.get(..end)?, offset + index * 4);
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        let sound = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0;
        let addresses = [3, 4, 5, 6, 7].map(|i| word(i).unwrap_or(0));
        sound.then_some(Header { offset, flags, addresses })
    })
}

/// Whether a file has a Multiboot header.
pub(crate) fn is_multiboot(file: &[u8]) -> bool {
    find(file).is_some()
}

/// Loads a Multiboot kernel.
pub(crate) fn load(context: &mut Context<'_>) -> Result<BootPlan, BootError> {
    let file = context.spec.kernel;
    let header = find(file).ok_or(BootError::WrongProtocol {
        wanted: "Multiboot",
        why: "there is no Multiboot header in its first 8 KiB",
    })?;
    let unknown = header.flags & flag::REQUIRED & !(flag::ALIGN | flag::MEMORY);
    if unknown != 0 {
        return Err(BootError::MultibootFeatures(unknown));
    }
    let (entry, kernel) = if header.flags & flag::ADDRESSES != 0 {
        load_by_addresses(context, &header)?
    } else {
        load_by_elf(context)?
    };
    let modules = load_modules(context, kernel)?;
    let info = write_info(context, &modules)?;
    let mut cpu = cpu_entry::protected_mode(context.memory, &mut context.layout, entry)?;
    cpu.gpr[Gpr::Rax as usize] = LOADER_MAGIC;
    cpu.gpr[Gpr::Rbx as usize] = info;
    let initrd = modules.first().zip(modules.last());
    let initrd = initrd.map(|(a, b)| GuestRange::new(a.start.0, b.end() - a.start.0));
    let kaslr = KaslrOutcome::NotApplicable;
    Ok(BootPlan { initrd, kaslr, ..context.plan(cpu, KernelFormat::Multiboot, entry, kernel) })
}

/// Loads one piece as the header's address fields say (3.1.3).
fn load_by_addresses(
    context: &mut Context<'_>,
    header: &Header,
) -> Result<(GuestAddress, GuestRange), BootError> {
    let file = context.spec.kernel;
    let [header_address, load, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let bad = BootError::BadMultiboot;
    let before = header_address.checked_sub(load).ok_or(bad("the header lies before the load address"))?;
    let start =
        (header.offset as u64).checked_sub(before).ok_or(bad("the load address lies before the file"))?;
    let bytes = match load_end {
        0 => file.len() as u64 - start,
        end => end.checked_sub(load).ok_or(bad("the load end lies before the load address"))?,
    };
    let needs = start.saturating_add(bytes);
    let has = file.len() as u64;
    let cut = BootError::Truncated { part: "loaded part", needs, has };
    let data = file.get(start as usize..needs as usize).ok_or(cut)?;
    let size = match bss_end {
        0 => bytes,
        end => end
            .checked_sub(load)
            .filter(|n| *n >= bytes)
            .ok_or(bad("the bss end lies before the load end"))?,
    };
    let range = GuestRange::new(load, size);
    if !range.contains(GuestAddress(entry), 1) {
        return Err(bad("the entry point lies outside of the kernel"));
    }
    context.layout.claim(range, KERNEL)?;
    let fail = BootError::memory("the kernel");
    context.memory.write_bytes(range.start, data).map_err(&fail)?;
    context.memory.fill(GuestAddress(load + bytes), 0, size - bytes).map_err(&fail)?;
    Ok((GuestAddress(entry), range))
}

fn load_by_elf(context: &mut Context<'_>) -> Result<(GuestAddress, GuestRange), BootError> {
    let file = context.spec.kernel;
    let elf = Elf::parse(file)?;
    elf.require_x86()?;
    let range = linux::claim_segments(context, &elf)?;
    let entry = elf.physical_entry().filter(|e| *e < FOUR_GIB);
    let entry = entry.ok_or(BootError::BadElf("its entry point is outside of every segment"))?;
    load_elf(context.memory, file, &|s| Ok(GuestAddress(s.physical_address)))?;
    Ok((GuestAddress(entry), range))
}

/// Places the modules right behind the kernel, page-aligned: many kernels look no further.
fn load_modules(context: &mut Context<'_>, kernel: GuestRange) -> Result<Vec<GuestRange>, BootError> {
    let spec = context.spec;
    let mut floor = kernel.end();
    let mut modules = Vec::new();
    for module in spec.initrds {
        let size = module.data.len() as u64;
        let range = context.layout.claim_lowest(size, 0x1000, floor, FOUR_GIB, "a module");
        let range = range.ok_or_else(|| BootError::InitrdDoesNotFit {
            size: spec.initrd_size(0x1000),
            limit: FOUR_GIB,
            needed: linux::needed_for_initrd(&context.layout, spec.initrd_size(0x1000), FOUR_GIB),
        })?;
        context.memory.write_bytes(range.start, module.data).map_err(BootError::memory("a module"))?;
        floor = range.end();
        modules.push(range);
    }
    Ok(modules)
}

/// Strings and tables that the information points to, placed behind it.
struct Info {
    start: u64,
    bytes: Vec<u8>,
}

impl Info {
    /// Appends bytes and returns their address.
    fn add(&mut self, bytes: &[u8]) -> u32 {
        let at = self.start + self.bytes.len() as u64;
        self.bytes.extend(bytes);
        at as u32
    }

    fn add_text(&mut self, text: &str) -> u32 {
        let at = self.add(text.as_bytes());
        // A NUL ends the text early, which is all that the kernel would see anyway.
        self.bytes.push(0);
        at
    }

    fn put(&mut self, at: usize, value: u32) {
        if let Some(to) = self.bytes.get_mut(at..at + 4) {
            to.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Writes the information structure and everything that it points to (3.3). Returns its address.
fn write_info(context: &mut Context<'_>, modules: &[GuestRange]) -> Result<u64, BootError> {
    const WHAT: &str = "the Multiboot information";
    let spec = context.spec;
    let map_size = 24 * context.memory_map.len() as u64;
    let names: u64 = spec.initrds.iter().map(|i| i.name.len() as u64 + 1).sum();
    let strings = names + spec.command_line.len() as u64 + 1 + LOADER_NAME.len() as u64;
    let size = INFO_SIZE + map_size + 16 * modules.len() as u64 + strings;
    let start = context.layout.claim_small(size, 16, WHAT)?.start.0;

    let mut info = Info { start, bytes: vec![0; INFO_SIZE as usize] };
    let mut map = Vec::new();
    for entry in &context.memory_map {
        map.extend(20_u32.to_le_bytes());
        map.extend(entry.range.start.0.to_le_bytes());
        map.extend(entry.range.len.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
    }
    let map_address = info.add(&map);
    let names: Vec<u32> = spec.initrds.iter().map(|i| info.add_text(i.name)).collect();
    let mut list = Vec::new();
    for (module, name) in modules.iter().zip(names) {
        for value in [module.start.0 as u32, module.end() as u32, name, 0] {
            list.extend(value.to_le_bytes());
        }
    }
    let list = info.add(&list);
    let command_line = info.add_text(spec.command_line);
    let loader = info.add(LOADER_NAME);
    // Kilobytes from 0 and from 1 MiB on, up to the first hole.
    let upper = context.memory_map.iter().find(|e| e.range.start.0 == 0x10_0000 && e.kind == E820Kind::Ram);
    let fields = [
        (0, INFO_FLAGS),
        (4, (LOW_END >> 10) as u32),
        (8, upper.map_or(0, |e| (e.range.len >> 10) as u32)),
        (16, command_line),
        (20, modules.len() as u32),
        (24, list),
        (44, map.len() as u32),
        (48, map_address),
        (64, loader),
    ];
    for (at, value) in fields {
        info.put(at, value);
    }
    context.memory.write_bytes(GuestAddress(start), &info.bytes).map_err(BootError::memory(WHAT))?;
    Ok(start)
}
