//! What can go wrong with a network.

use std::io;
use std::net::SocketAddr;

/// A network that cannot be had, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A forwarded port.
    #[error("cannot listen on {listen} for --net user,forward=…: {source}")]
    Forward {
        /// Where.
        listen: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The host's refusal of something else.
    #[error("the network's process cannot go on")]
    Host(#[source] io::Error),
    /// A tap device.
    #[error(
        "cannot open the tap device {name}: {source}; an administrator makes it for you with `ip tuntap add {name} mode tap user …`"
    )]
    Tap {
        /// Its name.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The process.
    #[error("cannot start the network's process")]
    Start(#[source] io::Error),
    /// What the process said before it ended.
    #[error("{0}")]
    Refused(String),
}
