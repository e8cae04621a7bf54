//! A layer over a disk that holds what is written and vanishes with the machine.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::extents::{Run, SectorSet};
use crate::raw::{RawDisk, check};
use crate::{BlockDevice, DiskInfo, Done, Extent, ImageError, IoError, Operation, Request};

#[cfg(test)]
mod tests;

/// Pieces of one discard at most; it is only a hint, and a guest can scatter its writes.
const DISCARD_PIECES: usize = 256;

/// A disk whose writes go to a layer of its own. The layer is as large as the base, so that a sector lies at the
/// same place in both, and sparse.
#[derive(Debug)]
pub(crate) struct Overlay {
    base: Arc<dyn BlockDevice>,
    layer: RawDisk,
    /// The sectors the layer holds.
    held: Arc<RwLock<SectorSet>>,
}

impl Overlay {
    pub(crate) fn new(base: Arc<dyn BlockDevice>, layer: RawDisk) -> Self {
        Self { base, layer, held: Arc::default() }
    }

    /// Has the layer do something, after which it holds `extent`.
    fn change(&self, operation: Operation, extent: Extent, done: Done) {
        let held = Arc::clone(&self.held);
        let done = Box::new(move |result: Result<(), IoError>| {
            if result.is_ok() {
                held.write().unwrap_or_else(PoisonError::into_inner).insert(extent.offset, extent.len);
            }
            done(result);
        });
        self.layer.submit(Request { operation, done });
    }

    fn runs(&self, extent: Extent, most: usize) -> Vec<Run> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.runs(extent.offset, extent.len).take(most).collect()
    }

    fn read(&self, offset: u64, buffers: crate::Buffers, done: Done) {
        let runs = self.runs(Extent { offset, len: buffers.len() }, usize::MAX);
        let disk = |run: &Run| -> &dyn BlockDevice { if run.inside { &self.layer } else { &*self.base } };
        if let [run] = runs.as_slice() {
            return disk(run).submit(Request { operation: Operation::Read { offset, buffers }, done });
        }
        let join = Join::new(runs.len(), done);
        for run in runs {
            let part = buffers.slice(run.offset - offset, run.len);
            let operation = Operation::Read { offset: run.offset, buffers: part };
            disk(&run).submit(Request { operation, done: join.part() });
        }
    }

    fn discard(&self, extents: &[Extent], done: Done) {
        let mut pieces = Vec::new();
        for extent in extents {
            let runs = self.runs(*extent, DISCARD_PIECES - pieces.len().min(DISCARD_PIECES));
            pieces.extend(runs.iter().filter(|r| r.inside).map(|r| Extent { offset: r.offset, len: r.len }));
        }
        self.layer.submit(Request { operation: Operation::Discard(pieces), done });
    }
}

impl BlockDevice for Overlay {
    fn info(&self) -> DiskInfo {
        DiskInfo { read_only: false, discard: true, ..self.base.info() }
    }

    fn submit(&self, Request { operation, done }: Request) {
        if let Err(error) = check(self.info(), &operation) {
            return done(Err(error));
        }
        match operation {
            Operation::Read { offset, buffers } => self.read(offset, buffers, done),
            Operation::Write { offset, buffers, .. } => {
                let extent = Extent { offset, len: buffers.len() };
                self.change(Operation::Write { offset, buffers, durable: false }, extent, done);
            }
            Operation::WriteZeroes { extent, .. } => {
                let operation = Operation::WriteZeroes { extent, deallocate: true, durable: false };
                self.change(operation, extent, done);
            }
            Operation::Discard(extents) => self.discard(&extents, done),
            // Nothing outlives the machine.
            Operation::Flush => done(Ok(())),
        }
    }

    fn kick(&self) {
        self.base.kick();
        self.layer.kick();
    }
}

/// Waits for the parts of a request; the first error wins.
struct Join {
    left: AtomicUsize,
    end: Mutex<(Result<(), IoError>, Option<Done>)>,
}

impl Join {
    fn new(parts: usize, done: Done) -> Arc<Self> {
        if parts == 0 {
            done(Ok(()));
            return Arc::new(Self { left: AtomicUsize::new(0), end: Mutex::new((Ok(()), None)) });
        }
        Arc::new(Self { left: AtomicUsize::new(parts), end: Mutex::new((Ok(()), Some(done))) })
    }

    fn part(self: &Arc<Self>) -> Done {
        let join = Arc::clone(self);
        Box::new(move |result| {
            let mut end = join.end.lock().unwrap_or_else(PoisonError::into_inner);
            end.0 = end.0.and(result);
            if join.left.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(done) = end.1.take()
            {
                let result = end.0;
                drop(end);
                done(result);
            }
        })
    }
}

/// Where a layer's file can be: the folder the user names, else where large temporary files belong.
pub(crate) fn folders() -> Vec<PathBuf> {
    match std::env::var_os("TMPDIR") {
        Some(folder) if !folder.is_empty() => vec![folder.into()],
        _ => vec!["/var/tmp".into(), "/tmp".into()],
    }
}

/// An unlinked sparse file of `size` bytes in the first of `folders` that takes one, and which that is.
pub(crate) fn unlinked_file(folders: &[PathBuf], size: u64) -> Result<(File, PathBuf), ImageError> {
    let mut last = None;
    for folder in folders {
        let made = make_unlinked(folder).and_then(|file| file.set_len(size).map(|()| file));
        match made {
            Ok(file) => return Ok((file, folder.clone())),
            Err(source) => last = Some(ImageError::Overlay { folder: folder.clone(), source }),
        }
    }
    let none = || ImageError::Overlay { folder: PathBuf::new(), source: io::ErrorKind::NotFound.into() };
    Err(last.unwrap_or_else(none))
}

fn make_unlinked(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // O_EXCL: it can never get a name.
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder) {
        // Some file systems can only make files with names.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            static COUNT: AtomicUsize = AtomicUsize::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".ringfence-{}-{count}", std::process::id()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        result => result,
    }
}
