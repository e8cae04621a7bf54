//! A guest made of packets, and programs of the host.

mod guest;
mod hostile;
mod life;
