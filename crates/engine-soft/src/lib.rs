//! The software engine: runs x86 guests with no help from the host's virtualization.
//!
//! * [`mmu`]: page walks and the soft TLB.
//! * [`code`]: which guest pages hold decoded code, and who must be told when they change.
//! * [`vector`]: x87, MMX, SSE and AVX instructions, run on the host CPU.
//! * [`interp`]: the reference interpreter.
//! * [`jit`]: the translator of 64-bit code.
//! * [`lockstep`]: both side by side, compared.
//!
//! Flag-producing integer instructions execute as the same instruction on the host ([`hostop`]): the host CPU
//! is the definition of what they compute, flags that the manual leaves undefined included.

pub mod code;
mod codemem;
pub mod engine;
mod hash;
pub mod hostop;
pub mod interp;
pub mod jit;
mod landing;
pub mod lockstep;
pub mod mmu;
pub mod status;
pub mod vector;

pub use interp::features::host_cpuid;
