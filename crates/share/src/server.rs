//! The server: a table of what there is to ask, and a function for each.

mod attributes;
mod data;
mod folders;
mod names;

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::error::ShareError;
use crate::files::Files;
use crate::nodes::Nodes;
use crate::owner::Owners;
use crate::spec::ShareSpec;
use crate::wire::{Answer, Body, MAX_DATA, Request, init, op};

/// Descriptors that are neither nodes nor open files: the link, those in use for a moment.
const OTHER_FILES: usize = 64;
/// Nodes and files open at most, whatever the host allows.
const MOST_FILES: usize = 1 << 18;

/// A folder that is served. Answers on any number of threads.
#[derive(Debug)]
pub struct Server {
    pub(crate) nodes: Nodes,
    pub(crate) files: Files,
    owners: Owners,
    read_only: bool,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
}

type Outcome = Result<(), Errno>;

/// Something to ask for.
struct Operation {
    opcode: u32,
    /// Changes something, and so is refused where the guest cannot.
    changes: bool,
    run: fn(&Server, &Request<'_>, &mut Answer<'_>) -> Outcome,
}

const fn reads(opcode: u32, run: fn(&Server, &Request<'_>, &mut Answer<'_>) -> Outcome) -> Operation {
    Operation { opcode, changes: false, run }
}

const fn changes(opcode: u32, run: fn(&Server, &Request<'_>, &mut Answer<'_>) -> Outcome) -> Operation {
    Operation { opcode, changes: true, run }
}

/// All others are refused with ENOSYS, of which Linux takes note: locks are the guest's own then, there are no extended attributes, and
/// what is written is not flushed when a file is closed, since nothing is held back here.
const OPERATIONS: &[Operation] = &[
    reads(op::INIT, Server::init),
    reads(op::DESTROY, Server::destroy),
    reads(op::LOOKUP, Server::look_up),
    reads(op::GETATTR, Server::get_attributes),
    changes(op::SETATTR, Server::set_attributes),
    reads(op::STATFS, Server::file_system),
    reads(op::READLINK, Server::read_link),
    changes(op::SYMLINK, Server::symlink),
    changes(op::MKNOD, Server::make_node),
    changes(op::MKDIR, Server::make_folder),
    changes(op::CREATE, Server::create),
    changes(op::UNLINK, Server::unlink),
    changes(op::RMDIR, Server::remove_folder),
    changes(op::RENAME, Server::rename),
    changes(op::RENAME2, Server::rename_with),
    changes(op::LINK, Server::link),
    reads(op::OPEN, Server::open_file),
    reads(op::READ, Server::read),
    changes(op::WRITE, Server::write),
    reads(op::LSEEK, Server::seek),
    changes(op::FALLOCATE, Server::allocate),
    changes(op::COPY_FILE_RANGE, Server::copy),
    reads(op::FSYNC, Server::sync),
    reads(op::FSYNCDIR, Server::sync),
    reads(op::SYNCFS, Server::sync_all),
    reads(op::RELEASE, Server::release),
    reads(op::OPENDIR, Server::open_folder),
    reads(op::READDIR, Server::read_folder),
    reads(op::READDIRPLUS, Server::read_folder_and_look_up),
    reads(op::RELEASEDIR, Server::release),
];

