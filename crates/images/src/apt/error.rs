//! Why packages cannot be had.

use std::path::PathBuf;

use crate::cache::CacheError;

/// Why packages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// The host is no Debian.
    #[error(
        "`{0}` is not on this host, so the built-in images cannot be fetched; give a kernel and an initial RAM disk of \
         your own with `--kernel FILE --initrd FILE`"
    )]
    Missing(&'static str),
    /// The mirror does not answer.
    #[error(
        "the host's package sources cannot be reached; check the network, the proxy (`http_proxy`) and \
         /etc/apt/sources.list, or give `--kernel FILE --initrd FILE`. apt said:\n{0}"
    )]
    Unreachable(String),
    /// No source has it.
    #[error(
        "the package `{name}`{wanted} is in none of the host's package sources{hint}; add a source that has it to \
         /etc/apt/sources.list, or give `--kernel FILE --initrd FILE`"
    )]
    NotFound {
        /// The package.
        name: String,
        /// The version asked for, in words.
        wanted: String,
        /// Versions that do exist, in words.
        hint: String,
    },
    /// The fetched file is not the one in the lists.
    #[error(
        "the package file of `{name}` {version} does not match the signed package list (wanted {wanted}, got {got}); a \
         proxy or mirror changed it. Try again, or use another mirror"
    )]
    HashMismatch {
        /// The package.
        name: String,
        /// Its version.
        version: String,
        /// Size and SHA-256 in the list.
        wanted: String,
        /// Size and SHA-256 of the file.
        got: String,
    },
    /// apt ran out of room.
    #[error(
        "no space left for packages in `{folder}`; free some or set RINGFENCE_CACHE to a folder on another disk"
    )]
    DiskFull {
        /// Where apt was writing.
        folder: PathBuf,
    },
    /// Something else.
    #[error("`{tool}` failed. It said:\n{details}")]
    Failed {
        /// The program.
        tool: &'static str,
        /// The end of what it printed.
        details: String,
    },
    /// A file of ours.
    #[error(transparent)]
    Store(#[from] CacheError),
}
