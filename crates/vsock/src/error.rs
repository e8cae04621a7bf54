//! What can go wrong with vsock.

use std::io;
use std::path::PathBuf;

/// A vsock that cannot be had, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket.
    #[error("cannot listen on {} for --vsock: {source}", socket.display())]
    Listen {
        /// Where.
        socket: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The process.
    #[error("cannot start the process of vsock")]
    Start(#[source] io::Error),
    /// The host's refusal of something else.
    #[error("the process of vsock cannot go on")]
    Host(#[source] io::Error),
    /// What the process said before it ended.
    #[error("{0}")]
    Refused(String),
}
