//! What is in folders.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::{Outcome, Server};
use crate::attr::{ENTRY, entry_out, number};
use crate::wire::{Answer, Request};

/// Bytes of `struct fuse_dirent` before the name.
const DIRENT: usize = 24;
/// Bytes of entries that the host is asked for at a time. What is read and does not fit is read again for the next request.
const BATCH: usize = 16 << 10;

/// An entry as the host tells it.
struct Entry<'a> {
    name: &'a CStr,
    inode: u64,
    next: u64,
    kind: FileType,
}

impl Server {
    pub(super) fn open_folder(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let folder = self.nodes.folder(request.node)?;
        let handle = self.files.add(true, || self.list_folder(&folder))?;
        Self::put_handle(handle, out);
        Ok(())
    }

    pub(super) fn read_folder(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        self.list(request, out, false)
    }

    pub(super) fn read_folder_and_look_up(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        self.list(request, out, true)
    }

    /// `struct fuse_read_in`: entries from the place that the guest names, as many as it has room for.
    fn list(&self, request: &Request<'_>, out: &mut Answer<'_>, look_up: bool) -> Outcome {
        let mut body = request.body;
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let open = self.files.get(handle, true)?;
        let _position = open.position.lock().unwrap_or_else(PoisonError::into_inner);
        // A place that the host gave, or one that the guest made up, which the host then refuses or rounds.
        seek(&open.file, SeekFrom::Start(offset))?;
        let mut room = (size as usize).min(out.room());
        let mut buffer = [const { MaybeUninit::uninit() }; BATCH];
        let mut entries = RawDir::new(&open.file, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let entry = Entry {
                name: entry.file_name(),
                inode: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
            };
            let len = DIRENT + entry.name.count_bytes().next_multiple_of(8) + if look_up { ENTRY } else { 0 };
            if len > room {
                // Not even one would look like the end.
                return if out.is_empty() { Err(Errno::INVAL) } else { Ok(()) };
            }
            room -= len;
            self.put_listed(request.node, &entry, look_up, out);
        }
        Ok(())
    }

    /// `struct fuse_dirent`, or `struct fuse_direntplus`.
    fn put_listed(&self, folder: u64, entry: &Entry<'_>, look_up: bool, out: &mut Answer<'_>) {
        let name = entry.name.to_bytes();
        let mut inode = entry.inode;
        if look_up {
            // The guest knows these two. What cannot be looked up now is told by its name alone.
            let found = match name {
                b"." | b".." => None,
                _ => {
                    self.nodes.folder(folder).and_then(|at| self.nodes.look_up(folder, &at, entry.name)).ok()
                }
            };
            match found {
                Some((node, stat)) => {
                    inode = number(&stat, self.nodes.device());
                    entry_out(out, node, &stat, self.nodes.device(), self.owners);
                }
                None => out.zeroes(ENTRY),
            }
        }
        if name == b".." && folder == crate::nodes::ROOT {
            inode = self.nodes.root_inode();
        }
        out.u64(inode);
        out.u64(entry.next);
        out.u32(name.len() as u32);
        out.u32(entry.kind.as_raw_mode() >> 12 & 15);
        out.put(name);
        out.zeroes(name.len().next_multiple_of(8) - name.len());
    }
}
