//! One file operation, carried on until it is whole.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::{Buffers, sys};

/// What is to be done to a file.
#[derive(Debug)]
pub(crate) enum FileOp {
    /// Fill the buffers. From byte `end` of the file on, zeroes stand for what the file does not have.
    Read { buffers: Buffers, end: u64 },
    /// Write the buffers, and have them on stable storage if `durable`.
    Write { buffers: Buffers, durable: bool },
    /// `fdatasync`.
    Sync,
    /// `fallocate`.
    Allocate { mode: i32, len: u64 },
}

/// Takes the result of a task, and what it was.
pub(crate) type TaskDone = Box<dyn FnOnce(io::Result<()>, FileOp) + Send>;

/// An operation on a file at an offset, how much of it is done, and who waits for it.
pub(crate) struct Task {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    pub(crate) op: FileOp,
    progress: u64,
    done: TaskDone,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {}", self.op, self.offset)
    }
}

impl Task {
    pub(crate) fn new(file: &Arc<File>, offset: u64, op: FileOp, done: TaskDone) -> Self {
        Self { file: Arc::clone(file), offset, op, progress: 0, done }
    }

    /// Where the next transfer starts in the file, and how much of the buffers is done.
    pub(crate) fn position(&self) -> (u64, u64) {
        (self.offset.saturating_add(self.progress), self.progress)
    }

    /// Ends the task.
    pub(crate) fn finish(self, result: io::Result<()>) {
        (self.done)(result, self.op);
    }

    /// Takes the result of one system call. Returns the task if there is more to do, else it is finished.
    pub(crate) fn advance(mut self, result: io::Result<usize>) -> Option<Self> {
        let n = match result {
            Ok(n) => n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Some(self),
            Err(e) => {
                self.finish(Err(e));
                return None;
            }
        };
        let end = match &self.op {
            FileOp::Sync | FileOp::Allocate { .. } => Ok(true),
            FileOp::Write { buffers, .. } => {
                self.progress += n;
                match (n, self.progress >= buffers.len()) {
                    (0, false) => Err(io::Error::from(io::ErrorKind::WriteZero)),
                    (_, whole) => Ok(whole),
                }
            }
            FileOp::Read { buffers, end } => {
                self.progress += n;
                let left = buffers.len().saturating_sub(self.progress);
                if left > 0 && self.offset.saturating_add(self.progress) >= *end {
                    buffers.zero(self.progress, left);
                    Ok(true)
                } else if left > 0 && n == 0 {
                    // Somebody has made the file shorter.
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof))
                } else {
                    Ok(left == 0)
                }
            }
        };
        match end {
            Ok(false) => return Some(self),
            Ok(true) => self.finish(Ok(())),
            Err(e) => self.finish(Err(e)),
        }
        None
    }

    fn call(&self, flags: i32) -> io::Result<usize> {
        let (at, skip) = self.position();
        match &self.op {
            FileOp::Read { buffers, .. } => sys::read(&self.file, at, buffers, skip, flags),
            FileOp::Write { buffers, durable } => {
                sys::write(&self.file, at, buffers, skip, flags | if *durable { libc::RWF_DSYNC } else { 0 })
            }
            FileOp::Sync => self.file.sync_data().map(|()| 0),
            FileOp::Allocate { mode, len } => sys::allocate(&self.file, *mode, self.offset, *len).map(|()| 0),
        }
    }

    /// Carries the task out on this thread.
    pub(crate) fn perform(mut self) {
        loop {
            let result = self.call(0);
            match self.advance(result) {
                Some(task) => self = task,
                None => return,
            }
        }
    }

    /// Carries a read out if the page cache has it all; else gives the task back, less what is done.
    pub(crate) fn read_cached(self) -> Option<Self> {
        match self.call(libc::RWF_NOWAIT) {
            // Not in the cache, or a file system that cannot tell. Any other error is for the real try to find.
            Err(_) | Ok(0) => Some(self),
            Ok(n) => self.advance(Ok(n)),
        }
    }
}
