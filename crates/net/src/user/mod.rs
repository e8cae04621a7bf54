//! The NAT in user mode: the guest's frames on one side, ordinary sockets of the host on the other.
//!
//! One thread, one `epoll`, no root. `serve` is the loop; `stack` sorts frames; `tcp` is a connection; datagrams and echo
//! requests have a connected socket for each pair of ends, so that only the end that was written to can answer.

pub(crate) mod addresses;
mod datagram;
mod dhcp;
mod fragments;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod neighbour;
pub(crate) mod outlet;
mod resolver;
mod ring;
mod serve;
pub(crate) mod stack;
mod tcp;
#[cfg(test)]
mod tests;

pub(crate) use serve::serve;
