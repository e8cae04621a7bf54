//! Zeroes and discards: a chain of file operations, each submitted when the one before is done.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::{FileOp, Inner};
use crate::{Buffers, Done, Extent, HostBuffer, IoKind};

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Zeroes written at a time where the file system cannot make them itself.
const CHUNK: u64 = 256 << 10;

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Not for this range: block devices want whole blocks of theirs, which may be larger than the guest's.
fn unfit(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Gives back the space of ranges one after the other. A file system that cannot do so keeps them: a discard is
/// a hint.
pub(super) fn discard(inner: &Arc<Inner>, mut extents: std::vec::IntoIter<Extent>, done: Done) {
    let next = extents.by_ref().find(|extent| extent.len > 0);
    let Some(Extent { offset, len }) = next.filter(|_| inner.punch.load(Ordering::Relaxed)) else {
        return done(Ok(()));
    };
    let op = FileOp::Allocate { mode: PUNCH, len };
    let task = inner.task(offset, op, move |inner, result, _| match result {
        Err(e) if unsupported(&e) => {
            inner.punch.store(false, Ordering::Relaxed);
            done(Ok(()));
        }
        Err(e) if !unfit(&e) => done(Err(inner.faults.report(IoKind::Discard, offset, e))),
        _ => discard(inner, extents, done),
    });
    inner.engine.submit(task);
}

/// Makes a range read as zeroes by the cheapest means the file system has.
pub(super) fn write_zeroes(inner: &Arc<Inner>, extent: Extent, deallocate: bool, durable: bool, done: Done) {
    if extent.len == 0 {
        return done(Ok(()));
    }
    let means = if deallocate { [PUNCH, ZERO].as_slice() } else { [ZERO].as_slice() };
    let durable = durable && inner.options.flush;
    step(inner, Job { extent, means, durable, done });
}

struct Job {
    /// What is left.
    extent: Extent,
    /// `fallocate` modes to try before writing.
    means: &'static [i32],
    durable: bool,
    done: Done,
}

fn step(inner: &Arc<Inner>, mut job: Job) {
    let Extent { offset, len } = job.extent;
    let Some((mode, rest)) = job.means.split_first() else {
        return write(inner, job);
    };
    job.means = rest;
    let op = FileOp::Allocate { mode: *mode, len };
    let task = inner.task(offset, op, move |inner, result, _| match result {
        Err(e) if unsupported(&e) || unfit(&e) => step(inner, job),
        result => finish(inner, job, result),
    });
    inner.engine.submit(task);
}

fn finish(inner: &Arc<Inner>, job: Job, result: io::Result<()>) {
    match inner.report(IoKind::WriteZeroes, job.extent.offset, result) {
        Ok(()) if job.durable => inner.flush(job.done),
        result => (job.done)(result),
    }
}

fn write(inner: &Arc<Inner>, mut job: Job) {
    static ZEROES: OnceLock<Arc<HostBuffer>> = OnceLock::new();
    let zeroes = ZEROES.get_or_init(|| HostBuffer::new(CHUNK as usize));
    let Extent { offset, len } = job.extent;
    let n = len.min(CHUNK);
    let op = FileOp::Write { buffers: Buffers::host(zeroes, n as usize), durable: false };
    let task = inner.task(offset, op, move |inner, result, _| {
        job.extent = Extent { offset: offset + n, len: len - n };
        match result {
            Ok(()) if job.extent.len > 0 => write(inner, job),
            result => finish(inner, job, result),
        }
    });
    inner.engine.submit(task);
}
