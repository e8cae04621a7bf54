//! What an image folder holds, recorded so that damage is noticed cheaply.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::cache::{CacheError, at_path, write_durably};
use crate::digest::Digest;

/// The manifest's name inside the image folder.
pub(crate) const FILE_NAME: &str = "manifest.json";

/// Raised whenever old manifests cannot be understood any more; such an image is fetched again.
const FORMAT: u32 = 1;

/// A manifest is a few KiB; more is damage.
const MAX_MANIFEST: u64 = 4 << 20;

/// A package that the image was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) sha256: String,
}

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Path inside the image folder.
    pub(crate) path: String,
    pub(crate) size: u64,
    /// Time of last change in nanoseconds since 1970; equal size and time mean that the hash is not checked again.
    pub(crate) changed_ns: i64,
    pub(crate) sha256: String,
}

/// The record of an image folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: u32,
    pub(crate) image: String,
    /// As `uname -r` prints it in the guest.
    pub(crate) kernel_release: String,
    /// Hash of what decides which files are fetched; a different one means: fetch again.
    pub(crate) contents_recipe: String,
    /// Hash of what decides the initial RAM disk; a different one means: build again from the files at hand.
    pub(crate) initrd_recipe: String,
    /// Names of the modules packed.
    pub(crate) modules: Vec<String>,
    pub(crate) origins: Vec<Origin>,
    pub(crate) files: Vec<Record>,
}

impl Manifest {
    pub(crate) fn new(image: &str, kernel_release: &str) -> Self {
        Self {
            format: FORMAT,
            image: image.to_owned(),
            kernel_release: kernel_release.to_owned(),
            contents_recipe: String::new(),
            initrd_recipe: String::new(),
            modules: Vec::new(),
            origins: Vec::new(),
            files: Vec::new(),
        }
    }

    /// The manifest in `folder`; `None` if there is none that this version can use.
    pub(crate) fn load(folder: &Path) -> Option<Self> {
        let file = fs::File::open(folder.join(FILE_NAME)).ok()?;
        let bytes = crate::decompress::read_at_most(file, MAX_MANIFEST).ok()?;
        let manifest: Self = serde_json::from_slice(&bytes).ok()?;
        let inside = |record: &Record| {
            let mut parts = Path::new(&record.path).components();
            !record.path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
        };
        (manifest.format == FORMAT && manifest.files.iter().all(inside)).then_some(manifest)
    }

    /// Writes it into `folder`, replacing an older one in one step.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), CacheError> {
        let path = folder.join(FILE_NAME);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| at_path("write", &path)(io::Error::other(error)))?;
        let fresh = folder.join(".manifest.new");
        write_durably(&fresh, &text)?;
        fs::rename(&fresh, &path).map_err(at_path("create", &path))
    }

    /// Records the file at `path` inside `folder` as it is now, in place of an older record of it.
    pub(crate) fn record(&mut self, folder: &Path, path: &str) -> Result<(), CacheError> {
        let full = folder.join(path);
        let (digest, size) = Digest::of_file(&full).map_err(at_path("read", &full))?;
        let changed_ns = changed_ns(&fs::metadata(&full).map_err(at_path("read", &full))?);
        let record = Record { path: path.to_owned(), size, changed_ns, sha256: digest.to_string() };
        match self.files.iter_mut().find(|old| old.path == path) {
            Some(old) => *old = record,
            None => self.files.push(record),
        }
        Ok(())
    }

    /// Is the recorded file at `path` still what it was? Compares size and time, and hashes only if the time differs
    /// or `thorough` is set.
    pub(crate) fn intact(&self, folder: &Path, path: &str, thorough: bool) -> bool {
        let Some(record) = self.files.iter().find(|record| record.path == path) else { return false };
        let full = folder.join(path);
        let Ok(metadata) = fs::symlink_metadata(&full) else { return false };
        if !metadata.is_file() || metadata.len() != record.size {
            return false;
        }
        (!thorough && changed_ns(&metadata) == record.changed_ns)
            || Digest::of_file(&full).is_ok_and(|(digest, _)| digest.to_string() == record.sha256)
    }

    /// Like [`Self::intact`], thoroughly, for every file whose path `select` accepts.
    pub(crate) fn all_intact(&self, folder: &Path, select: impl Fn(&str) -> bool) -> bool {
        self.files
            .iter()
            .filter(|record| select(&record.path))
            .all(|record| self.intact(folder, &record.path, true))
    }

    /// Bytes that the image takes on disk.
    pub(crate) fn size(&self) -> u64 {
        self.files.iter().fold(0, |sum, record| sum.saturating_add(record.size))
    }
}

fn changed_ns(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().wrapping_mul(1_000_000_000).wrapping_add(metadata.mtime_nsec())
}

#[cfg(test)]
mod tests;
