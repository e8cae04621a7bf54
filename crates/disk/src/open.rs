//! From a description to a disk.

use std::fmt;
use std::sync::Arc;

use crate::engine::{Engine, Job, Running, Started, start_inline, start_pool, start_uring};
use crate::error::Faults;
use crate::file::ImageFile;
use crate::limited::Limited;
use crate::overlay::{Overlay, folders, unlinked_file};
use crate::qcow2::{Qcow2Disk, looks_like_qcow2};
use crate::raw::{RawDisk, RawOptions};
use crate::{BlockDevice, CacheMode, DiskFormat, DiskSpec, FaultObserver, ImageError, IoEngine};

/// Called by each I/O thread before it does anything, so that the machine can fence it.
pub type ThreadHook = Arc<dyn Fn() + Send + Sync>;

/// Told of what the user may not have meant.
pub type Warner = Arc<dyn Fn(String) + Send + Sync>;

/// What a disk is made from.
#[derive(Clone)]
pub struct DiskOptions {
    /// What the user asked for.
    pub spec: DiskSpec,
    /// Told of failures of the host.
    pub faults: Option<FaultObserver>,
    /// Told of what the user may not have meant, while the disk is opened.
    pub warner: Option<Warner>,
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
        Self { spec, faults: None, warner: None, thread_hook: None }
    }
}

/// Opens and locks the image, starts the I/O threads and returns the disk. Both end when it is dropped and its
/// last request is done.
///
/// # Errors
/// [`ImageError`]
pub fn open(options: &DiskOptions) -> Result<Arc<dyn BlockDevice>, ImageError> {
    let spec = &options.spec;
    let mut disk = match spec.format {
        DiskFormat::Raw => raw(options)?,
        DiskFormat::Qcow2 => qcow2(options)?,
    };
    if spec.is_limited() {
        let limited = Limited::new(disk, spec.bytes, spec.operations, options.thread_hook.as_ref());
        disk = Arc::new(limited.map_err(|source| no_threads(spec, source))?);
    }
    Ok(disk)
}

fn no_threads(spec: &DiskSpec, source: std::io::Error) -> ImageError {
    ImageError::Threads { path: spec.path.clone(), source }
}

fn faults(options: &DiskOptions) -> Faults {
    Faults::new(&options.spec.path, options.faults.clone())
}

fn raw(options: &DiskOptions) -> Result<Arc<dyn BlockDevice>, ImageError> {
    let spec = &options.spec;
    let direct = spec.cache == CacheMode::None;
    let write = !spec.read_only && !spec.ephemeral;
    let image = ImageFile::open(&spec.path, write, direct)?;
    if let Some(warn) = &options.warner
        && looks_like_qcow2(&image)
    {
        let path = spec.path.display();
        warn(format!(
            "{path} begins as a qcow2 image and is used as a raw one; add format=qcow2 if it is one"
        ));
    }
    let (engine, running) = engine(options)?;
    let running = Arc::new(running);
    let base = RawOptions::new(!write, spec.cache, spec.engine != IoEngine::Sync);
    let base = Arc::new(RawDisk::new(image, base, &engine, &running, faults(options)));
    if spec.ephemeral { overlay(options, base, &(engine, running)) } else { Ok(base) }
}

fn qcow2(options: &DiskOptions) -> Result<Arc<dyn BlockDevice>, ImageError> {
    let spec = &options.spec;
    let write = !spec.read_only && !spec.ephemeral;
    let (jobs, running) = jobs(options)?;
    let jobs = (jobs, Arc::new(running));
    let base = Qcow2Disk::open(spec, write, spec.engine != IoEngine::Sync, &jobs, faults(options))?;
    let base = Arc::new(base);
    if !spec.ephemeral {
        return Ok(base);
    }
    let (engine, running) = engine(options)?;
    overlay(options, base, &(engine, Arc::new(running)))
}

/// Puts a layer on a disk that takes what is written and vanishes with the machine.
fn overlay(
    options: &DiskOptions,
    base: Arc<dyn BlockDevice>,
    (engine, running): &(Arc<dyn Engine>, Arc<Running>),
) -> Result<Arc<dyn BlockDevice>, ImageError> {
    let size = base.info().size;
    let (file, folder) = unlinked_file(&folders(), size)?;
    let layer = ImageFile { file: Arc::new(file), len: size, direct: None };
    let volatile = RawOptions::new(false, CacheMode::Unsafe, options.spec.engine != IoEngine::Sync);
    let layer = RawDisk::new(layer, volatile, engine, running, faults(options).in_layer(folder));
    Ok(Arc::new(Overlay::new(base, layer)))
}

/// Who works on an image whose format has to be looked into.
fn jobs(options: &DiskOptions) -> Result<Started<Job>, ImageError> {
    match options.spec.engine {
        IoEngine::Sync => Ok(start_inline()),
        _ => start_pool(options.thread_hook.as_ref()).map_err(|e| no_threads(&options.spec, e)),
    }
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
    start_pool(hook).map_err(|source| no_threads(spec, source))
}
