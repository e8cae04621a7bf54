//! Guest physical memory.
//!
//! [`GuestMemory`] is a set of regions, each backed by one host mapping whose address never changes while the
//! machine lives. Everything outside the regions is a hole: the bus answers there. Guest memory is never a
//! Rust slice, because vCPUs, device threads and the guest's own code change it at any time; every access goes
//! through [`host`], whose loads and stores the compiler can neither split, repeat nor assume anything about.
//!
//! A page that holds translated or decoded guest code is marked; writing to it through [`GuestMemory`] tells
//! the registered [`CodeObserver`], which drops what was made from the old bytes. vCPUs have their own fast
//! path, which never maps marked pages as writable.
//!
//! [`SharedMemory`] is memory that another process changes at any time, with access of the same kind.

mod address;
mod error;
mod guest;
pub mod host;
mod mapping;
mod shared;

pub use address::{GuestAddress, GuestRange};
pub use error::MemoryError;
pub use guest::{CodeObserver, GuestMemory, HostPage, RegionKind, RegionSpec, WriteObserver};
pub use host::Scalar;
pub use shared::{SharedError, SharedMemory};
