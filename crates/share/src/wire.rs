//! FUSE messages as bytes (`include/uapi/linux/fuse.h`): what is read from a request, and how an answer is made.
//!
//! Reading trusts no length: everything is got by checked slices, and what does not fit is an invalid request.

use std::ffi::CStr;

use rustix::io::Errno;

/// Bytes of data in one read or write at most, and of a folder's entries in one answer.
pub(crate) const MAX_DATA: usize = 128 << 10;
/// The longest request: a header, a write's arguments, its data. Names are shorter.
pub const MAX_REQUEST: usize = HEADER + 40 + MAX_DATA;
/// The longest answer.
pub const MAX_ANSWER: usize = OUT_HEADER + MAX_DATA;
/// Before each request: `struct fuse_in_header`.
const HEADER: usize = 40;
/// Before each answer: `struct fuse_out_header`.
const OUT_HEADER: usize = 16;
/// The longest name (`NAME_MAX`) and the longest target of a symbolic link (`PATH_MAX`, with its end).
const LONGEST_NAME: usize = 255;
const LONGEST_TARGET: usize = 4095;

/// Which request it is: `enum fuse_opcode`.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
}

/// What both sides can do: flags of INIT.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub(crate) const BIG_WRITES: u32 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(crate) const ASYNC_DIO: u32 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
    pub(crate) const ALL: u32 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | MAX_PAGES;
}

/// Which attributes a SETATTR sets (`FATTR_…`).
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const HANDLE: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
}

/// A request: who asks for what about which node, and its arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) body: Body<'a>,
}

impl<'a> Request<'a> {
    /// `None` if not even the header is whole.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut head = Body(bytes.get(..HEADER)?);
        let len = head.u32().ok()? as usize;
        let opcode = head.u32().ok()?;
        let unique = head.u64().ok()?;
        let node = head.u64().ok()?;
        let (uid, gid) = (head.u32().ok()?, head.u32().ok()?);
        let body = Body(bytes.get(HEADER..len)?);
        Some(Self { opcode, unique, node, uid, gid, body })
    }
}

/// Arguments that are not read yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.bytes(N)?.try_into().map_err(|_| Errno::INVAL)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, longest: usize) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        match text.count_bytes() {
            0 => Err(Errno::INVAL),
            len if len > longest => Err(Errno::NAMETOOLONG),
            _ => Ok(text),
        }
    }

    /// The name of something in a folder: one component that leads nowhere but there.
    pub(crate) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text(LONGEST_NAME)?;
        match name.to_bytes() {
            b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// What a symbolic link says: any text, since nobody here follows it.
    pub(crate) fn target(&mut self) -> Result<&'a CStr, Errno> {
        self.text(LONGEST_TARGET)
    }
}

/// An answer in the making, behind room for its header.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    bytes: &'a mut Vec<u8>,
    start: usize,
    /// Bytes that may follow the header.
    room: usize,
}

impl<'a> Answer<'a> {
    /// Appends to `bytes` an answer of which the guest takes `room` bytes. `None` if that is not even a header.
    pub(crate) fn new(bytes: &'a mut Vec<u8>, room: usize) -> Option<Self> {
        let (start, room) = (bytes.len(), room.min(MAX_ANSWER).checked_sub(OUT_HEADER)?);
        bytes.resize(start + OUT_HEADER, 0);
        Some(Self { bytes, start, room })
    }

    /// Bytes that there still is room for.
    pub(crate) fn room(&self) -> usize {
        (self.start + OUT_HEADER + self.room).saturating_sub(self.bytes.len())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.len() == self.start + OUT_HEADER
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    pub(crate) fn zeroes(&mut self, len: usize) {
        self.bytes.resize(self.bytes.len() + len, 0);
    }

    /// Lets `fill` write up to `len` bytes, and says how many it wrote.
    pub(crate) fn fill(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let at = self.bytes.len();
        self.bytes.resize(at + len.min(self.room()), 0);
        let filled = fill(self.bytes.get_mut(at..).unwrap_or_default())?;
        self.bytes.truncate(at + filled);
        Ok(())
    }

    /// Puts the header before it. What the guest has no room for becomes an error.
    pub(crate) fn finish(self, unique: u64, result: Result<(), Errno>) {
        let end = self.start + OUT_HEADER;
        let result = if self.bytes.len() > end + self.room { Err(Errno::IO) } else { result };
        if let Err(error) = result {
            self.bytes.truncate(self.start);
            self.bytes.extend(failure(unique, error));
            return;
        }
        let len = (self.bytes.len() - self.start) as u32;
        let head = header(len, 0, unique);
        if let Some(to) = self.bytes.get_mut(self.start..end) {
            to.copy_from_slice(&head);
        }
    }
}

fn header(len: u32, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let number = u128::from(unique) << 64 | u128::from(error as u32) << 32 | u128::from(len);
    number.to_le_bytes()
}

/// An answer that tells of an error and nothing else.
pub fn failure(unique: u64, error: Errno) -> [u8; 16] {
    header(OUT_HEADER as u32, -error.raw_os_error(), unique)
}
