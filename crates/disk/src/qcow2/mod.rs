//! A qcow2 image: a disk in clusters, each somewhere in the file, in an image below, or nowhere.
//!
//! The library `imago` knows where clusters are, allocates and frees them, and unpacks compressed ones. Data
//! does not pass through it: it says where in which file a piece is, and that piece goes straight between the file
//! and the guest's memory, as with a raw image. So each request is a job that blocks, on a thread of the disk's own; a short
//! read is first tried on the caller's thread, as long as nothing has to be waited for.
//!
//! - [`header`] judges an image before the library looks at it;
//! - [`chain`] opens what it stands on, from where the user allows it;
//! - [`storage`] is a file as the library reaches it, [`order`] the order in which its tables become durable.

mod chain;
mod create;
mod header;
mod order;
mod storage;
#[cfg(test)]
mod tests;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::{FormatAccess, Mapping};

pub use chain::BackingError;
pub use create::{CreateError, NewImage, create};
pub use header::Qcow2Error;
pub(crate) use header::looks_like_qcow2;

use crate::engine::{Engine, Job, Running};
use crate::error::Faults;
use crate::raw::{CACHED_READ, check};
use crate::{
    BlockDevice, Buffers, CacheMode, DiskInfo, DiskSpec, Done, Extent, HostBuffer, ImageError, IoError,
    IoKind, Operation, Request, SECTOR,
};
use chain::{Chain, Wanted};
use storage::{Health, Storage, without_waiting};

/// Bytes of zeroes, or of compressed data, at a time.
const CHUNK: u64 = 256 << 10;

/// The disk in a qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2Disk {
    inner: Arc<Inner>,
    jobs: Arc<dyn Engine<Job>>,
    /// Dropped with the last disk that uses the jobs; `inner` can live a little longer, in one.
    _running: Arc<Running>,
}

#[derive(Debug)]
struct Inner {
    image: FormatAccess<Storage>,
    health: Arc<Health>,
    info: DiskInfo,
    /// Whether a flush reaches stable storage; if not, nothing does.
    safe: bool,
    /// Whether reads may be tried on the caller's thread.
    cached_reads: bool,
    faults: Faults,
    /// Held for writing by what takes clusters away from under those who know where they are.
    clusters: RwLock<()>,
    /// The library has failed in a way of which nothing is known; what it holds in memory cannot be relied on.
    broken: AtomicBool,
}

impl Qcow2Disk {
    /// Opens and locks an image and all that it stands on.
    ///
    /// # Errors
    /// [`ImageError`]
    pub(crate) fn open(
        spec: &DiskSpec,
        write: bool,
        cached_reads: bool,
        (jobs, running): &(Arc<dyn Engine<Job>>, Arc<Running>),
        faults: Faults,
    ) -> Result<Self, ImageError> {
        let direct = spec.cache == CacheMode::None;
        let safe = spec.cache != CacheMode::Unsafe;
        let backing = spec.backing.as_deref();
        let Chain { image, health, block } =
            chain::open(&Wanted { path: &spec.path, backing, write, direct, safe })?;
        // What does not fill a sector nobody can write to.
        let size = image.size() & !(SECTOR - 1);
        let info = DiskInfo { size, block, read_only: !write, discard: write };
        let inner = Inner {
            image,
            health,
            info,
            safe,
            cached_reads: cached_reads && !direct,
            faults,
            clusters: RwLock::new(()),
            broken: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner), jobs: Arc::clone(jobs), _running: Arc::clone(running) })
    }
}

impl BlockDevice for Qcow2Disk {
    fn info(&self) -> DiskInfo {
        self.inner.info
    }

    fn submit(&self, Request { operation, done }: Request) {
        if let Err(error) = self.inner.check(&operation) {
            return done(Err(error));
        }
        if let Operation::Read { offset, buffers } = &operation
            && self.inner.read_cached(*offset, buffers)
        {
            return done(Ok(()));
        }
        let inner = Arc::clone(&self.inner);
        self.jobs.submit(Job(Box::new(move || inner.perform(operation, done))));
    }

