//! The vocabulary of the x86-64 architecture.
//!
//! Registers, flags, descriptors, paging formats, exceptions and model-specific register numbers, as plain
//! data: no I/O, no `unsafe`, no state. "SDM" cites the Intel 64 and IA-32 Architectures Software Developer's
//! Manual, "APM" the AMD64 Architecture Programmer's Manual.

#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
pub mod exception;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod register;
pub mod segment;

pub use control::{Cr0, Cr4, Efer, Xcr0};
pub use exception::{Exception, Vector};
pub use flags::Rflags;
pub use register::{Gpr, SegmentRegister};
pub use segment::{DescriptorTable, Segment, Selector};
