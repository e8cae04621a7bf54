//! Images of our own making and of QEMU's, whole, damaged and hostile. Where `qemu-img` is missing the tests that need
//! it say so and do nothing.

mod chains;
mod hostile;
mod model;
mod order;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::{DiskFormat, DiskOptions, open};

const MIB: u64 = 1 << 20;

/// A folder with images that vanishes.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of our own.
    fn create(&self, name: &str, size: u64) -> PathBuf {
        let new =
            NewImage { path: self.path(name), format: DiskFormat::Qcow2, size: Some(size), backing: None };
        assert_eq!(create(&new).unwrap(), size);
        new.path
    }

    /// An overlay on an image in the same folder.
    fn overlay(&self, name: &str, below: &str, format: DiskFormat) -> PathBuf {
        let backing = Some((below.into(), format));
        let new = NewImage { path: self.path(name), format: DiskFormat::Qcow2, size: None, backing };
        create(&new).unwrap();
        new.path
    }

    fn spec(&self, name: &str, options: &str) -> DiskSpec {
        format!("{},format=qcow2{options}", self.path(name).display()).parse().unwrap()
    }

    fn open(&self, name: &str, options: &str) -> Arc<dyn BlockDevice> {
        open(&DiskOptions::new(self.spec(name, options))).unwrap()
    }

    /// Why an image cannot be opened.
    fn refused(&self, name: &str, options: &str) -> String {
        open(&DiskOptions::new(self.spec(name, options))).unwrap_err().to_string()
    }
}

/// `qemu-img` with arguments, which must succeed. `None`, and why, where there is none.
fn qemu_img(arguments: &[&str], paths: &[&Path]) -> Option<String> {
    let output = match Command::new("qemu-img").args(arguments).args(paths).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: qemu-img cannot be run ({error}); install qemu-utils");
            return None;
        }
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{arguments:?}: {} {}", text(&output.stdout), text(&output.stderr));
    Some(text(&output.stdout))
}

/// Whether QEMU finds nothing wrong with an image: neither damage nor clusters that are taken and not used.
fn is_clean(path: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2"], &[path]);
}

/// The bytes of a disk as QEMU reads them, if it is there.
fn as_raw(folder: &Folder, path: &Path) -> Option<Vec<u8>> {
    let raw = folder.path("as-raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[path, &raw])?;
    Some(std::fs::read(raw).unwrap())
}
