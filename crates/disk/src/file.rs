//! An image file: opened with care, locked, measured.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::{Buffers, HostBuffer, ImageError, SECTOR, sys};

/// What direct I/O on the file demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses, in bytes; a power of two.
    pub(crate) memory: u32,
    /// Of offsets and lengths, in bytes; a power of two, at least 512.
    pub(crate) block: u32,
}

/// An open image.
#[derive(Clone, Debug)]
pub(crate) struct ImageFile {
    pub(crate) file: Arc<File>,
    /// Bytes in the file.
    pub(crate) len: u64,
    /// Set if the file is open for direct I/O.
    pub(crate) direct: Option<Alignment>,
}

impl ImageFile {
    /// Opens and locks an image: exclusively if it is to be written to.
    ///
    /// # Errors
    /// [`ImageError`]
    pub(crate) fn open(path: &Path, write: bool, direct: bool) -> Result<Self, ImageError> {
        let file = open(path, write, direct)?;
        // The type of what is open, not of what the path may have become since.
        let status = file.metadata().map_err(|e| failed(path, e, write))?;
        let kind = status.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match () {
                () if kind.is_dir() => "a folder",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_char_device() => "a character device",
                () => "something else",
            };
            return Err(ImageError::NotAnImage { path: path.to_owned(), what });
        }
        sys::set_blocking(&file).map_err(|e| failed(path, e, write))?;
        lock(&file, path, write)?;
        let len = if kind.is_file() { Ok(status.len()) } else { sys::device_size(&file) };
        let len = len.map_err(|e| failed(path, e, write))?;
        if len == 0 {
            return Err(ImageError::Empty { path: path.to_owned() });
        }
        let file = Arc::new(file);
        let direct = match direct {
            true => Some(alignment(&file, kind.is_block_device(), path)?),
            false => None,
        };
        Ok(Self { file, len, direct })
    }

    /// Bytes of the disk: those of the file, rounded up to whole sectors.
    pub(crate) fn disk_size(&self) -> u64 {
        // A file is never longer than `i64::MAX`.
        self.len.next_multiple_of(SECTOR)
    }
}

fn open(path: &Path, write: bool, direct: bool) -> Result<File, ImageError> {
    // O_NONBLOCK: a pipe's open would wait. O_EXCL on a block device: not while the host has it mounted; without
    // O_CREAT it means nothing for a file.
    let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    if write && path.metadata().is_ok_and(|m| m.file_type().is_block_device()) {
        flags |= libc::O_EXCL;
    }
    if direct {
        flags |= libc::O_DIRECT;
    }
    let result = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    result.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if direct => ImageError::NoDirectIo { path: path.to_owned() },
        Some(libc::EISDIR) => ImageError::NotAnImage { path: path.to_owned(), what: "a folder" },
        _ => failed(path, e, write),
    })
}

fn failed(path: &Path, source: io::Error, write: bool) -> ImageError {
    let hint = match source.raw_os_error() {
        Some(libc::ENOENT) => "check the path, or make a new image, such as: truncate -s 4G FILE",
        Some(libc::EACCES | libc::EPERM) if write => "check its permissions, or add ,readonly or ,ephemeral",
        Some(libc::EACCES | libc::EPERM) => "check its permissions",
        Some(libc::EROFS) => "it can only be read: add ,readonly or ,ephemeral",
        Some(libc::EBUSY) => "the host or another machine uses it: unmount or stop that first",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files",
        _ => "check the path",
    };
    ImageError::Open { path: path.to_owned(), source, hint }
}

/// How often a lock is asked for, and the time between. Who has just closed an image may hold it for a moment longer: the kernel lets go of
/// an io_uring's files later, and a child has all of its parent's until it runs another program.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

fn lock(file: &File, path: &Path, write: bool) -> Result<(), ImageError> {
    let held = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
    let mut result = sys::lock(file, !write);
    for _ in 1..LOCK_TRIES {
        if !result.as_ref().is_err_and(held) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        result = sys::lock(file, !write);
    }
    result.map_err(|source| match held(&source) {
        true => ImageError::InUse {
            path: path.to_owned(),
            hint: if write {
                "stop it, or add ,ephemeral if nobody writes to the image, or copy the image"
            } else {
                "stop it, or copy the image"
            },
        },
        false => ImageError::Lock { path: path.to_owned(), source },
    })
}

/// What direct I/O wants here: as the kernel says, else found out by trying.
fn alignment(file: &Arc<File>, device: bool, path: &Path) -> Result<Alignment, ImageError> {
    let none = || ImageError::NoDirectIo { path: path.to_owned() };
    let (memory, block) = match sys::direct_alignment(file) {
        Some(known) => known,
        None if device => {
            let block = sys::device_block(file).map_err(|e| failed(path, e, false))?;
            (block, block)
        }
        None => {
            let buffer = Buffers::host(&HostBuffer::new(4096), 512);
            let block = if sys::read(file, 0, &buffer, 0, 0).is_ok() { 512 } else { 4096 };
            (block, block)
        }
    };
    if memory == 0 || block == 0 || !memory.is_power_of_two() || !block.is_power_of_two() {
        return Err(none());
    }
    // Memory of ours is aligned to 4 KiB; nothing is known to want more.
    if memory > 4096 || block > 4096 {
        return Err(none());
    }
    Ok(Alignment { memory, block: block.max(SECTOR as u32) })
}
