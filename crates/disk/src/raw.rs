//! A raw image: requests become file operations.

mod zero;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bounce::Bounces;
use crate::engine::{Engine, FileOp, Running, Task};
use crate::error::Faults;
use crate::file::{Alignment, ImageFile};
use crate::{
    BlockDevice, Buffers, CacheMode, DiskInfo, Done, Extent, IoError, IoKind, Operation, Request, SECTOR,
};

/// Reads up to this size are tried in the page cache on the caller's thread first: copying takes less time than
/// waking another thread. Longer ones would keep a vCPU from running for too long.
pub(crate) const CACHED_READ: u64 = 256 << 10;

/// How a raw disk behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawOptions {
    pub(crate) read_only: bool,
    /// Whether a flush reaches stable storage; if not, nothing does.
    pub(crate) flush: bool,
    /// Whether reads may be tried on the caller's thread.
    pub(crate) cached_reads: bool,
}

impl RawOptions {
    pub(crate) fn new(read_only: bool, cache: CacheMode, cached_reads: bool) -> Self {
        Self { read_only, flush: cache != CacheMode::Unsafe, cached_reads }
    }
}

/// The disk in an image file.
#[derive(Debug)]
pub(crate) struct RawDisk {
    inner: Arc<Inner>,
    /// Dropped with the last disk that uses the engine; `inner` can live a little longer, in a callback.
    _running: Arc<Running>,
}

#[derive(Debug)]
struct Inner {
    image: ImageFile,
    options: RawOptions,
    engine: Arc<dyn Engine>,
    faults: Faults,
    bounces: Bounces,
    /// A flush or a durable write has failed. The kernel has dropped the dirty pages then, so a later flush that succeeds proves
    /// nothing: everything that relies on written data fails from now on.
    lost: AtomicBool,
    /// Cleared when the file system turns out not to have it.
    punch: AtomicBool,
}

impl RawDisk {
    pub(crate) fn new(
        image: ImageFile,
        options: RawOptions,
        engine: &Arc<dyn Engine>,
        running: &Arc<Running>,
        faults: Faults,
    ) -> Self {
        let inner = Arc::new(Inner {
            image,
            options,
            engine: Arc::clone(engine),
            faults,
            bounces: Bounces::default(),
            lost: AtomicBool::new(false),
            punch: AtomicBool::new(true),
        });
        Self { inner, _running: Arc::clone(running) }
    }
}

impl BlockDevice for RawDisk {
    fn info(&self) -> DiskInfo {
        self.inner.info()
    }

    fn submit(&self, Request { operation, done }: Request) {
        let inner = &self.inner;
        if let Err(error) = inner.check(&operation) {
            return done(Err(error));
        }
        match operation {
            Operation::Read { offset, buffers } => inner.read(offset, buffers, done),
            Operation::Write { offset, buffers, durable } => inner.write(offset, buffers, durable, done),
            Operation::Flush => inner.flush(done),
            Operation::WriteZeroes { extent, deallocate, durable } => {
                zero::write_zeroes(inner, extent, deallocate, durable, done);
            }
            Operation::Discard(extents) => zero::discard(inner, extents.into_iter(), done),
        }
    }

    fn kick(&self) {
        self.inner.engine.kick();
    }
}

/// Whether an extent is on a disk and made of whole blocks.
pub(crate) fn check_extent(info: DiskInfo, Extent { offset, len }: Extent) -> Result<(), IoError> {
    if (offset | len) & u64::from(info.block - 1) != 0 {
        Err(IoError::Misaligned)
    } else if offset.checked_add(len).is_none_or(|end| end > info.size) {
        Err(IoError::OutOfRange)
    } else {
        Ok(())
    }
}

/// Whether a disk can carry an operation out.
pub(crate) fn check(info: DiskInfo, operation: &Operation) -> Result<(), IoError> {
    let (extent, writes) = match operation {
        Operation::Flush => return Ok(()),
        Operation::Discard(extents) => {
            extents.iter().try_for_each(|extent| check_extent(info, *extent))?;
            return if info.read_only { Err(IoError::ReadOnly) } else { Ok(()) };
        }
        Operation::Read { offset, buffers } => (Extent { offset: *offset, len: buffers.len() }, false),
        Operation::Write { offset, buffers, .. } => (Extent { offset: *offset, len: buffers.len() }, true),
        Operation::WriteZeroes { extent, .. } => (*extent, true),
    };
    check_extent(info, extent)?;
    if writes && info.read_only { Err(IoError::ReadOnly) } else { Ok(()) }
}