impl Server {
    /// Serves the folder of `spec`. The process' file mode creation mask should be 0: the guest has applied its own.
    ///
    /// # Errors
    /// [`ShareError`] if it is no folder that can be opened.
    pub fn new(spec: &ShareSpec) -> Result<Self, ShareError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let refused = |source: Errno| ShareError::Folder {
            folder: spec.folder.clone(),
            source: io::Error::from(source),
        };
        let root = openat(CWD, &spec.folder, flags, Mode::empty()).map_err(refused)?;
        let descriptors = openat(CWD, c"/proc/self/fd", flags, Mode::empty())
            .map_err(|source| ShareError::Proc(source.into()))?;
        // Half for nodes, half for what is open.
        let allowed = getrlimit(Resource::Nofile).current.map_or(MOST_FILES, |most| most as usize);
        let half = allowed.saturating_sub(OTHER_FILES).min(MOST_FILES) / 2;
        let server = Self {
            nodes: Nodes::new(root, half).map_err(refused)?,
            files: Files::new(half),
            owners: Owners::of_process(),
            read_only: spec.read_only,
            descriptors,
        };
        // Now rather than in the guest: a folder that nobody may list.
        let root = server.nodes.folder(crate::nodes::ROOT).map_err(refused)?;
        server.list_folder(&root).map_err(refused)?;
        Ok(server)
    }

    /// Appends to `out` the answer to a request, of which the guest takes `room` bytes; nothing if none is due.
    pub fn answer(&self, request: &[u8], room: usize, out: &mut Vec<u8>) {
        let Some(request) = Request::parse(request) else {
            if let Some(answer) = Answer::new(out, room) {
                answer.finish(0, Err(Errno::INVAL));
            }
            return;
        };
        match request.opcode {
            op::FORGET => self.forget(request.node, request.body),
            op::BATCH_FORGET => self.forget_many(request.body),
            // Nothing here takes so long that it could be interrupted.
            op::INTERRUPT => {}
            opcode => {
                let Some(mut answer) = Answer::new(out, room) else { return };
                let known = OPERATIONS.iter().find(|operation| operation.opcode == opcode);
                let result = match known {
                    None => Err(Errno::NOSYS),
                    Some(operation) if operation.changes && self.read_only => Err(Errno::ROFS),
                    Some(operation) => (operation.run)(self, &request, &mut answer),
                };
                answer.finish(request.unique, result);
            }
        }
    }

    /// `struct fuse_init_in`, `struct fuse_init_out`.
    fn init(&self, request: &Request<'_>, out: &mut Answer<'_>) -> Outcome {
        let mut body = request.body;
        let (major, minor, read_ahead, flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        if major < 7 || major == 7 && minor < 31 {
            return Err(Errno::PROTO);
        }
        // A driver that starts knows of nothing from before.
        self.forget_all();
        out.u32(7);
        out.u32(31);
        out.u32(read_ahead.min(MAX_DATA as u32));
        out.u32(flags & init::ALL);
        // Requests in the background at most, and with how many the guest holds back.
        out.u16(128);
        out.u16(96);
        out.u32(MAX_DATA as u32);
        // Times are exact to a nanosecond.
        out.u32(1);
        out.u16((MAX_DATA / 4096) as u16);
        out.u16(0);
        out.zeroes(32);
        Ok(())
    }

    fn destroy(&self, _: &Request<'_>, _: &mut Answer<'_>) -> Outcome {
        self.forget_all();
        Ok(())
    }

    fn forget_all(&self) {
        self.files.clear();
        self.nodes.clear();
    }

    /// `struct fuse_forget_in`.
    fn forget(&self, node: u64, mut body: Body<'_>) {
        if let Ok(count) = body.u64() {
            self.nodes.forget(node, count);
        }
    }

    /// `struct fuse_batch_forget_in`.
    fn forget_many(&self, mut body: Body<'_>) {
        let Ok(count) = body.u32() else { return };
        let _ = body.u32();
        for _ in 0..count {
            let (Ok(node), Ok(count)) = (body.u64(), body.u64()) else { return };
            self.nodes.forget(node, count);
        }
    }

    /// The name below [`Server::descriptors`] by which an open file is reached again: the file itself, not its name.
    fn again(file: &OwnedFd) -> String {
        use std::os::fd::AsRawFd;
        file.as_raw_fd().to_string()
    }

    /// Opens a regular file that is open with `O_PATH`.
    fn reopen(&self, file: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        openat(&self.descriptors, Self::again(file), flags, Mode::empty())
    }

    fn list_folder(&self, folder: &OwnedFd) -> Result<OwnedFd, Errno> {
        openat(
            folder,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// What the guest keeps here: nodes, descriptors of theirs, open files.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn kept(&self) -> (usize, usize, usize) {
        let (nodes, open) = self.nodes.count();
        (nodes, open, self.files.count())
    }
}
