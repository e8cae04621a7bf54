//! Kernel loaders and firmware tables.
//!
//! [`load()`] does what firmware and a boot loader do on a real PC: it puts a kernel, its initrd and command line
//! into guest memory, describes the machine to it (E820, ACPI, SMBIOS), and says in which state the first CPU
//! starts. Five kinds of kernel are known:
//!
//! | file | entered | description handed over |
//! |---|---|---|
//! | Linux bzImage | 64-bit, paged; payload unpacked here, or by the guest's own decompressor | zero page |
//! | 32-bit Linux bzImage | 32-bit, unpaged; by its own decompressor | zero page |
//! | ELF vmlinux | 64-bit, paged | zero page |
//! | ELF with a PVH note | 32-bit, unpaged | `hvm_start_info` |
//! | Multiboot 1 | 32-bit, unpaged | Multiboot information |
//!
//! Everything in a kernel file is hostile: every offset and size in it is checked, unpacking has a bound, and
//! the same bytes in guest memory are never claimed twice ([`Layout`]).

#![forbid(unsafe_code)]

pub mod acpi;
mod bytes;
mod e820;
mod elf;
mod entry;
mod error;
mod file;
mod layout;
mod linux;
mod load;
mod multiboot;
mod plan;
mod platform;
mod pvh;
mod random;
pub mod smbios;
mod spec;
mod stream;
mod unpack;

#[cfg(test)]
mod tests;

pub use e820::{E820Entry, E820Kind};
pub use error::BootError;
pub use file::{read_initrd, read_kernel};
pub use layout::{Claim, Layout};
pub use load::load;
pub use plan::{BootPlan, KaslrOutcome, KernelFormat};
pub use platform::{MemoryWindow, PlatformDescription, SerialPort, Watchdog, pci_interrupt};
pub use spec::{BootSpec, Initrd, Kaslr, Protocol};
pub use unpack::Compression;
