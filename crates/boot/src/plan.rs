//! What was loaded, and how it starts.

use std::fmt;

use ringfence_engine::CpuState;
use ringfence_memory::{GuestAddress, GuestRange};

use crate::{Claim, Compression, E820Entry};

/// The kind of a kernel and how it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// Linux bzImage, unpacked on the host.
    BzImage(Compression),
    /// Linux bzImage, unpacked by itself.
    BzImageInGuest,
    /// Linux bzImage entered in 32-bit mode, unpacked by itself.
    BzImage32,
    /// ELF vmlinux by the 64-bit Linux protocol.
    Vmlinux,
    /// ELF by its PVH entry.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

impl fmt::Display for KernelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BzImage(compression) => write!(f, "bzImage ({compression}, unpacked on the host)"),
            Self::BzImageInGuest => f.write_str("bzImage (unpacks itself)"),
            Self::BzImage32 => f.write_str("bzImage (32-bit, unpacks itself)"),
            Self::Vmlinux => f.write_str("ELF vmlinux"),
            Self::Pvh => f.write_str("ELF with PVH entry"),
            Self::Multiboot => f.write_str("Multiboot"),
        }
    }
}

/// What became of KASLR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KaslrOutcome {
    /// Not asked for: the kernel runs at the address it was linked for.
    Off,
    /// `nokaslr` on the command line.
    ForbiddenByCommandLine,
    /// The kernel unpacks itself and decides by itself.
    LeftToGuest,
    /// Not a thing of this kind of kernel.
    NotApplicable,
    /// Applied.
    Applied {
        /// Added to every virtual address of the kernel, in bytes.
        virtual_slide: u64,
        /// Where it starts in guest physical memory.
        physical: GuestAddress,
        /// Places that were adjusted.
        relocations: usize,
    },
}

impl fmt::Display for KaslrOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("no KASLR (--kaslr turns it on)"),
            Self::ForbiddenByCommandLine => f.write_str("no KASLR (nokaslr on the command line)"),
            Self::LeftToGuest => f.write_str("KASLR left to the guest"),
            Self::NotApplicable => f.write_str("no KASLR for this kind of kernel"),
            Self::Applied { virtual_slide, physical, relocations } => {
                write!(f, "KASLR: {virtual_slide:#x} up, at {physical}, {relocations} relocations")
            }
        }
    }
}

/// What was loaded, and how it starts.
#[derive(Clone, Debug)]
pub struct BootPlan {
    /// The state in which vCPU 0 starts. The others wait for their start-up IPI.
    pub cpu: CpuState,
    /// Format and way of entry.
    pub format: KernelFormat,
    /// The kernel's version where the file tells it.
    pub version: Option<String>,
    /// The first instruction's guest physical address.
    pub entry: GuestAddress,
    /// The memory that the kernel occupies at first.
    pub kernel: GuestRange,
    /// The initrds; for Multiboot, from the first to the last module.
    pub initrd: Option<GuestRange>,
    /// What became of KASLR.
    pub kaslr: KaslrOutcome,
    /// The memory map the guest was told.
    pub memory_map: Vec<E820Entry>,
    /// The ACPI root pointer.
    pub rsdp: GuestAddress,
    /// Everything that was placed, for those who want to see it.
    pub claims: Vec<Claim>,
}

impl fmt::Display for BootPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.version.as_deref().unwrap_or("kernel of unknown version");
        write!(f, "{version}: {}, entered at {}", self.format, self.entry)?;
        write!(f, ", in memory from {} to {:#x}", self.kernel.start, self.kernel.end())?;
        if let Some(initrd) = &self.initrd {
            write!(f, ", initrd from {} to {:#x}", initrd.start, initrd.end())?;
        }
        write!(f, "; {}", self.kaslr)
    }
}
