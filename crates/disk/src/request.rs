//! Requests, and who answers them.

use std::fmt;
use std::sync::{Arc, mpsc};

use crate::{Buffers, IoError};

/// A range of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What is to be done.
#[derive(Debug)]
pub enum Operation {
    /// Reads `buffers.len()` bytes from `offset`.
    Read {
        /// Where in the disk.
        offset: u64,
        /// Where to; made with [`Access::Fill`](crate::Access::Fill).
        buffers: Buffers,
    },
    /// Writes `buffers.len()` bytes to `offset`.
    Write {
        /// Where in the disk.
        offset: u64,
        /// Where from.
        buffers: Buffers,
        /// Whether the data must be on stable storage before the request is done (FUA).
        durable: bool,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// Which.
        extent: Extent,
        /// Whether its space may be given back to the host.
        deallocate: bool,
        /// Whether it must be on stable storage before the request is done.
        durable: bool,
    },
    /// Says that ranges hold nothing of value; done one after the other. What they read afterwards is either
    /// what they held or zeroes.
    Discard(Vec<Extent>),
    /// Makes every write that was done before this request was submitted durable.
    Flush,
}

/// Takes the result of a request.
pub type Done = Box<dyn FnOnce(Result<(), IoError>) + Send>;

/// An operation and who is to be told of its end.
pub struct Request {
    /// What is to be done.
    pub operation: Operation,
    /// Called exactly once, on any thread: on the caller's before `submit` or `kick` returns, or on an I/O
    /// thread. Requests that it submits need no kick.
    pub done: Done,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.operation.fmt(f)
    }
}

/// What is fixed about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Bytes in all; a multiple of [`SECTOR`](crate::SECTOR), not always of `block`.
    pub size: u64,
    /// Offsets and lengths must be multiples of this many bytes, a power of two from 512 on.
    pub block: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether space can be given back, as far as is known before it was tried.
    pub discard: bool,
}

/// A disk that carries out requests while its caller goes on. Requests may be done in any order.
pub trait BlockDevice: fmt::Debug + Send + Sync {
    /// What is fixed about it.
    fn info(&self) -> DiskInfo;
    /// Takes a request. It may be kept until the next [`BlockDevice::kick`].
    fn submit(&self, request: Request);
    /// Starts what was submitted.
    fn kick(&self);
    /// Ends requests that have not begun, with [`IoError::Abandoned`], on the caller's thread: nobody wants them done any
    /// more. A disk that holds none back has nothing to do.
    fn abandon(&self) {}
}

/// Submits one operation and waits for it. Not for a thread on which the disk's callbacks run.
///
/// # Errors
/// That of the request.
pub fn run(disk: &Arc<dyn BlockDevice>, operation: Operation) -> Result<(), IoError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let done = Box::new(move |result| {
        // The receiver waits below for as long as the sender exists.
        let _ = sender.send(result);
    });
    disk.submit(Request { operation, done });
    disk.kick();
    receiver.recv().unwrap_or(Err(IoError::Host(crate::IoKind::Flush)))
}
