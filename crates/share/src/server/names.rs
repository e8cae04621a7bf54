//! What things are called: finding, making, moving and removing them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, chownat, linkat, mkdirat, mknodat, openat, readlinkat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::attributes::permissions;
use super::{Outcome, Server};
use crate::attr::entry_out;
use crate::nodes::{open_path, stat};
use crate::owner::Owners;
use crate::wire::{Answer, Request};

/// Flags of RENAME2 (`RENAME_…`).
const NO_REPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

impl Server {
    /// Answers with what `name` is in a folder.
    pub(super) fn put_entry(
        &self,
        parent: u64,
        folder: &OwnedFd,
        name: &CStr,
        out: &mut Answer<'_>,
    ) -> Outcome {
        let (node, stat) = self.nodes.look_up(parent, folder, name)?;
        entry_out(out, node, &stat, self.nodes.device(), self.owners);
        Ok(())
    }

    pub(super) fn look_up(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let folder = self.nodes.folder(request.node)?;
        self.put_entry(request.node, &folder, { request.body }.name()?, out)
    }

    pub(super) fn read_link(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let node = self.nodes.get(request.node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        out.put(readlinkat(&node.file, c"", Vec::new())?.as_bytes());
        Ok(())
    }

    /// Gives what was just made, which is open as `file`, to who made it, where owners are the same on both sides.
    fn give(&self, request: &Request<'_>, folder: &OwnedFd, file: &OwnedFd) -> Outcome {
        if self.owners != Owners::Same {
            return Ok(());
        }
        // Somebody on the host may have put a link to another file in its place, who does not get that file so.
        let made = stat(file)?;
        if FileType::from_raw_mode(made.st_mode) != FileType::Directory && made.st_nlink != 1 {
            return Err(Errno::STALE);
        }
        // A folder with this bit decides whose group its files have.
        let inherits = Mode::from_raw_mode(stat(folder)?.st_mode).contains(Mode::SGID);
        let (uid, gid) = self.owners.to_host(Some(request.uid), (!inherits).then_some(request.gid))?;
        chownat(file, c"", uid, gid, AtFlags::EMPTY_PATH)
    }

    /// Makes something in the folder of the request by `make`, and answers with it.
    fn make(
        &self,
        request: &Request<'_>,
        name: &CStr,
        out: &mut Answer<'_>,
        make: impl FnOnce(&OwnedFd) -> Outcome,
    ) -> Outcome {
        let folder = self.nodes.folder(request.node)?;
        make(&folder)?;
        self.give(request, &folder, &open_path(&folder, name)?)?;
        self.put_entry(request.node, &folder, name, out)
    }

    pub(super) fn symlink(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (name, target) = (body.name()?, body.target()?);
        self.make(request, name, out, |folder| symlinkat(target, folder, name))
    }

    /// `struct fuse_mknod_in`.
    pub(super) fn make_node(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (mode, _device, _mask, _) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let (name, kind) = (body.name()?, FileType::from_raw_mode(mode));
        // A device of the host is no business of a guest's.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let mode = permissions(mode, kind);
        self.make(request, name, out, |folder| mknodat(folder, name, kind, mode, 0))
    }

    /// `struct fuse_mkdir_in`.
    pub(super) fn make_folder(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (mode, _mask) = (body.u32()?, body.u32()?);
        let (name, mode) = (body.name()?, permissions(mode, FileType::Directory));
        self.make(request, name, out, |folder| mkdirat(folder, name, mode))
    }

    /// `struct fuse_create_in`: makes a file if it is not there, and opens it.
    pub(super) fn create(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (flags, mode, _mask, _) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let name = body.name()?;
        let (access, exclusive) =
            (Self::access(flags)?, OFlags::from_bits_retain(flags).contains(OFlags::EXCL));
        let folder = self.nodes.folder(request.node)?;
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = permissions(mode, FileType::RegularFile);
        let made = self.files.add(false, || openat(&folder, name, access | new, mode));
        let handle = match made {
            Ok(handle) => {
                let given =
                    self.files.get(handle, false).and_then(|open| self.give(request, &folder, &open.file));
                given.and_then(|()| self.put_entry(request.node, &folder, name, out)).map(|()| handle)
            }
            // Somebody was faster, and what is there need not be a file.
            Err(Errno::EXIST) if !exclusive => {
                let (node, stat) = self.nodes.look_up(request.node, &folder, name)?;
                entry_out(out, node, &stat, self.nodes.device(), self.owners);
                self.open_node(node, flags).inspect_err(|_| self.nodes.forget(node, 1))
            }
            Err(error) => return Err(error),
        };
        let handle = handle.inspect_err(|_| {
            if let Ok(made) = made {
                self.files.remove(made);
            }
        })?;
        Self::put_handle(handle, out);
        Ok(())
    }

    pub(super) fn unlink(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        unlinkat(self.nodes.folder(request.node)?, { request.body }.name()?, AtFlags::empty())
    }

    pub(super) fn remove_folder(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        unlinkat(self.nodes.folder(request.node)?, { request.body }.name()?, AtFlags::REMOVEDIR)
    }

    /// `struct fuse_rename_in`.
    pub(super) fn rename(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let to = body.u64()?;
        self.move_name(request.node, body.name()?, to, body.name()?, RenameFlags::empty())
    }

    /// `struct fuse_rename2_in`.
    pub(super) fn rename_with(&self, request: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (to, flags, _) = (body.u64()?, body.u32()?, body.u32()?);
        let flags = match flags {
            0 => RenameFlags::empty(),
            NO_REPLACE => RenameFlags::NOREPLACE,
            EXCHANGE => RenameFlags::EXCHANGE,
            _ => return Err(Errno::INVAL),
        };
        self.move_name(request.node, body.name()?, to, body.name()?, flags)
    }

    fn move_name(&self, from: u64, old: &CStr, to: u64, new: &CStr, flags: RenameFlags) -> Outcome {
        let (old_folder, new_folder) = (self.nodes.folder(from)?, self.nodes.folder(to)?);
        renameat_with(&old_folder, old, &new_folder, new, flags)?;
        self.nodes.moved(to, &new_folder, new);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.nodes.moved(from, &old_folder, old);
        }
        Ok(())
    }

    /// `struct fuse_link_in`. The request's node is the folder.
    pub(super) fn link(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (node, name) = (self.nodes.get(body.u64()?)?, body.name()?);
        let folder = self.nodes.folder(request.node)?;
        linkat(&self.descriptors, Self::again(&node.file), &folder, name, AtFlags::SYMLINK_FOLLOW)?;
        self.put_entry(request.node, &folder, name, out)
    }
}
