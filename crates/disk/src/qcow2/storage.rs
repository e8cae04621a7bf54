//! An image file as the library reaches it, and as data goes past the library between it and the guest's memory.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use super::order::Order;
use crate::file::{Alignment, ImageFile};
use crate::{Buffers, HostBuffer, sys};

/// Zeroes written at a time where the file system cannot make them itself.
const CHUNK: usize = 64 << 10;

thread_local! {
    /// Whether reads on this thread must not wait for the host's device.
    static NOWAIT: Cell<bool> = const { Cell::new(false) };
}

/// Has reads on this thread fail with [`io::ErrorKind::WouldBlock`] while `f` runs, if the page cache does not have
/// what they want.
pub(super) fn without_waiting<T>(f: impl FnOnce() -> T) -> T {
    struct Again;
    impl Drop for Again {
        fn drop(&mut self) {
            NOWAIT.set(false);
        }
    }
    // Also if `f` panics.
    let _again = Again;
    NOWAIT.set(true);
    f()
}

fn read_flags() -> i32 {
    if NOWAIT.get() { libc::RWF_NOWAIT } else { 0 }
}

/// What others have to know of a file that is written to.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// `fdatasync` has failed: what was written may be lost, whatever a later one says.
    lost: AtomicBool,
    /// An `fdatasync` is under way, and others may have to wait for it.
    syncing: AtomicBool,
}

impl Health {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn is_syncing(&self) -> bool {
        self.syncing.load(Ordering::Acquire)
    }
}

/// One file of a chain of images.
#[derive(Debug)]
pub(crate) struct Storage {
    path: PathBuf,
    file: Arc<File>,
    /// Bytes that the file has at least. Nothing makes it shorter.
    end: AtomicU64,
    direct: Option<Alignment>,
    /// What that demands of addresses, and of offsets and lengths; 1 without.
    align: (usize, usize),
    /// Bytes of a cluster. A file without has clusters of 1 byte.
    cluster: u64,
    /// Keeps the order of what is written; none for a file that is only read.
    order: Option<Order>,
    health: Arc<Health>,
    helper: CommonStorageHelper,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the image is cut off")
}

impl Storage {
    pub(super) fn new(path: &Path, image: &ImageFile, cluster: u64, order: Option<Order>) -> Self {
        let align = image.direct.map_or((1, 1), |d| (d.memory as usize, d.block as usize));
        Self {
            path: path.to_owned(),
            file: Arc::clone(&image.file),
            end: AtomicU64::new(image.len),
            direct: image.direct,
            align,
            cluster,
            order,
            health: Arc::default(),
            helper: CommonStorageHelper::default(),
        }
    }

    /// The file as it is now.
    fn image(&self) -> ImageFile {
        let len = self.file.metadata().map_or(0, |status| status.len()).max(self.end());
        ImageFile { file: Arc::clone(&self.file), len, direct: self.direct }
    }

    pub(super) fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// Whether buffers are as direct I/O wants them.
    pub(super) fn takes(&self, buffers: &Buffers) -> bool {
        self.align == (1, 1) || buffers.is_aligned(self.align.0, self.align.1)
    }

    fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Fills buffers with data from `offset` on. Where the file ends within a cluster, zeroes follow.
    pub(super) fn read_data(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let end = self.end();
        if offset & !(self.cluster - 1) >= end {
            return Err(cut_off());
        }
        let mut done = 0;
        while done < buffers.len() {
            let at = offset + done;
            if at >= end {
                buffers.zero(done, buffers.len() - done);
                return Ok(());
            }
            match sys::read(&self.file, at, buffers, done, read_flags()) {
                Ok(0) => return Err(cut_off()),
                Ok(n) => done += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes data to `offset`.
    pub(super) fn write_data(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let result = self.write_all(offset, buffers);
        self.wrote(offset + buffers.len(), &result);
        result
    }

    fn write_all(&self, offset: u64, buffers: &Buffers) -> io::Result<()> {
        let mut done = 0;
        while done < buffers.len() {
            match sys::write(&self.file, offset + done, buffers, done, 0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Notes that something was written up to `end`, or some of it.
    fn wrote(&self, end: u64, result: &io::Result<()>) {
        let end = match result {
            Ok(()) => end,
            Err(_) => self.file.metadata().map_or(0, |status| status.len()),
        };
        self.end.fetch_max(end, Ordering::AcqRel);
        if let Some(order) = &self.order {
            order.wrote();
        }
    }

    /// Gives the room of a range back to the host. Where that is not possible it stays.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match sys::allocate(&self.file, mode, offset, len) {
            Err(e) if !unsupported(&e) => Err(e),
            _ => Ok(()),
        }
    }

    /// Has everything that was written on stable storage.
    fn sync_file(&self) -> io::Result<()> {
        self.health.syncing.store(true, Ordering::Release);
        let result = self.file.sync_data();
        self.health.syncing.store(false, Ordering::Release);
        if result.is_err() {
            self.health.lost.store(true, Ordering::Release);
        }
        result
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        // Behind the end there is nothing yet, which reads as zeroes.
        let len = len.min(self.end().saturating_sub(offset));
        if len == 0 {
            return Ok(());
        }
        for mode in [libc::FALLOC_FL_ZERO_RANGE, libc::FALLOC_FL_PUNCH_HOLE] {
            match sys::allocate(&self.file, mode | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
                Err(e) if unsupported(&e) => (),
                result => return result,
            }
        }
        let buffer = HostBuffer::new(CHUNK);
        let mut done = 0;
        while done < len {
            let buffers = Buffers::host(&buffer, (len - done).min(CHUNK as u64) as usize);
            self.write_all(offset + done, &buffers)?;
            done += buffers.len();
        }
        Ok(())
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}

impl imago::Storage for Storage {
    fn mem_align(&self) -> usize {
        self.align.0
    }

    fn req_align(&self) -> usize {
        self.align.1
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.end())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let end = self.end();
        // A table or a cluster must begin within the file. Smaller pieces are read to be written back.
        if offset >= end && bufv.len() >= self.cluster && bufv.len() > self.align.1 as u64 {
            return Err(cut_off());
        }
        for mut slice in bufv.into_inner() {
            let mut done = 0;
            while let Some(left) = slice.get_mut(done..)
                && !left.is_empty()
            {
                if offset >= end {
                    left.fill(0);
                    break;
                }
                match sys::read_bytes(&self.file, offset, left, read_flags()) {
                    Ok(0) => return Err(cut_off()),
                    Ok(n) => {
                        done += n;
                        offset += n as u64;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let slices = bufv.into_inner();
        let len: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        let write = || {
            let mut at = offset;
            for slice in &slices {
                self.file.write_all_at(slice, at)?;
                at += slice.len() as u64;
            }
            Ok(())
        };
        let result = match &self.order {
            Some(order) => order.write(offset, &slices, || self.sync_file(), write, || self.image()),
            None => write(),
        };
        self.wrote(offset + len, &result);
        result
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let result = self.write_zeroes(offset, length);
        if let Some(order) = &self.order {
            order.wrote();
        }
        result
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.order {
            Some(order) => order.sync(|| self.sync_file()),
            None => Ok(()),
        }
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
