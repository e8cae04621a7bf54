//! A guest that speaks FUSE, and what the host sees of it.

mod client;
mod escapes;
mod files;
mod hostile;
