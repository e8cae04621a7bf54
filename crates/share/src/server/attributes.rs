//! What files are like, and what of it can be changed.

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat, chownat,
    fstatvfs, ftruncate, utimensat,
};
use rustix::io::Errno;

use super::{Outcome, Server};
use crate::attr::attr_out;
use crate::nodes::{Found, stat};
use crate::wire::{Answer, Request, set};

/// GETATTR's flag for "by the open file".
const BY_HANDLE: u32 = 1;

/// The permission bits that a file may get. Set-user-ID and set-group-ID would let whoever runs the file on the host act for its owner; on a
/// folder the latter only says whose its files are.
pub(super) fn permissions(mode: u32, kind: FileType) -> Mode {
    let mode = Mode::from_raw_mode(mode & 0o7777) - Mode::SUID;
    if kind == FileType::Directory { mode } else { mode - Mode::SGID }
}

impl Server {
    pub(super) fn put_attributes(&self, stat: &Stat, out: &mut Answer<'_>) -> Outcome {
        attr_out(out, stat, self.nodes.device(), self.owners);
        Ok(())
    }

    /// `struct fuse_getattr_in`.
    pub(super) fn get_attributes(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (flags, _, handle) = (body.u32()?, body.u32()?, body.u64()?);
        let stat = if flags & BY_HANDLE != 0 {
            stat(&self.files.get(handle, false)?.file)?
        } else {
            stat(&self.nodes.get(request.node)?.file)?
        };
        self.put_attributes(&stat, out)
    }

    /// `struct fuse_setattr_in`.
    pub(super) fn set_attributes(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (valid, _, handle, size, _) = (body.u32()?, body.u32()?, body.u64()?, body.u64()?, body.u64()?);
        let seconds = [body.u64()?, body.u64()?, body.u64()?];
        let nanoseconds = [body.u32()?, body.u32()?, body.u32()?];
        let (mode, _, uid, gid) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let has = |bit| valid & bit != 0;
        let node = self.nodes.get(request.node)?;
        if has(set::MODE) {
            self.set_mode(&node, mode)?;
        }
        if has(set::UID) || has(set::GID) {
            let (uid, gid) =
                self.owners.to_host(has(set::UID).then_some(uid), has(set::GID).then_some(gid))?;
            chownat(&node.file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if has(set::SIZE) {
            self.set_size(&node, has(set::HANDLE).then_some(handle), size)?;
        }
        let time = |set, now, index: usize| {
            let nanoseconds = match (has(set), has(now)) {
                (_, true) => UTIME_NOW,
                (false, false) => UTIME_OMIT,
                (true, false) => i64::from(nanoseconds[index].min(999_999_999)),
            };
            Timespec { tv_sec: seconds[index] as i64, tv_nsec: nanoseconds as _ }
        };
        if has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) {
            let times = Timestamps {
                last_access: time(set::ATIME, set::ATIME_NOW, 0),
                last_modification: time(set::MTIME, set::MTIME_NOW, 1),
            };
            // The file itself, even if it is a symbolic link: what a descriptor leads to is not followed further.
            utimensat(&self.descriptors, Self::again(&node.file), &times, AtFlags::empty())?;
        }
        self.put_attributes(&stat(&node.file)?, out)
    }

    fn set_mode(&self, node: &Found, mode: u32) -> Outcome {
        if node.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = permissions(mode, node.kind);
        chmodat(&self.descriptors, Self::again(&node.file), mode, AtFlags::empty())
    }

    fn set_size(&self, node: &Found, handle: Option<u64>, size: u64) -> Outcome {
        match handle {
            Some(handle) => ftruncate(&self.files.get(handle, false)?.file, size),
            None if node.kind == FileType::RegularFile => {
                ftruncate(self.open_to_write(node, OFlags::WRONLY)?, size)
            }
            None => Err(Errno::INVAL),
        }
    }

    /// Opens a regular file to be written. It is no program any more that acts for its owner.
    pub(super) fn open_to_write(&self, node: &Found, flags: OFlags) -> Result<std::os::fd::OwnedFd, Errno> {
        let mode = stat(&node.file)?.st_mode;
        if Mode::from_raw_mode(mode).intersects(Mode::SUID | Mode::SGID) {
            self.set_mode(node, mode)?;
        }
        self.reopen(&node.file, flags)
    }

    /// `struct fuse_kstatfs`.
    pub(super) fn file_system(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let about = fstatvfs(&self.nodes.get(request.node)?.file)?;
        for number in [about.f_blocks, about.f_bfree, about.f_bavail, about.f_files, about.f_ffree] {
            out.u64(number);
        }
        for number in [about.f_bsize, about.f_namemax, about.f_frsize] {
            out.u32(number as u32);
        }
        out.zeroes(4 + 6 * 4);
        Ok(())
    }
}
