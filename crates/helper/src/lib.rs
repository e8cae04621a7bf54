//! The processes that a machine has beside its own: who has sockets, or folders of the host, is not who runs the guest.
//!
//! Such a process is our own program again, by a hidden subcommand, with one end of a [`Link`] as its standard input and nothing else
//! of the machine's ([`Helper`]). It says whether it has what it needs, serves the link, and ends with it ([`helper_main`]). What crosses the
//! link is the business of those who use this: the network, shared folders, vsock.
//!
//! Messages cross by a pair of sockets, or, for who moves many (the network), by two rings in memory that both processes have mapped.
//! Neither side trusts the other with either: see `ring.rs` for what that means where memory is shared.

#![forbid(unsafe_code)]

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod link;
mod process;
mod ring;
mod rings;
mod socket;

pub use link::Link;
pub use process::{Helper, HelperError, Ready, helper_main};
pub use ring::RingError;
pub use socket::listen;
