//! What is in files.

use std::os::fd::OwnedFd;

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek, syncfs,
};
use rustix::io::{Errno, pread, pwrite};

use super::{Outcome, Server};
use crate::wire::{Answer, MAX_DATA, Request};

/// FSYNC's flag for "the data is enough".
const DATA_ONLY: u32 = 1;
/// Bytes that one COPY_FILE_RANGE copies at most: the guest asks for the rest.
const MOST_COPIED: u64 = 16 << 20;
/// Where LSEEK starts from: the only two for which the host is asked.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

impl Server {
    /// How a file is opened on the host, by the guest's flags. Where to append is the guest's business, since it tells the place
    /// of every write.
    pub(super) fn access(flags: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(flags);
        let access = flags & OFlags::ACCMODE;
        if access == OFlags::ACCMODE {
            return Err(Errno::INVAL);
        }
        Ok(access | flags & (OFlags::SYNC | OFlags::DSYNC))
    }

    /// Opens a node's file for the guest.
    pub(super) fn open_node(&self, id: u64, flags: u32) -> Result<u64, Errno> {
        let access = Self::access(flags)?;
        let truncate = OFlags::from_bits_retain(flags) & OFlags::TRUNC;
        let writes = !truncate.is_empty() || access & OFlags::ACCMODE != OFlags::RDONLY;
        if writes && self.read_only {
            return Err(Errno::ROFS);
        }
        let node = self.nodes.get(id)?;
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            // Symbolic links are the guest's to follow, devices and pipes its own.
            _ => return Err(Errno::PERM),
        }
        self.files.add(false, || {
            if writes {
                self.open_to_write(&node, access | truncate)
            } else {
                self.reopen(&node.file, access)
            }
        })
    }

    /// `struct fuse_open_out`.
    pub(super) fn put_handle(handle: u64, out: &mut Answer<'_>) {
        out.u64(handle);
        out.u64(0);
    }

    /// `struct fuse_open_in`.
    pub(super) fn open_file(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let handle = self.open_node(request.node, { request.body }.u32()?)?;
        Self::put_handle(handle, out);
        Ok(())
    }

    /// `struct fuse_release_in`.
    pub(super) fn release(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        self.files.remove({ request.body }.u64()?);
        Ok(())
    }

    /// `struct fuse_read_in`.
    pub(super) fn read(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let open = self.files.get(handle, false)?;
        out.fill((size as usize).min(MAX_DATA), |to| {
            // Short at the end of the file only.
            let mut done = 0;
            while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
                match pread(&open.file, rest, offset.saturating_add(done as u64)) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    Err(_) if done > 0 => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(done)
        })
    }

    /// `struct fuse_write_in`, `struct fuse_write_out`.
    pub(super) fn write(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        body.bytes(20)?;
        let data = body.bytes(size as usize)?;
        let open = self.files.get(handle, false)?;
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            match pwrite(&open.file, rest, offset.saturating_add(done as u64)) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        out.u32(done as u32);
        out.u32(0);
        Ok(())
    }

    /// `struct fuse_lseek_in`.
    pub(super) fn seek(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let from = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        out.u64(seek(&self.files.get(handle, false)?.file, from)?);
        Ok(())
    }

    /// `struct fuse_fallocate_in`.
    pub(super) fn allocate(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (handle, offset, len, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits(mode).filter(|mode| known.contains(*mode));
        fallocate(&self.files.get(handle, false)?.file, mode.ok_or(Errno::OPNOTSUPP)?, offset, len)
    }

    /// `struct fuse_copy_file_range_in`, `struct fuse_write_out`.
    pub(super) fn copy(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (from, mut from_at, _) = (body.u64()?, body.u64()?, body.u64()?);
        let (to, mut to_at, len, flags) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.files.get(from, false)?, self.files.get(to, false)?);
        let len = len.min(MOST_COPIED) as usize;
        let copied = copy_file_range(&from.file, Some(&mut from_at), &to.file, Some(&mut to_at), len)?;
        out.u32(copied as u32);
        out.u32(0);
        Ok(())
    }

    /// `struct fuse_fsync_in`, of a file or a folder.
    pub(super) fn sync(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (handle, flags) = (body.u64()?, body.u32()?);
        let is_folder = request.opcode == crate::wire::op::FSYNCDIR;
        let file: &OwnedFd = &self.files.get(handle, is_folder)?.file;
        if flags & DATA_ONLY != 0 { fdatasync(file) } else { fsync(file) }
    }

    /// Everything of the folder's file system.
    pub(super) fn sync_all(&self, _: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        let root = self.nodes.folder(crate::nodes::ROOT)?;
        syncfs(self.list_folder(&root)?)
    }
}