    fn kick(&self) {
        self.jobs.kick();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The library would do so itself, and tell nobody of failures.
        if !self.info.read_only && !self.broken.load(Ordering::Acquire) {
            let result = catch_unwind(AssertUnwindSafe(|| self.image.flush()));
            // Only for the user: there is nobody else any more.
            let _ = self.report(IoKind::Flush, 0, result.unwrap_or(Ok(())));
        }
    }
}

impl Inner {
    fn check(&self, operation: &Operation) -> Result<(), IoError> {
        check(self.info, operation)?;
        let writes =
            matches!(operation, Operation::Write { .. } | Operation::WriteZeroes { .. } | Operation::Flush);
        match writes && !self.info.read_only && self.health.is_lost() {
            true => Err(IoError::Host(IoKind::Flush)),
            false => Ok(()),
        }
    }

    fn report(&self, kind: IoKind, offset: u64, result: io::Result<()>) -> Result<(), IoError> {
        result.map_err(|error| self.faults.report(kind, offset, error))
    }

    /// Carries a request out.
    fn perform(&self, operation: Operation, done: Done) {
        let (kind, offset) = match &operation {
            Operation::Read { offset, .. } => (IoKind::Read, *offset),
            Operation::Write { offset, .. } => (IoKind::Write, *offset),
            Operation::WriteZeroes { extent, .. } => (IoKind::WriteZeroes, extent.offset),
            Operation::Discard(extents) => (IoKind::Discard, extents.first().map_or(0, |e| e.offset)),
            Operation::Flush => (IoKind::Flush, 0),
        };
        let result = match self.broken.load(Ordering::Acquire) {
            true => Err(io::Error::other("an earlier request found the image damaged")),
            // A damaged image could lead the library to where nobody has been. Then this disk is done for, but
            // not the thread, whose callers wait.
            false => catch_unwind(AssertUnwindSafe(|| self.carry_out(&operation))).unwrap_or_else(|_| {
                self.broken.store(true, Ordering::Release);
                Err(io::Error::new(io::ErrorKind::InvalidData, "the image is damaged"))
            }),
        };
        if let Operation::Read { buffers, .. } = &operation {
            // Also after a failure: some of it may have been written.
            buffers.written();
        }
        drop(operation);
        done(self.report(kind, offset, result));
    }

    fn carry_out(&self, operation: &Operation) -> io::Result<()> {
        let shared = || self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        let alone = || self.clusters.write().unwrap_or_else(PoisonError::into_inner);
        match operation {
            Operation::Read { offset, buffers } => {
                let _shared = shared();
                self.read(*offset, buffers)
            }
            Operation::Write { offset, buffers, durable } => {
                let shared = shared();
                self.write(*offset, buffers)?;
                drop(shared);
                if *durable { self.flush() } else { Ok(()) }
            }
            Operation::WriteZeroes { extent, deallocate, durable } => {
                // The library looks at a cluster first and marks it then; nobody may write between.
                let alone = alone();
                self.write_zeroes(*extent, *deallocate)?;
                drop(alone);
                if *durable { self.flush() } else { Ok(()) }
            }
            Operation::Discard(extents) => {
                let _alone = alone();
                extents.iter().try_for_each(|extent| self.discard(*extent))
            }
            Operation::Flush => self.flush(),
        }
    }

    /// Tries a read on the caller's thread, which must not wait for the host's device nor long for others.
    fn read_cached(&self, offset: u64, buffers: &Buffers) -> bool {
        let long = buffers.len() > CACHED_READ || self.health.is_syncing();
        if !self.cached_reads || long || self.broken.load(Ordering::Acquire) {
            return false;
        }
        let Ok(_shared) = self.clusters.try_read() else { return false };
        let read = || without_waiting(|| self.read(offset, buffers));
        // What fails here fails again on a thread of ours, which tells the user.
        let done = matches!(catch_unwind(AssertUnwindSafe(read)), Ok(Ok(())));
        if done {
            buffers.written();
        }
        done
    }

