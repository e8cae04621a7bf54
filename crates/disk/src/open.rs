//! From a description to a disk.

use std::fmt;
use std::sync::Arc;

use crate::engine::{Started, start_inline, start_pool, start_uring};
use crate::error::Faults;
use crate::file::ImageFile;
use crate::overlay::{Overlay, folders, unlinked_file};
use crate::raw::{RawDisk, RawOptions};
use crate::{BlockDevice, CacheMode, DiskSpec, FaultObserver, ImageError, IoEngine};

/// Called by each I/O thread before it does anything, so that the machine can fence it.
pub type ThreadHook = Arc<dyn Fn() + Send + Sync>;

/// What a disk is made from.
#[derive(Clone)]
pub struct DiskOptions {
    /// What the user asked for.
    pub spec: DiskSpec,
    /// Told of failures of the host.
    pub faults: Option<FaultObserver>,
    /// Called by each I/O thread first.
    pub thread_hook: Option<ThreadHook>,
}

impl fmt::Debug for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskOptions({})", self.spec)
    }
}

impl DiskOptions {
    /// A disk that tells nobody of faults.
    pub fn new(spec: DiskSpec) -> Self {
        Self { spec, faults: None, thread_hook: None }
    }
}

/// Opens and locks the image, starts the I/O threads and returns the disk. Both end when it is dropped and its
/// last request is done.
///
/// # Errors
/// [`ImageError`]
pub fn open(options: &DiskOptions) -> Result<Arc<dyn BlockDevice>, ImageError> {
    let spec = &options.spec;
    let direct = spec.cache == CacheMode::None;
    let write = !spec.read_only && !spec.ephemeral;
    let image = ImageFile::open(&spec.path, write, direct)?;
    let (engine, running) = engine(options)?;
    let running = Arc::new(running);
    let faults = || Faults::new(&spec.path, options.faults.clone());
    let cached_reads = spec.engine != IoEngine::Sync;
    let base = RawOptions::new(!write, spec.cache, cached_reads);
    let size = image.disk_size();
    let base = RawDisk::new(image, base, &engine, &running, faults());
    if !spec.ephemeral {
        return Ok(Arc::new(base));
    }
    let (file, folder) = unlinked_file(&folders(), size)?;
    let layer = ImageFile { file: Arc::new(file), len: size, direct: None };
    let volatile = RawOptions::new(false, CacheMode::Unsafe, cached_reads);
    let layer = RawDisk::new(layer, volatile, &engine, &running, faults().in_layer(folder));
    Ok(Arc::new(Overlay::new(base, layer)))
}

/// The engine of a disk. A kernel or container that denies io_uring gives threads unless it was asked for by name.
fn engine(options: &DiskOptions) -> Result<Started, ImageError> {
    let DiskOptions { spec, thread_hook, .. } = options;
    let hook = thread_hook.as_ref();
    let uring = match (spec.engine, spec.cache) {
        (IoEngine::Sync, _) => return Ok(start_inline()),
        (IoEngine::Uring, _) => true,
        (IoEngine::Auto, CacheMode::None) => true,
        (IoEngine::Auto | IoEngine::Threads, _) => false,
    };
    if uring {
        match start_uring(hook) {
            Ok(started) => return Ok(started),
            Err(source) if spec.engine == IoEngine::Uring => {
                return Err(ImageError::NoUring { path: spec.path.clone(), source });
            }
            Err(_) => (),
        }
    }
    start_pool(hook).map_err(|source| ImageError::Threads { path: spec.path.clone(), source })
}
