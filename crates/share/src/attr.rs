//! What a file is like, as the guest is told.

use rustix::fs::{Stat, major, minor};

use crate::owner::Owners;
use crate::wire::Answer;

/// Bytes of `struct fuse_entry_out`.
pub(crate) const ENTRY: usize = 128;
/// Seconds that the guest may believe names and attributes without asking: what changes on the host shows after so long.
const VALID: u64 = 1;

/// A file's number as the guest sees it: the host's own in the folder's file system, another one in those mounted below.
pub(crate) fn number(stat: &Stat, folder_device: u64) -> u64 {
    if stat.st_dev == folder_device {
        return stat.st_ino;
    }
    // Only so that programs do not take two files for one.
    stat.st_ino ^ stat.st_dev.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63
}

/// `struct fuse_attr`.
fn attributes(out: &mut Answer<'_>, stat: &Stat, folder_device: u64, owners: Owners) {
    let (uid, gid) = owners.to_guest(stat.st_uid, stat.st_gid);
    out.u64(number(stat, folder_device));
    out.u64(stat.st_size as u64);
    out.u64(stat.st_blocks as u64);
    out.u64(stat.st_atime as u64);
    out.u64(stat.st_mtime as u64);
    out.u64(stat.st_ctime as u64);
    out.u32(stat.st_atime_nsec as u32);
    out.u32(stat.st_mtime_nsec as u32);
    out.u32(stat.st_ctime_nsec as u32);
    out.u32(stat.st_mode);
    out.u32(stat.st_nlink as u32);
    out.u32(uid);
    out.u32(gid);
    // Linux' `new_encode_dev`.
    let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
    out.u32(minor & 0xff | major << 8 | (minor & !0xff) << 12);
    out.u32(stat.st_blksize as u32);
    out.u32(0);
}

/// `struct fuse_attr_out`.
pub(crate) fn attr_out(out: &mut Answer<'_>, stat: &Stat, folder_device: u64, owners: Owners) {
    out.u64(VALID);
    out.u64(0);
    attributes(out, stat, folder_device, owners);
}

/// `struct fuse_entry_out`.
pub(crate) fn entry_out(out: &mut Answer<'_>, node: u64, stat: &Stat, folder_device: u64, owners: Owners) {
    out.u64(node);
    // Numbers of nodes are never used again, so there is one generation.
    out.u64(0);
    out.u64(VALID);
    out.u64(VALID);
    out.u64(0);
    attributes(out, stat, folder_device, owners);
}
