//! The processes that a machine has beside its own: who has sockets, or folders of the host, is not who runs the guest.
//!
//! Such a process is our own program again, by a hidden subcommand, with one end of a [`Link`] as its standard input and nothing else
//! of the machine's ([`Helper`]). It says whether it has what it needs, serves the link, and ends with it ([`helper_main`]). What crosses the
//! link is the business of those who use this: the network, shared folders, vsock.

#![forbid(unsafe_code)]

mod link;
mod process;
mod socket;

pub use link::Link;
pub use process::{Helper, HelperError, Ready, helper_main};
pub use socket::listen;
