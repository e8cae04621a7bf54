//! From a kernel's file to a machine that is ready to run it.

use ringfence_engine::CpuState;
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange};

use crate::acpi::{self, AcpiTables};
use crate::bytes::hex_head;
use crate::elf::Elf;
use crate::layout::LOW_END;
use crate::{
    BootError, BootPlan, BootSpec, E820Entry, Kaslr, KaslrOutcome, KernelFormat, Layout, Protocol, e820, elf,
    linux, multiboot, pvh, smbios,
};

/// What every loader needs, and what it has placed so far.
pub(crate) struct Context<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) spec: &'a BootSpec<'a>,
    pub(crate) layout: Layout,
    pub(crate) memory_map: Vec<E820Entry>,
    pub(crate) rsdp: GuestAddress,
}

impl Context<'_> {
    /// A plan without the parts that only some kernels have.
    pub(crate) fn plan(
        &self,
        cpu: CpuState,
        format: KernelFormat,
        entry: GuestAddress,
        kernel: GuestRange,
    ) -> BootPlan {
        BootPlan {
            cpu,
            format,
            version: None,
            entry,
            kernel,
            initrd: None,
            kaslr: KaslrOutcome::NotApplicable,
            memory_map: self.memory_map.clone(),
            rsdp: self.rsdp,
            claims: self.layout.claims().to_vec(),
        }
    }

    /// Whether the command line has `nokaslr`, which Linux's decompressor obeys, too.
    pub(crate) fn forbids_kaslr(&self) -> bool {
        self.spec.command_line.split_ascii_whitespace().any(|word| word == "nokaslr")
    }

    /// KASLR for an ELF file, which has no relocations.
    pub(crate) fn kaslr_of_elf(&self) -> Result<KaslrOutcome, BootError> {
        match self.spec.kaslr {
            Kaslr::Off => Ok(KaslrOutcome::Off),
            _ if self.forbids_kaslr() => Ok(KaslrOutcome::ForbiddenByCommandLine),
            _ => Err(BootError::KaslrUnavailable("an ELF vmlinux has no relocations; use the bzImage")),
        }
    }
}

/// Loads a kernel and everything it is told into guest memory.
///
/// RAM must start at 0 and reach past 1 MiB, and the firmware's segments (E0000 to FFFFF) must be memory,
/// RAM or ROM. What was there before is overwritten as needed, not cleared.
///
/// # Errors
/// A [`BootError`] that says what is wrong with the kernel, or what does not fit. Guest memory may have been
/// written to by then.
pub fn load(memory: &GuestMemory, spec: &BootSpec<'_>) -> Result<BootPlan, BootError> {
    if spec.command_line.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    let mut layout = Layout::new(memory);
    let acpi = write_firmware(memory, spec, &mut layout)?;
    let memory_map = e820::map(&layout, &acpi, &spec.platform);
    let mut context = Context { memory, spec, layout, memory_map, rsdp: acpi::RSDP };

    if linux::is_bzimage(spec.kernel) {
        return match spec.protocol {
            Protocol::Auto | Protocol::Linux64 => linux::load_bzimage(&mut context),
            Protocol::Pvh => Err(wrong("PVH", "it is a bzImage; its vmlinux may have a PVH entry")),
            Protocol::Multiboot => Err(wrong("Multiboot", "it is a Linux bzImage")),
        };
    }
    let is_elf = spec.kernel.starts_with(elf::MAGIC);
    match spec.protocol {
        Protocol::Multiboot => multiboot::load(&mut context),
        Protocol::Pvh => pvh::load(&mut context, &parse(spec.kernel)?),
        Protocol::Linux64 => linux::load_vmlinux(&mut context, &parse(spec.kernel)?),
        Protocol::Auto if is_elf => {
            let elf = Elf::parse(spec.kernel)?;
            elf.require_x86()?;
            if pvh::entry(&elf, spec.kernel).is_some() {
                pvh::load(&mut context, &elf)
            } else if multiboot::is_multiboot(spec.kernel) {
                multiboot::load(&mut context)
            } else {
                linux::load_vmlinux(&mut context, &elf)
            }
        }
        Protocol::Auto if multiboot::is_multiboot(spec.kernel) => multiboot::load(&mut context),
        Protocol::Auto => Err(unknown(spec.kernel)),
    }
}

fn wrong(wanted: &'static str, why: &'static str) -> BootError {
    BootError::WrongProtocol { wanted, why }
}

fn parse(kernel: &[u8]) -> Result<Elf, BootError> {
    if kernel.starts_with(elf::MAGIC) { Elf::parse(kernel) } else { Err(unknown(kernel)) }
}

/// What people give as a kernel by mistake: offset, bytes, name.
const GUESSES: [(usize, &[u8], &str); 14] = [
    (0x38, b"ARM\x64", "a kernel for 64-bit ARM"),
    (0x30, b"RISCV", "a kernel for RISC-V"),
    (0, b"\x1f\x8b", "a gzip file; unpack it first"),
    (0, b"\xfd7zXZ", "an xz file; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (0, b"BZh", "a bzip2 file; unpack it first"),
    (0, b"070701", "an initramfs (cpio archive)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"MZ", "an EFI program or a unified kernel image, which needs firmware"),
    (0, b"!<arch>\n", "a Debian package; unpack it first"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"#!", "a script"),
    (0x8001, b"CD001", "a CD image"),
    (0x1fe, b"\x55\xaa", "a disk image or a boot sector"),
];

fn unknown(kernel: &[u8]) -> BootError {
    let guess = GUESSES.iter().find(|(at, magic, _)| kernel.get(*at..).is_some_and(|k| k.starts_with(magic)));
    BootError::UnknownFormat { first: hex_head(kernel), guess: guess.map(|g| g.2) }
}

/// Writes what firmware leaves behind: BIOS data, ACPI and SMBIOS tables.
fn write_firmware(
    memory: &GuestMemory,
    spec: &BootSpec<'_>,
    layout: &mut Layout,
) -> Result<AcpiTables, BootError> {
    // The size does not depend on the address, so the first build tells it.
    let size = AcpiTables::build_above(&spec.platform, spec.cpus, 0, layout.ram())?.size();
    let limit = layout.low_ram_end();
    let range = layout
        .claim_highest(size.next_multiple_of(0x1000), 0x1000, limit, "the ACPI tables")
        .ok_or(BootError::NoRoom { what: "the ACPI tables", size })?;
    let acpi = AcpiTables::build_above(&spec.platform, spec.cpus, range.start.0, layout.ram())?;
    acpi.write(memory)?;
    smbios::write(memory, &spec.platform, spec.cpus)?;
    write_bios_data(memory, spec)?;
    Ok(acpi)
}

/// The BIOS data area, as far as operating systems look into it: ports of the serial lines at 400, the extended
/// area's segment at 40E, the size of low memory at 413.
fn write_bios_data(memory: &GuestMemory, spec: &BootSpec<'_>) -> Result<(), BootError> {
    let mut words: Vec<(u64, u16)> =
        (0x400..).step_by(2).zip(&spec.platform.serial).map(|(at, serial)| (at, serial.port)).collect();
    words.push((0x40e, (LOW_END >> 4) as u16));
    words.push((0x413, (LOW_END >> 10) as u16));
    for (at, word) in words {
        memory.write(GuestAddress(at), word).map_err(BootError::memory("the BIOS data area"))?;
    }
    // The extended area starts with its own size in KiB.
    memory.write(GuestAddress(LOW_END), 1_u8).map_err(BootError::memory("the extended BIOS data area"))
}
