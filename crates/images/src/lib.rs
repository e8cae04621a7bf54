//! Guest images: where they come from, where they are kept, how they are built.
//!
//! An image is a kernel and either an initial RAM disk or a disk with a root file system. [`Catalogue`] knows the
//! built-in ones by name and makes sure that they are on disk: [`apt`] finds and fetches Debian packages through the
//! host's own package manager, [`deb`] unpacks them, [`modules`] picks kernel modules together with what they depend
//! on. [`initramfs`] packs everything with our own init into a [`cpio`] archive, [`rootfs`] into an ext4 image with
//! `mke2fs`; [`cache`] keeps the result so that the next start needs a few file lookups only. [`command`] hands a
//! command to either. Empty disks come from the crate that knows their formats: [`create_disk`].
//!
//! Nothing here needs root, and nothing here changes the host's package state.

#![forbid(unsafe_code)]

pub mod apt;
pub mod cache;
pub mod catalogue;
pub mod command;
pub mod cpio;
pub mod deb;
mod decompress;
pub mod digest;
pub mod initramfs;
mod manifest;
pub mod modules;
pub mod progress;
mod recipe;
mod rootfs;
#[cfg(test)]
mod testing;

pub use catalogue::{Catalogue, Image, ImageError, Listing};
pub use command::{CommandTooLong, command_archive, command_word};
pub use progress::{Progress, Quiet};
pub use ringfence_disk::{CreateError, NewImage, create as create_disk};
