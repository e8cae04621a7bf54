//! A bzImage: unpacked here and entered directly, or left to its own decompressor, as every 32-bit kernel is.

use ringfence_memory::{GuestAddress, GuestRange};
use ringfence_x86::Gpr;

use super::header::SetupHeader;
use super::relocate::Relocations;
use super::zero_page::ZeroPage;
use super::{place_initrd, write_initrd};
use crate::layout::{HIGH_START, KERNEL};
use crate::load::Context;
use crate::random::Random;
use crate::stream::ElfLoader;
use crate::unpack::unpack;
use crate::{BootError, BootPlan, KaslrOutcome, KernelFormat, Protocol, entry};

/// x86-64 kernels start at a multiple of this, whatever their header says.
const MIN_ALIGNMENT: u64 = 2 << 20;
/// The window of virtual addresses for the kernel's image, with KASLR (`KERNEL_IMAGE_SIZE`).
const IMAGE_WINDOW: u64 = 1 << 30;
/// The offset of the 64-bit entry in the protected-mode part; the 32-bit entry is at its start.
const ENTRY_64: u64 = 0x200;
/// Memory for a kernel whose header does not tell how much it needs, on top of its unpacked size.
const SLACK: u64 = 8 << 20;

/// Whether a file is a Linux image with a setup header.
pub(crate) fn is_bzimage(file: &[u8]) -> bool {
    SetupHeader::is_present(file)
}

/// Where the kernel goes.
struct Placement {
    /// The memory it may use at first.
    range: GuestRange,
    virtual_slide: u64,
}

/// Loads a bzImage.
pub(crate) fn load(context: &mut Context<'_>) -> Result<BootPlan, BootError> {
    let header = SetupHeader::parse(context.spec.kernel)?;
    if context.spec.decompress_in_guest || header.is_32bit() {
        return load_packed(context, &header);
    }
    // Old headers do not tell whether the kernel is a 32-bit one; what is packed does.
    let layout = context.layout.clone();
    match load_unpacked(context, &header) {
        Err(BootError::ThirtyTwoBit) if !header.has_64bit_entry() => {
            context.layout = layout;
            load_packed(context, &header)
        }
        result => result,
    }
}

fn load_unpacked(context: &mut Context<'_>, header: &SetupHeader<'_>) -> Result<BootPlan, BootError> {
    let payload = header.payload()?;
    let size = match header.init_size {
        0 => payload.last_chunk().map_or(0, |c| u64::from(u32::from_le_bytes(*c))) + SLACK,
        size => size,
    };
    let preferred = GuestRange::new(header.preferred_address, size);
    context.layout.claim(preferred, KERNEL)?;
    let initrd = place_initrd(context.spec, &mut context.layout, header.initrd_limit())?;
    let placement = place(context, header, preferred)?;
    let physical_slide = placement.range.start.0.wrapping_sub(preferred.start.0);

    let put = |segment: &crate::elf::Segment| {
        let at = GuestAddress(segment.physical_address.wrapping_add(physical_slide));
        let inside = placement.range.contains(at, segment.memory_size);
        inside
            .then_some(at)
            .ok_or(BootError::BadElf("a segment lies outside of the memory that the header asks for"))
    };
    let mut loader = ElfLoader::new(context.memory, &put);
    let compression = unpack(payload, size, &mut |piece| loader.feed(piece))?;
    let (elf, tail) = loader.finish()?;
    elf.require_linux64()?;
    let entry =
        elf.physical_entry().ok_or(BootError::BadElf("its entry point is outside of every segment"))?;
    let entry = GuestAddress(entry.wrapping_add(physical_slide));

    let kaslr = match context.spec.kaslr {
        crate::Kaslr::Off => KaslrOutcome::Off,
        _ if context.forbids_kaslr() => KaslrOutcome::ForbiddenByCommandLine,
        _ => {
            let relocations = Relocations::parse(&tail)?;
            let (slide, extent) = (placement.virtual_slide, elf.extent());
            let count = relocations.apply(context.memory, &extent, physical_slide, slide)?;
            KaslrOutcome::Applied {
                virtual_slide: slide,
                physical: placement.range.start,
                relocations: count,
            }
        }
    };
    finish(context, header, KernelFormat::BzImage(compression), entry, placement.range, initrd, kaslr)
}

