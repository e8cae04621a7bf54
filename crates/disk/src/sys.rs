//! The host's system calls on disk images that the standard library does not have.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::Buffers;

/// The most segments that one call takes (`IOV_MAX`).
pub(crate) const MAX_VECTORS: usize = 1024;

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An offset as the kernel takes it.
fn offset(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Reads into `buffers` from byte `skip` of them on, with `RWF_` flags. Returns how much was read.
pub(crate) fn read(file: &File, at: u64, buffers: &Buffers, skip: u64, flags: i32) -> io::Result<usize> {
    let vectors = buffers.io_vectors(skip, MAX_VECTORS);
    let at = offset(at)?;
    // SAFETY: the vectors point to memory that `buffers` keeps, and the kernel writes no further than they reach.
    count(unsafe { libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at, flags) })
}

/// Writes from `buffers` from byte `skip` of them on, with `RWF_` flags. Returns how much was written.
pub(crate) fn write(file: &File, at: u64, buffers: &Buffers, skip: u64, flags: i32) -> io::Result<usize> {
    let vectors = buffers.io_vectors(skip, MAX_VECTORS);
    let at = offset(at)?;
    // SAFETY: the vectors point to memory that `buffers` keeps.
    count(unsafe { libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at, flags) })
}

/// Reads into memory of our own, with `RWF_` flags. Returns how much was read.
pub(crate) fn read_bytes(file: &File, at: u64, into: &mut [u8], flags: i32) -> io::Result<usize> {
    let vector = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let at = offset(at)?;
    // SAFETY: the kernel writes no further than the slice reaches.
    count(unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, at, flags) })
}

/// `fallocate` with `FALLOC_FL_` flags.
pub(crate) fn allocate(file: &File, mode: i32, at: u64, len: u64) -> io::Result<()> {
    let (at, len) = (offset(at)?, offset(len)?);
    // SAFETY: touches no memory.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) })
}

/// Takes a lock on the whole file that belongs to this open file, not to the process, and goes with it. Shared
/// for readers. Does not wait.
pub(crate) fn lock(file: &File, shared: bool) -> io::Result<()> {
    let lock = libc::flock {
        l_type: if shared { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the kernel only reads the structure.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Turns off `O_NONBLOCK`, which keeps an open of something that is no file from waiting.
pub(crate) fn set_blocking(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    check(flags)?;
    // SAFETY: touches no memory.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// The bytes of a block device.
pub(crate) fn device_size(file: &File) -> io::Result<u64> {
    /// `BLKGETSIZE64` of linux/fs.h: `_IOR(0x12, 114, size_t)`.
    const GET_SIZE: libc::c_ulong = 0x8008_1272;
    let mut size = 0_u64;
    // SAFETY: the kernel writes eight bytes to `size`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET_SIZE as _, &raw mut size) })?;
    Ok(size)
}

/// The logical block size of a block device.
pub(crate) fn device_block(file: &File) -> io::Result<u32> {
    let mut size = 0_i32;
    // SAFETY: the kernel writes four bytes to `size`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET as _, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// What direct I/O on a file wants: alignment of memory and of offsets and lengths, if the kernel knows. `None`
/// if it does not say (before Linux 6.1, or an older file system); zeroes if the file has no direct I/O.
pub(crate) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string and the kernel writes no more than the structure.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut status,
        )
    };
    let known = result == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0;
    known.then_some((status.stx_dio_mem_align, status.stx_dio_offset_align))
}

/// A counter that wakes whoever waits for it.
pub(crate) fn event() -> io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: touches no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}
