//! A root file system on a disk image, made from Debian packages without root and without running any of them.
//!
//! [`unpack()`] lays packages out in a [`Tree`]: a folder on the host that holds files and folders, and a record of
//! what such a folder cannot hold for an ordinary user, the owners. Links are made last, so nothing that is
//! unpacked ever follows one on the host. [`debian`] adds what the packages' own install scripts would have made: the links of
//! a merged `/usr`, accounts, default programs; and an init. [`ext4`] packs the tree with e2fsprogs.

pub(crate) mod debian;
pub(crate) mod ext4;
pub(crate) mod tools;
mod tree;
mod unpack;

pub(crate) use tree::{Meta, Tree};
pub(crate) use unpack::unpack;

use std::path::PathBuf;

use crate::cache::CacheError;
use crate::deb::DebError;

/// Why a root file system cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A program of the host is missing.
    #[error(
        "`{tool}` is not on this host, and an image with a disk needs it; install the package `{package}`"
    )]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program of the host did not do its work.
    #[error("`{tool}` failed. It said:\n{details}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// The end of what it said.
        details: String,
    },
    /// Links that lead to each other.
    #[error("the links at `{0}` in the packages lead round in a circle")]
    LinkLoop(String),
    /// Something else is in the place of a folder.
    #[error("the packages have both a file and a folder at `{0}`")]
    NotAFolder(String),
    /// A hard link to nothing.
    #[error("the packages have a hard link `{path}` to `{target}`, which is no file of theirs")]
    NoTarget {
        /// The link.
        path: String,
        /// What it should lead to.
        target: String,
    },
    /// A name that cannot be handed on.
    #[error("the packages have a file with the odd name `{}`", .0.escape_debug())]
    OddName(String),
    /// A file that has to be there is not.
    #[error("the packages hold no `{0}`")]
    MissingFile(PathBuf),
    /// A package cannot be unpacked.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// A file of ours.
    #[error(transparent)]
    Store(#[from] CacheError),
}
