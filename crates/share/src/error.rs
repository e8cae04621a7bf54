//! What can go wrong with a shared folder.

use std::io;
use std::path::PathBuf;

/// A folder that cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The folder itself.
    #[error("cannot share {}: {source}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No `/proc`.
    #[error("sharing a folder needs /proc/self/fd: {0}")]
    Proc(#[source] io::Error),
    /// The process.
    #[error("cannot start the process of a shared folder")]
    Start(#[source] io::Error),
    /// The host's refusal of something else.
    #[error("the process of a shared folder cannot go on")]
    Host(#[source] io::Error),
    /// What the process said before it ended.
    #[error("{0}")]
    Refused(String),
}
