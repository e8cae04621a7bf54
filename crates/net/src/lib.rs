//! A machine's network.
//!
//! A network card of a machine is joined by a [`Link`] to a process of its own ([`Helper`]), which alone has sockets. There it is a
//! **NAT in user mode**, which needs no rights: the guest sees a link with a router at 10.0.2.2 that answers ARP, neighbour
//! discovery, DHCP and DNS; its connections become ordinary sockets of the host. Or the process passes frames to and from a
//! **tap device** that somebody has made.
//!
//! Frames cross the link with the header that virtio gives them, so that a guest's segment of 64 KiB with an unfinished
//! checksum crosses in one piece and becomes one `write`; and the other way round. That is what makes it fast. The link is two rings in
//! shared memory, so frames cost no system call while the other side is awake.
//!
//! Frames are read and made by few functions of our own ([`wire`]): they are views of bytes and a checksum, and a connection's state is
//! that of a NAT, which stacks for hosts do not have. In the tests the guest is `smoltcp`, so that another's understanding of
//! the protocols is there too.
//!
//! The guest is hostile: everything that it can make the process keep is bounded (connections, bytes in each, sockets, frames), and what it
//! cannot reach is written down in one place (`user/addresses.rs`).

#![deny(unsafe_code)]

mod error;
mod helper;
mod limit;
mod spec;
mod tap;
#[cfg(not(any(test, feature = "fuzzing")))]
mod user;
#[cfg(any(test, feature = "fuzzing"))]
pub mod user;
pub mod wire;

/// Serves a guest at the other end of `link` on this thread, until that closes: what the network's process does.
///
/// # Errors
/// [`NetError`] for what the host does not give.
pub fn serve(link: Link, spec: &NetSpec) -> Result<(), NetError> {
    helper::serve(link, spec, |_| ())
}

pub use error::NetError;
pub use helper::{SUBCOMMAND, helper_main, start};
pub use ringfence_helper::{Helper, Link};
pub use spec::{Backend, Forward, MAX_QUEUES, NetSpec, NetSpecError, UserSpec};
pub use user::addresses::{DNS, DNS6, GATEWAY, GATEWAY6, GUEST};
