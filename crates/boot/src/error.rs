//! Why a kernel could not be loaded.

use std::io;
use std::path::PathBuf;

use ringfence_memory::MemoryError;

use crate::Compression;

/// Bytes as whole MiB, rounded up.
fn mib(bytes: &u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn more_memory(needed: &Option<u64>) -> String {
    needed
        .map(|n| format!("give the machine at least {} MiB with --memory, or ", mib(&n)))
        .unwrap_or_default()
}

fn looks_like(guess: &Option<&'static str>) -> String {
    guess.map(|g| format!("; it looks like {g}")).unwrap_or_default()
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read the {what} {path:?}: {source}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A file has more bytes than is sensible.
    #[error("the {what} {path:?} is larger than {} MiB, the most that is read", mib(limit))]
    FileTooLarge {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The bound in bytes.
        limit: u64,
    },
    /// The file is not a kernel of a known format.
    #[error(
        "the file is no kernel of a known format (first bytes: {first}{}); known are: Linux bzImage, ELF vmlinux, ELF with \
         a PVH entry, Multiboot 1",
        looks_like(guess)
    )]
    UnknownFormat {
        /// The first bytes in hexadecimal.
        first: String,
        /// What it seems to be instead.
        guess: Option<&'static str>,
    },
    /// The file ends too early.
    #[error("the kernel is truncated: its {part} reach to byte {needs}, but there are only {has} bytes")]
    Truncated {
        /// What is cut off.
        part: &'static str,
        /// Where that part ends.
        needs: u64,
        /// Where the data ends.
        has: u64,
    },
    /// The boot protocol of a Linux image is too old.
    #[error(
        "the Linux image speaks boot protocol {}.{:02}, but {needs} is needed; use a kernel of version 2.6.26 or later",
        version >> 8, version & 0xff
    )]
    OldProtocol {
        /// The header's version field.
        version: u16,
        /// What is needed, and for what.
        needs: &'static str,
    },
    /// A 32-bit Linux kernel where a 64-bit one is wanted.
    #[error(
        "this is a 32-bit Linux kernel: it boots from its bzImage (vmlinuz), by the 32-bit protocol, only"
    )]
    ThirtyTwoBit,
    /// A kernel for another architecture.
    #[error("the kernel is for another architecture (ELF machine {0}); x86-64 is needed")]
    WrongArchitecture(u16),
    /// An ELF file breaks its own rules.
    #[error("the kernel's ELF structure is damaged: {0}")]
    BadElf(&'static str),
    /// The payload's format cannot be unpacked here.
    #[error(
        "the kernel is compressed with {0}, which is not unpacked on the host; let the guest unpack it (in-guest \
         decompression), or give a kernel compressed with gzip, xz, LZ4 or zstd"
    )]
    UnsupportedCompression(Compression),
    /// The payload starts with no known magic number.
    #[error("the kernel's payload is of no known compression (first bytes: {first})")]
    UnknownCompression {
        /// The first bytes in hexadecimal.
        first: String,
    },
    /// The payload does not unpack.
    #[error("the kernel's payload is damaged: {compression} says: {reason}")]
    CorruptPayload {
        /// Its format.
        compression: Compression,
        /// What the decoder complained about.
        reason: String,
    },
    /// The payload unpacks to more than the kernel says it needs.
    #[error(
        "the kernel's payload unpacks to more than {limit} bytes, the size in its header; the file is damaged"
    )]
    PayloadTooLarge {
        /// The bound in bytes.
        limit: u64,
    },
    /// The kernel needs memory that the machine has not got.
    #[error(
        "the kernel needs memory from {start:#x} to {end:#x}, which this machine does not have free; give it at least \
         {} MiB with --memory",
        mib(needed)
    )]
    KernelDoesNotFit {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// The least size of memory with which it would fit, in bytes.
        needed: u64,
    },
    /// Two things want the same memory.
    #[error("{what} at {start:#x} to {end:#x} collides with {other}")]
    Overlap {
        /// Who came second.
        what: &'static str,
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// Who was there first.
        other: &'static str,
    },
    /// The initrd or the modules find no room.
    #[error(
        "the initrd of {} MiB does not fit below {limit:#x} beside the kernel; {}give a smaller initrd",
        mib(size),
        more_memory(needed)
    )]
    InitrdDoesNotFit {
        /// Its size in bytes.
        size: u64,
        /// The highest end that the kernel accepts.
        limit: u64,
        /// The least size of memory with which it would fit, in bytes; `None` if no size would do.
        needed: Option<u64>,
    },
    /// No room for a small structure.
    #[error("there is no room for {what} ({size} bytes) in the machine's memory; give it more with --memory")]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes, but this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The kernel's limit in bytes.
        limit: usize,
    },
    /// The command line holds a NUL byte.
    #[error("the command line holds a NUL byte, which would end it early")]
    CommandLineNul,
    /// The kernel cannot be entered in the way asked for.
    #[error("the kernel cannot be entered as {wanted}: {why}")]
    WrongProtocol {
        /// The protocol asked for.
        wanted: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// KASLR was asked for and cannot be had.
    #[error("the kernel cannot be placed at random (--kaslr): {0}")]
    KaslrUnavailable(&'static str),
    /// A relocation points outside the kernel.
    #[error("the kernel's relocation {0:#x} points outside of it; the file is damaged")]
    BadRelocation(u64),
    /// A Multiboot kernel demands what this loader does not do.
    #[error("the Multiboot kernel demands features {0:#x}, which are not offered (4 is a video mode)")]
    MultibootFeatures(u32),
    /// The Multiboot header's addresses make no sense.
    #[error("the Multiboot header is damaged: {0}")]
    BadMultiboot(&'static str),
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs cannot be described to the guest; 1 to {max} can", max = crate::acpi::MAX_CPUS)]
    CpuCount(u32),
    /// A value of the platform description does not fit where it is written.
    #[error("the platform description is wrong: {0}")]
    BadPlatform(&'static str),
    /// The host gave no random numbers.
    #[error("the host's random source failed: {0}")]
    Random(getrandom::Error),
    /// Guest memory lacks what must be written to; the firmware's segment, for one.
    #[error("cannot write {what} into guest memory: {source}")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// The reason.
        source: MemoryError,
    },
}

impl BootError {
    /// For `map_err` on a write of `what`.
    pub(crate) fn memory(what: &'static str) -> impl Fn(MemoryError) -> BootError {
        move |source| BootError::Memory { what, source }
    }
}
