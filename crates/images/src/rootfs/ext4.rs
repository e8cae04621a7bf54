//! Packs a tree into an ext4 image, by e2fsprogs.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use super::tools::{Tools, run};
use super::{RootError, Tree};
use crate::cache::at_path;

const PACKAGE: &str = "e2fsprogs";

/// Features of the file system, spelt out so that the image does not depend on the host's defaults: newer ones than
/// the guest's kernel knows would keep it from booting.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// The programs needed.
#[derive(Debug)]
pub(crate) struct Ext4 {
    mke2fs: PathBuf,
    debugfs: PathBuf,
}

impl Ext4 {
    /// Finds the programs, before anything is fetched in vain.
    pub(crate) fn new(tools: &Tools) -> Result<Self, RootError> {
        Ok(Self { mke2fs: tools.require("mke2fs", PACKAGE)?, debugfs: tools.require("debugfs", PACKAGE)? })
    }

    /// Makes the image `image` of `size` bytes from the sealed tree. What the image does not use takes no room on disk.
    pub(crate) fn make(&self, tree: &Tree, image: &Path, size: u64, scratch: &Path) -> Result<(), RootError> {
        let file = fs::File::create_new(image).map_err(at_path("create", image))?;
        file.set_len(size).map_err(at_path("create", image))?;
        // Inode tables are made now: a guest that did it in the background would disturb whatever is measured there.
        let fixed = [
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-I",
            "256",
            "-m",
            "0",
            "-L",
            "ringfence",
            "-O",
            FEATURES,
        ];
        let mut arguments: Vec<OsString> = fixed.map(OsString::from).into();
        arguments.extend(
            ["-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", "-d"].map(OsString::from),
        );
        arguments.push(tree.folder().into());
        arguments.push(image.into());
        // The host's own configuration plays no part.
        run("mke2fs", &self.mke2fs, &arguments, &[("MKE2FS_CONFIG", "/dev/null")])?;
        self.set_owners(tree, image, &scratch.join("owners"))?;
        file.sync_all().map_err(at_path("write", image))?;
        Ok(())
    }

    /// An ordinary user owns all that it unpacks, whatever the packages say; the image is told afterwards.
    fn set_owners(&self, tree: &Tree, image: &Path, script: &Path) -> Result<(), RootError> {
        let mut text = String::new();
        for (path, uid, gid) in tree.strangers()? {
            if path.contains(['"', '\n', '\r', '\\']) {
                return Err(RootError::OddName(path.to_owned()));
            }
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "set_inode_field \"/{path}\" uid {uid}\nset_inode_field \"/{path}\" gid {gid}"
            );
        }
        if text.is_empty() {
            return Ok(());
        }
        fs::write(script, text).map_err(at_path("write", script))?;
        let arguments = [OsString::from("-w"), "-f".into(), script.into(), image.into()];
        let said = run("debugfs", &self.debugfs, &arguments, &[])?;
        // It ends well whatever became of the single commands. Its first line is its version.
        let complaints: Vec<&str> =
            said.lines().filter(|line| !line.starts_with("debugfs ")).take(8).collect();
        if complaints.is_empty() {
            return Ok(());
        }
        Err(RootError::Tool { tool: "debugfs", details: complaints.join("\n") })
    }
}