impl Inner {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size: self.image.disk_size(),
            block: self.image.direct.map_or(SECTOR as u32, |d| d.block),
            read_only: self.options.read_only,
            discard: !self.options.read_only && self.punch.load(Ordering::Relaxed),
        }
    }

    fn check(&self, operation: &Operation) -> Result<(), IoError> {
        check(self.info(), operation)?;
        match operation {
            Operation::Write { .. } | Operation::WriteZeroes { .. } if self.lost.load(Ordering::Acquire) => {
                Err(IoError::Host(IoKind::Flush))
            }
            _ => Ok(()),
        }
    }

    fn report(&self, kind: IoKind, offset: u64, result: io::Result<()>) -> Result<(), IoError> {
        result.map_err(|error| self.faults.report(kind, offset, error))
    }

    fn task(
        self: &Arc<Self>,
        offset: u64,
        op: FileOp,
        done: impl FnOnce(&Arc<Self>, io::Result<()>, FileOp) + Send + 'static,
    ) -> Task {
        let inner = Arc::clone(self);
        Task::new(&self.image.file, offset, op, Box::new(move |result, op| done(&inner, result, op)))
    }

    /// What direct I/O lacks for these buffers.
    fn misaligned(&self, buffers: &Buffers) -> bool {
        let fits = |d: Alignment| buffers.is_aligned(d.memory as usize, d.block as usize);
        !self.image.direct.is_none_or(fits)
    }

    fn read(self: &Arc<Self>, offset: u64, buffers: Buffers, done: Done) {
        let end = self.image.len;
        if self.misaligned(&buffers) {
            let inner = Arc::clone(self);
            return self.bounces.ask(buffers.len(), move |lease| {
                let copy = Buffers::host(&lease.buffer, buffers.len() as usize);
                let op = FileOp::Read { buffers: copy, end };
                let task = inner.task(offset, op, move |inner, result, _| {
                    let result = inner.report(IoKind::Read, offset, result);
                    if result.is_ok() {
                        copy_back(&lease.buffer, &buffers);
                    }
                    drop(lease);
                    done(result);
                });
                inner.engine.submit(task);
            });
        }
        let short = buffers.len() <= CACHED_READ;
        let task = self.task(offset, FileOp::Read { buffers, end }, move |inner, result, op| {
            let result = inner.report(IoKind::Read, offset, result);
            if let FileOp::Read { buffers, .. } = &op {
                // Also after a failure: some of it may have been written.
                buffers.written();
            }
            done(result);
        });
        let task = match self.options.cached_reads && short && self.image.direct.is_none() {
            true => task.read_cached(),
            false => Some(task),
        };
        if let Some(task) = task {
            self.engine.submit(task);
        }
    }

    fn write(self: &Arc<Self>, offset: u64, buffers: Buffers, durable: bool, done: Done) {
        let durable = durable && self.options.flush;
        if self.misaligned(&buffers) {
            let inner = Arc::clone(self);
            return self.bounces.ask(buffers.len(), move |lease| {
                let mut bytes = vec![0; buffers.len() as usize];
                buffers.copy_to(0, &mut bytes);
                lease.buffer.write(0, &bytes);
                let copy = Buffers::host(&lease.buffer, bytes.len());
                let task = inner.write_task(offset, copy, durable, move |result| {
                    drop(lease);
                    done(result);
                });
                inner.engine.submit(task);
            });
        }
        let task = self.write_task(offset, buffers, durable, done);
        self.engine.submit(task);
    }

    fn write_task(
        self: &Arc<Self>,
        offset: u64,
        buffers: Buffers,
        durable: bool,
        done: impl FnOnce(Result<(), IoError>) + Send + 'static,
    ) -> Task {
        self.task(offset, FileOp::Write { buffers, durable }, move |inner, result, op| match (result, op) {
            (Err(error), FileOp::Write { buffers, durable: true }) => {
                inner.find_out(offset, buffers, error, done);
            }
            (result, _) => done(inner.report(IoKind::Write, offset, result)),
        })
    }

    /// A durable write has failed: was it the writing, or making it durable? The latter takes the file's
    /// write-back error with it, which the next flush would not see any more though other writes are lost, too.
    /// Writing again without the second half tells.
    fn find_out(
        self: &Arc<Self>,
        offset: u64,
        buffers: Buffers,
        error: io::Error,
        done: impl FnOnce(Result<(), IoError>) + Send + 'static,
    ) {
        let op = FileOp::Write { buffers, durable: false };
        let again = self.task(offset, op, move |inner, result, _| {
            if result.is_ok() {
                inner.lost.store(true, Ordering::Release);
                return done(inner.report(IoKind::Flush, 0, Err(error)));
            }
            done(inner.report(IoKind::Write, offset, result));
        });
        self.engine.submit(again);
    }

    fn flush(self: &Arc<Self>, done: Done) {
        if !self.options.flush || self.options.read_only {
            return done(Ok(()));
        }
        if self.lost.load(Ordering::Acquire) {
            return done(Err(IoError::Host(IoKind::Flush)));
        }
        let task = self.task(0, FileOp::Sync, move |inner, result, _| {
            if result.is_err() {
                inner.lost.store(true, Ordering::Release);
            }
            done(inner.report(IoKind::Flush, 0, result));
        });
        self.engine.submit(task);
    }
}

/// Copies what was read to where it was wanted.
fn copy_back(from: &crate::HostBuffer, buffers: &Buffers) {
    let mut bytes = vec![0; buffers.len() as usize];
    from.read(0, &mut bytes);
    buffers.copy_from(0, &bytes);
    buffers.written();
}
