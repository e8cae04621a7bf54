//! What the tests of several modules share.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{BlockDevice, Buffers, DiskOptions, DiskSpec, HostBuffer, IoError, Operation, open, run};

/// Every engine there is, by its name in a description.
pub(crate) const ENGINES: [&str; 3] = ["threads", "uring", "sync"];

/// A file of some bytes in a folder that vanishes.
pub(crate) struct Image {
    folder: tempfile::TempDir,
}

impl Image {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let image = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::write(image.path(), bytes).unwrap();
        image
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    pub(crate) fn spec(&self, options: &str) -> DiskSpec {
        format!("{}{options}", self.path().display()).parse().unwrap()
    }

    pub(crate) fn open(&self, options: &str) -> Arc<dyn BlockDevice> {
        open(&DiskOptions::new(self.spec(options))).unwrap()
    }
}

/// Bytes that differ from sector to sector and within one.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ ((i >> 9) as u8).wrapping_add(seed)).collect()
}

pub(crate) fn buffers(bytes: &[u8]) -> Buffers {
    let buffer = HostBuffer::new(bytes.len());
    buffer.write(0, bytes);
    Buffers::host(&buffer, bytes.len())
}

pub(crate) fn read(disk: &Arc<dyn BlockDevice>, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
    let mut bytes = vec![0xa5; len];
    let buffers = buffers(&bytes);
    run(disk, Operation::Read { offset, buffers: buffers.clone() })?;
    buffers.copy_to(0, &mut bytes);
    Ok(bytes)
}

pub(crate) fn write(disk: &Arc<dyn BlockDevice>, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    run(disk, Operation::Write { offset, buffers: buffers(bytes), durable: false })
}

/// A file in memory, of a file system that can punch holes but not make zeroes, by a path that opens it. With
/// `sealed` it opens for writing but takes no write.
pub(crate) fn memory_file(len: u64, sealed: bool) -> (std::fs::File, PathBuf) {
    use std::os::fd::{AsRawFd, FromRawFd};
    // SAFETY: the name is a C string; the descriptor is a fresh one.
    let file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    if sealed {
        // SAFETY: touches no memory.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}
