//! An ELF vmlinux by the 64-bit boot protocol.

use ringfence_memory::{GuestAddress, GuestRange};

use super::header::START;
use super::zero_page::ZeroPage;
use super::{place_initrd, write_initrd};
use crate::elf::Elf;
use crate::layout::{FOUR_GIB, KERNEL};
use crate::load::Context;
use crate::stream::load_elf;
use crate::{BootError, BootPlan, KernelFormat, entry};

/// The length of command line that x86 kernels take (`COMMAND_LINE_SIZE`), less the final NUL.
const COMMAND_LINE_LIMIT: usize = 2047;

/// A setup header such as a bzImage would bring along.
fn header() -> [u8; 0x9f] {
    let mut header = [0; 0x9f];
    let fields: [(usize, &[u8]); 6] = [
        (0x1fe, &0xaa55_u16.to_le_bytes()),
        (0x202, b"HdrS"),
        (0x206, &0x020f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x230, &(2_u32 << 20).to_le_bytes()),
        (0x238, &(COMMAND_LINE_LIMIT as u32).to_le_bytes()),
    ];
    for (at, bytes) in fields {
        header[at - START..at - START + bytes.len()].copy_from_slice(bytes);
    }
    header
}

/// Loads an ELF vmlinux whose headers have been parsed.
pub(crate) fn load(context: &mut Context<'_>, elf: &Elf) -> Result<BootPlan, BootError> {
    elf.require_linux64()?;
    let entry =
        elf.physical_entry().ok_or(BootError::BadElf("its entry point is outside of every segment"))?;
    let kernel = claim_segments(context, elf)?;
    let initrd = place_initrd(context.spec, &mut context.layout, FOUR_GIB)?;
    load_elf(context.memory, context.spec.kernel, &|s| Ok(GuestAddress(s.physical_address)))?;
    if let Some(range) = initrd {
        write_initrd(context.memory, context.spec.initrds, range)?;
    }
    let zero_page = ZeroPage {
        header: &header(),
        command_line: context.spec.command_line,
        command_line_limit: COMMAND_LINE_LIMIT,
        initrd,
        memory_map: &context.memory_map,
        rsdp: context.rsdp,
        kaslr: false,
        rng_seed: context.spec.rng_seed,
    };
    let zero_page = zero_page.write(context.memory, &mut context.layout)?;
    let cpu = entry::long_mode(context.memory, &mut context.layout, GuestAddress(entry), zero_page)?;
    let kaslr = context.kaslr_of_elf()?;
    Ok(BootPlan { initrd, kaslr, ..context.plan(cpu, KernelFormat::Vmlinux, GuestAddress(entry), kernel) })
}

/// Claims each segment's memory; returns the range from the first to the last.
pub(crate) fn claim_segments(context: &mut Context<'_>, elf: &Elf) -> Result<GuestRange, BootError> {
    for segment in elf.loads() {
        context.layout.claim(segment.memory(), KERNEL)?;
    }
    Ok(elf.extent())
}