/// The header's own place, or a random one.
fn place(
    context: &mut Context<'_>,
    header: &SetupHeader<'_>,
    preferred: GuestRange,
) -> Result<Placement, BootError> {
    let random = Random::of(context.spec.kaslr).filter(|_| !context.forbids_kaslr());
    let Some(mut random) = random else { return Ok(Placement { range: preferred, virtual_slide: 0 }) };
    if !header.relocatable {
        return Err(BootError::KaslrUnavailable("it was built without CONFIG_RELOCATABLE"));
    }
    let align = match header.alignment {
        a if a.is_power_of_two() && a <= IMAGE_WINDOW => a.max(MIN_ALIGNMENT),
        _ => MIN_ALIGNMENT,
    };
    let (start, size) = (preferred.start.0, preferred.len);
    let spare = IMAGE_WINDOW.checked_sub(start).and_then(|s| s.checked_sub(size));
    let spare =
        spare.ok_or(BootError::KaslrUnavailable("it fills the window of virtual addresses for kernels"))?;
    let virtual_slide = random.below(spare / align + 1)? * align;

    context.layout.release(KERNEL);
    let end = context.layout.low_ram_end();
    let candidate = |i: u64| GuestRange::new(start + i * align, size);
    let count = end.saturating_sub(start) / align + 1;
    let free: Vec<u64> = (0..count).filter(|&i| context.layout.is_free(&candidate(i))).collect();
    // The preferred place was free a moment ago, so there is at least one.
    let index = random.below((free.len() as u64).max(1))? as usize;
    let range = free.get(index).map_or(preferred, |&i| candidate(i));
    context.layout.claim(range, KERNEL)?;
    Ok(Placement { range, virtual_slide })
}

fn load_packed(context: &mut Context<'_>, header: &SetupHeader<'_>) -> Result<BootPlan, BootError> {
    let code = header.whole_code()?;
    let by_32_bits = !header.has_64bit_entry();
    if by_32_bits && context.spec.protocol == Protocol::Linux64 {
        return Err(BootError::ThirtyTwoBit);
    }
    // Where boot loaders put it, if it cannot run elsewhere.
    let start = if header.relocatable { header.preferred_address } else { HIGH_START };
    let size = match header.init_size {
        // It unpacks itself to some three times its size.
        0 => 4 * code.len() as u64 + SLACK,
        size => size.max(code.len() as u64),
    };
    let range = GuestRange::new(start, size);
    context.layout.claim(range, KERNEL)?;
    let initrd = place_initrd(context.spec, &mut context.layout, header.initrd_limit())?;
    context.memory.write_bytes(range.start, code).map_err(BootError::memory("the kernel"))?;
    let entry = GuestAddress(range.start.0 + if by_32_bits { 0 } else { ENTRY_64 });
    let format = if by_32_bits { KernelFormat::BzImage32 } else { KernelFormat::BzImageInGuest };
    let kaslr = if context.forbids_kaslr() {
        KaslrOutcome::ForbiddenByCommandLine
    } else {
        KaslrOutcome::LeftToGuest
    };
    finish(context, header, format, entry, range, initrd, kaslr)
}

fn finish(
    context: &mut Context<'_>,
    header: &SetupHeader<'_>,
    format: KernelFormat,
    entry: GuestAddress,
    kernel: GuestRange,
    initrd: Option<GuestRange>,
    kaslr: KaslrOutcome,
) -> Result<BootPlan, BootError> {
    if let Some(range) = initrd {
        write_initrd(context.memory, context.spec.initrds, range)?;
    }
    let zero_page = ZeroPage {
        header: header.bytes(),
        command_line: context.spec.command_line,
        command_line_limit: header.command_line_limit,
        initrd,
        memory_map: &context.memory_map,
        rsdp: context.rsdp,
        kaslr: matches!(kaslr, KaslrOutcome::Applied { .. }),
        rng_seed: context.spec.rng_seed,
    };
    let zero_page = zero_page.write(context.memory, &mut context.layout)?;
    let cpu = if format == KernelFormat::BzImage32 {
        // Documentation/arch/x86/boot.rst, "32-bit boot protocol": ESI at the zero page, EBP, EDI and EBX zero.
        let mut cpu = entry::protected_mode(context.memory, &mut context.layout, entry)?;
        cpu.gpr[Gpr::Rsi as usize] = zero_page.0;
        cpu
    } else {
        entry::long_mode(context.memory, &mut context.layout, entry, zero_page)?
    };
    Ok(BootPlan {
        version: header.version().map(|v| format!("Linux {v}")),
        initrd,
        kaslr,
        ..context.plan(cpu, format, entry, kernel)
    })
}
