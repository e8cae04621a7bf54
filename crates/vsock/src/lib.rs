//! The host's side of vsock: sockets between guest and host that need no network.
//!
//! The machine passes the guest's packets ([`wire`]; virtio 1.2 5.10.6) over a link to a process of its own ([`start`]), which has the other ends, as
//! Unix sockets:
//!
//! - A guest's connection to port P of the host (CID 2) goes to the socket `PATH_P`, on which a program of the host listens.
//! - A program of the host that wants port P of the guest connects to `PATH`, writes `CONNECT P` and a line feed, and reads `OK N` with a line feed
//!   when the guest has accepted; N is the port on the host's side. If the guest refuses, the socket is closed.
//!
//! This is what other monitors do too, so that programs for them work. Each direction ends by itself (half-close), and data that
//! was sent before arrives before the end does.
//!
//! # Bounds
//! A guest may have [`MOST`] connections, each of which keeps [`BUFFER`] bytes at most for a host that does not read; that is what the guest
//! is told (its credit, 5.10.6.3), and one that sends more loses the connection. What the guest does not read stays in the host's sockets. Packets that wait for
//! room in the link are flags of connections, or answers to strays, of which there is a bounded number.

#![forbid(unsafe_code)]

mod connection;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod helper;
mod spec;
mod switch;
#[cfg(test)]
mod tests;
pub mod wire;

pub use connection::BUFFER;
pub use error::VsockError;
pub use helper::{SUBCOMMAND, helper_main, serve, start};
pub use ringfence_helper::{Helper, Link};
pub use spec::{VsockSpec, VsockSpecError};
pub use switch::MOST;