    fn read(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let mut done = 0;
        while done < buffers.len() {
            let (mapping, len) = self.image.get_mapping(offset + done, buffers.len() - done)?;
            let len = match mapping {
                Mapping::Raw { storage, offset, .. } => {
                    read_data(storage, offset, &buffers.slice(done, len))?;
                    len
                }
                Mapping::Special { .. } => {
                    let len = len.min(CHUNK);
                    let mut bytes = vec![0; len as usize];
                    self.image.read(&mut bytes, offset + done)?;
                    buffers.copy_from(done, &bytes);
                    len
                }
                // Nothing there, or behind the end.
                _ => {
                    let len = if len == 0 { buffers.len() - done } else { len };
                    buffers.zero(done, len);
                    len
                }
            };
            done += len;
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let mut done = 0;
        while done < buffers.len() {
            let place = self.image.prepare_data_mapping(offset + done, buffers.len() - done, true)?;
            let len = place.length();
            // Nobody sees the new clusters before they hold the data.
            write_data(place.storage(), place.offset(), &buffers.slice(done, len))?;
            self.image.commit_data_mapping(place)?;
            done += len;
        }
        Ok(())
    }

    /// Makes a range read as zeroes. Nobody else may be at it.
    fn write_zeroes(&self, Extent { offset, len }: Extent, deallocate: bool) -> io::Result<()> {
        let result = match deallocate {
            true => {
                self.punch(offset, len)?;
                // SAFETY: the caller holds `clusters` for writing, so nobody knows of a place in the file.
                unsafe { self.image.discard_to_zero_unsafe(offset, len) }
            }
            false => self.image.write_zeroes(offset, len),
        };
        match result {
            // Version 2 cannot mark clusters as zeroes.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => (),
            result => return result,
        }
        let zeroes = HostBuffer::new(CHUNK as usize);
        let mut done = 0;
        while done < len {
            let part = Buffers::host(&zeroes, (len - done).min(CHUNK) as usize);
            self.write(offset + done, &part)?;
            done += part.len();
        }
        Ok(())
    }

    /// Gives a range back to the image, and its room to the host. Nobody else may be at it.
    fn discard(&self, Extent { offset, len }: Extent) -> io::Result<()> {
        self.punch(offset, len)?;
        // SAFETY: the caller holds `clusters` for writing, so nobody knows of a place in the file.
        match unsafe { self.image.discard_to_any_unsafe(offset, len) } {
            // A discard is a hint.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Gives the room of the clusters that are wholly in a range back to the host. They read as zeroes then, as they
    /// will for good in a moment.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let Some(cluster) = self.image.inner().zero_granularity() else { return Ok(()) };
        let mut at = offset.next_multiple_of(cluster);
        let end = (offset + len) & !(cluster - 1);
        while at < end {
            let (mapping, len) = self.image.get_mapping(at, end - at)?;
            if let Mapping::Raw { storage, offset, writable: true, .. } = mapping {
                storage.punch(offset, len)?;
            }
            at += len.max(1);
        }
        Ok(())
    }

    /// Writes what the library holds, and has it and all data on stable storage.
    fn flush(&self) -> io::Result<()> {
        if self.info.read_only {
            return Ok(());
        }
        self.image.flush()?;
        if self.safe { self.image.sync() } else { Ok(()) }
    }
}

/// Reads from a file, by a copy where direct I/O wants the buffers otherwise.
fn read_data(file: &Storage, offset: u64, buffers: &Buffers) -> io::Result<()> {
    if file.takes(buffers) {
        return file.read_data(offset, buffers);
    }
    let copy = HostBuffer::new(buffers.len() as usize);
    file.read_data(offset, &Buffers::host(&copy, buffers.len() as usize))?;
    let mut bytes = vec![0; buffers.len() as usize];
    copy.read(0, &mut bytes);
    buffers.copy_from(0, &bytes);
    Ok(())
}

/// Writes to a file, likewise.
fn write_data(file: &Storage, offset: u64, buffers: &Buffers) -> io::Result<()> {
    if file.takes(buffers) {
        return file.write_data(offset, buffers);
    }
    let mut bytes = vec![0; buffers.len() as usize];
    buffers.copy_to(0, &mut bytes);
    let copy = HostBuffer::new(bytes.len());
    copy.write(0, &bytes);
    file.write_data(offset, &Buffers::host(&copy, bytes.len()))
}
