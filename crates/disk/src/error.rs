//! What can go wrong with a disk: when it is opened, and while the guest uses it.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::{BackingError, Qcow2Error};

/// Why an image cannot be used as a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused to open it.
    #[error("cannot open the disk image {path}: {source}; {hint}")]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// It is neither a file nor a block device.
    #[error("{path} is {what}, not a disk image; give a regular file or a block device")]
    NotAnImage {
        /// The path given.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It holds nothing.
    #[error("the disk image {path} is empty; give it a size first, such as: truncate -s 4G {path}")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("the disk image {path} is in use by another machine or program; {hint}")]
    InUse {
        /// The image.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The file system cannot lock it.
    #[error(
        "cannot lock the disk image {path}: {source}; without a lock two machines could write to it, so copy it \
         to a file system with locks"
    )]
    Lock {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The file system has no direct I/O.
    #[error("{path} is on a file system without direct I/O, which cache=none needs; use cache=writeback")]
    NoDirectIo {
        /// The image.
        path: PathBuf,
    },
    /// The kernel refuses io_uring, which was asked for by name.
    #[error("io_uring is not available here ({source}), which io=uring needs for {path}; use io=threads")]
    NoUring {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// No place for what an ephemeral disk writes.
    #[error(
        "cannot make a file in {folder} for what is written to an ephemeral disk: {source}; set TMPDIR to a \
             writable folder with enough space"
    )]
    Overlay {
        /// Where it was tried.
        folder: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It is no qcow2 image that can be used.
    #[error("cannot use {path} as a qcow2 disk image: {source}")]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: Qcow2Error,
    },
    /// What it stands on cannot be used.
    #[error("the disk image {path} stands on {name:?}, which cannot be opened: {source}")]
    Backing {
        /// The image.
        path: PathBuf,
        /// Its backing file, as the image names it.
        name: String,
        /// Why not.
        source: BackingError,
    },
    /// The host has no more threads or descriptors.
    #[error(
        "cannot start the I/O threads of the disk {path}: {source}; raise the limit on processes or stop some"
    )]
    Threads {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

/// What was to be done when I/O failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IoKind {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making writes durable.
    Flush,
    /// Giving back space.
    Discard,
    /// Writing zeroes.
    WriteZeroes,
}

impl fmt::Display for IoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
            Self::Flush => "flushing",
            Self::Discard => "discarding",
            Self::WriteZeroes => "zeroing",
        })
    }
}

/// Why a request failed, as the device that sent it needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The request reaches past the end of the disk.
    #[error("the request reaches past the end of the disk")]
    OutOfRange,
    /// Offset or length is not a multiple of [`DiskInfo::block`](crate::DiskInfo::block).
    #[error("the request is not a whole number of the disk's blocks")]
    Misaligned,
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host has no space left for what is to be written.
    #[error("the host has no space left")]
    NoSpace,
    /// It was held back, and nobody wants it done any more.
    #[error("the request was given up before it began")]
    Abandoned,
    /// The host failed.
    #[error("{0} the disk image failed on the host")]
    Host(IoKind),
}

/// A failure of the host, for the user: the guest sees no more than an I/O error.
#[derive(Debug)]
pub struct Fault {
    /// The image.
    pub path: PathBuf,
    /// The folder of what an ephemeral disk has written, if that is what failed.
    pub layer: Option<PathBuf>,
    /// What was to be done.
    pub kind: IoKind,
    /// Where in the disk, in bytes.
    pub offset: u64,
    /// The host's reason.
    pub error: io::Error,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, layer, kind, offset, error } = self;
        match layer {
            None => write!(f, "{kind} the disk image {} failed", path.display())?,
            Some(folder) => {
                let (image, folder) = (path.display(), folder.display());
                write!(f, "{kind} what the ephemeral disk {image} keeps in {folder} failed")?;
            }
        }
        if *kind != IoKind::Flush {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": {error}; the guest sees an I/O error")?;
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if layer.is_some() => {
                write!(f, ", free some space there; TMPDIR names another folder")
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                write!(f, ", free some space on the host")
            }
            io::ErrorKind::FileTooLarge => write!(f, ", raise the limit on the size of files"),
            // Somebody's words, not the host's: the image itself is not as it should be.
            _ if error.get_ref().is_some() => write!(f, ", look at the image: qemu-img check"),
            _ if *kind == IoKind::Flush => {
                write!(f, " and the disk takes no more writes, since some of them may be lost")
            }
            _ => write!(f, ", look into the host's kernel log"),
        }
    }
}

/// Told of failures of the host, once for each kind of failure of a disk. Called on an I/O thread; must not block.
pub type FaultObserver = Arc<dyn Fn(&Fault) + Send + Sync>;

/// Turns the host's errors into what the guest may know, and tells the user of each kind once.
pub(crate) struct Faults {
    path: PathBuf,
    layer: Option<PathBuf>,
    observer: Option<FaultObserver>,
    told: Mutex<BTreeSet<(IoKind, Option<i32>)>>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

impl Faults {
    pub(crate) fn new(path: &Path, observer: Option<FaultObserver>) -> Self {
        Self { path: path.to_owned(), layer: None, observer, told: Mutex::default() }
    }

    /// The same for the layer of an ephemeral disk, which is in `folder`.
    pub(crate) fn in_layer(self, folder: PathBuf) -> Self {
        Self { layer: Some(folder), ..self }
    }

    pub(crate) fn report(&self, kind: IoKind, offset: u64, error: io::Error) -> IoError {
        let code = error.raw_os_error();
        let full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        let new = self.told.lock().unwrap_or_else(PoisonError::into_inner).insert((kind, code));
        if new && let Some(observer) = &self.observer {
            let (path, layer) = (self.path.clone(), self.layer.clone());
            observer(&Fault { path, layer, kind, offset, error });
        }
        if full { IoError::NoSpace } else { IoError::Host(kind) }
    }
}
