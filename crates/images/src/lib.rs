//! Guest images: where they come from, where they are kept, how they are built.
//!
//! An image is a kernel and an initial RAM disk. [`Catalogue`] knows the built-in ones by name and makes sure
//! that they are on disk: [`apt`] finds and fetches Debian packages through the host's own package manager,
//! [`deb`] unpacks them, [`modules`] picks kernel modules together with what they depend on, [`initramfs`]
//! packs everything with our own init into a [`cpio`] archive, and [`cache`] keeps the result so that the next
//! start needs a few file lookups only.
//!
//! Nothing here needs root, and nothing here changes the host's package state.

#![forbid(unsafe_code)]

pub mod apt;
pub mod cache;
pub mod catalogue;
pub mod cpio;
pub mod deb;
mod decompress;
pub mod digest;
pub mod initramfs;
mod manifest;
pub mod modules;
pub mod progress;
mod recipe;
#[cfg(test)]
mod testing;

pub use catalogue::{Catalogue, Image, ImageError, Listing};
pub use initramfs::command_archive;
pub use progress::{Progress, Quiet};
