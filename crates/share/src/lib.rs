//! A folder of the host for the guest.
//!
//! The guest's kernel speaks FUSE over a virtio device; the machine passes the requests, unread, over a link to a process of its own
//! ([`start`]), which alone has the folder open. There a [`Server`] answers them with ordinary system calls. The protocol is that of Linux'
//! `include/uapi/linux/fuse.h`, version 7.31 (so a guest of Linux 5.4 or later).
//!
//! # No way out
//! A guest names a file by the number of a node and at most one name below it. Every name is checked to be a single component that
//! is neither `.` nor `..`, and is opened by `openat` with `O_PATH | O_NOFOLLOW` at the folder's own descriptor. So no symbolic link is ever followed
//! here (the guest's kernel does that, in the guest's own tree), there is nothing to go up by, and no check that a rename could outrun:
//! whatever is opened was a child of a folder that was got in the same way. Data is reached through `/proc/self/fd`, that is, through the node and not
//! through a name. What somebody on the host moves out of the folder stays reachable for a guest that has it in use.
//!
//! # Who owns what
//! If root shares a folder, owners are the same on both sides. If an ordinary user does, files of that user and group are root's in the
//! guest, everybody else's are nobody's (65534), and what any user of the guest makes is the user's on the host, as in a user namespace. In either case
//! the set-user-ID and set-group-ID bits never get onto a file, and no device node is made; so nothing a guest leaves gives rights on the host.
//!
//! # Bounds
//! Nodes are remembered until the guest forgets them; their number is bounded ([`nodes`]), and only as many have a descriptor as the host allows:
//! the others are opened again by where they were seen last, if that is still the same file. Open files are bounded too, and every length that a guest gives.

#![forbid(unsafe_code)]

mod attr;
mod error;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod helper;
mod nodes;
mod owner;
mod server;
mod spec;
#[cfg(test)]
mod tests;
mod wire;

pub use error::ShareError;
pub use helper::{HEAD, NUMBER, SUBCOMMAND, helper_main, serve, start};
pub use ringfence_helper::{Helper, Link};
pub use server::Server;
pub use spec::{ShareSpec, ShareSpecError};
pub use wire::{MAX_ANSWER, MAX_REQUEST, failure};
