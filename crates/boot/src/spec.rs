//! What is to be booted.

use crate::PlatformDescription;

/// How the kernel is to be entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// By the file: a bzImage by its boot protocol; an ELF file by its PVH note, its Multiboot header, or the
    /// 64-bit Linux protocol, whichever it offers first.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// PVH.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

/// Whether the kernel's address is randomized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kaslr {
    /// The kernel runs where it was linked to run.
    #[default]
    Off,
    /// Virtual and physical address are drawn from the host's random source.
    Random,
    /// They follow from a number, for runs that must repeat exactly.
    Seeded(u64),
}

/// An initrd, or a Multiboot module.
#[derive(Clone, Copy, Debug)]
pub struct Initrd<'a> {
    /// Its bytes.
    pub data: &'a [u8],
    /// A Multiboot module's string; not used otherwise.
    pub name: &'a str,
}

/// What is to be booted, and on what.
#[derive(Clone, Debug)]
pub struct BootSpec<'a> {
    /// The kernel's file.
    pub kernel: &'a [u8],
    /// Initrds. Linux gets them one after the other, each aligned to 4 bytes; a Multiboot kernel gets one
    /// module each.
    pub initrds: &'a [Initrd<'a>],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// How to enter the kernel.
    pub protocol: Protocol,
    /// Whether to randomize its address.
    pub kaslr: Kaslr,
    /// Let a bzImage's own decompressor run in the guest, as a boot loader would. The guest then decides about
    /// KASLR itself (`nokaslr` on the command line switches it off).
    pub decompress_in_guest: bool,
    /// Number of vCPUs.
    pub cpus: u32,
    /// A seed for Linux's random number generator (`SETUP_RNG_SEED`, Linux 6.0 and later). `None` gives none,
    /// as a run that must repeat exactly needs.
    pub rng_seed: Option<[u8; 32]>,
    /// The devices that the tables describe.
    pub platform: PlatformDescription,
}

impl<'a> BootSpec<'a> {
    /// A kernel with everything else at its default: no initrd, no arguments, one vCPU.
    pub fn new(kernel: &'a [u8]) -> Self {
        Self {
            kernel,
            initrds: &[],
            command_line: "",
            protocol: Protocol::Auto,
            kaslr: Kaslr::Off,
            decompress_in_guest: false,
            cpus: 1,
            rng_seed: None,
            platform: PlatformDescription::default(),
        }
    }

    /// Bytes of all initrds, each padded to a multiple of `align`.
    pub(crate) fn initrd_size(&self, align: u64) -> u64 {
        self.initrds.iter().map(|i| (i.data.len() as u64).next_multiple_of(align)).sum()
    }
}
