//! Disk images and the block back ends behind them.
//!
//! A [`BlockDevice`] takes [`Request`]s and answers each through its callback, from whatever thread finished it;
//! nothing here knows guests, queues or buses. [`open()`] makes one from a [`DiskOptions`], which [`DiskSpec`] parses
//! from the command line. Several things sit on top of each other:
//!
//! - an image file, opened, locked and measured once ([`ImageError`] says what is wrong with it);
//! - an I/O engine that carries requests out: worker threads, io_uring, or the caller itself;
//! - the format: the raw disk, which turns requests into file operations, or [`qcow2`], which first looks where in which
//!   file a piece is;
//! - for `ephemeral` a layer that keeps what the guest writes in an unlinked file of its own;
//! - for `bps` and `iops` a gate that holds requests back.
//!
//! Data goes straight between the file and guest memory: [`Buffers`] are checked when they are made and keep the
//! memory alive until the request is done. They report what was written to guest memory before the callback runs.

mod bounce;
mod buffer;
mod engine;
mod error;
mod extents;
mod file;
mod limited;
mod open;
mod overlay;
mod qcow2;
mod raw;
mod request;
mod spec;
mod sys;
#[cfg(test)]
mod testing;

pub use buffer::{Access, BufferError, Buffers, HostBuffer};
pub use error::{Fault, FaultObserver, ImageError, IoError, IoKind};
pub use open::{DiskOptions, ThreadHook, Warner, open};
pub use qcow2::{BackingError, CreateError, NewImage, Qcow2Error, create};
pub use request::{BlockDevice, DiskInfo, Done, Extent, Operation, Request, run};
pub use spec::{CacheMode, DiskBus, DiskFormat, DiskSpec, IoEngine, SpecError};

/// The unit in which sizes and offsets are counted at least: every disk is a whole number of these.
pub const SECTOR: u64 = 512;
