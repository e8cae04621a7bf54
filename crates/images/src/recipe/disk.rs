//! How the folder of an image with a disk is made: kernel and root file system.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Contents, KERNEL, ROOT_DISK, Recipe, Unpacked, is_kernel_part};
use crate::apt::{Apt, Package};
use crate::cache::at_path;
use crate::catalogue::ImageError;
use crate::progress::Progress;
use crate::rootfs::ext4::Ext4;
use crate::rootfs::tools::Tools;
use crate::rootfs::{self, Tree, debian};

/// Fetches and unpacks the packages, and makes the image folder `ready` in `scratch`.
pub(crate) fn make(
    apt: &Apt,
    recipe: &Recipe,
    packages: &[Package],
    tools: &Tools,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ImageError> {
    let Contents::Disk { size, .. } = recipe.contents else {
        return Err(ImageError::MissingFile { image: recipe.name, file: ROOT_DISK.to_owned() });
    };
    // Before anything is fetched in vain.
    let ext4 = Ext4::new(tools)?;
    let new_folder = |name: &str| {
        let folder = scratch.join(name);
        fs::create_dir(&folder).map_err(at_path("create", &folder)).map(|()| folder)
    };
    let ready = new_folder("ready")?;
    let (kernel, root): (Vec<&Package>, Vec<&Package>) =
        packages.iter().partition(|package| is_kernel_part(&package.name));
    let unpacked = Unpacked::fetch(apt, recipe, &kernel, scratch, progress)?;
    unpacked.keep(recipe, KERNEL, &ready)?;
    let selection = unpacked.modules(recipe)?;

    let root: Vec<Package> = root.into_iter().cloned().collect();
    let downloads = new_folder("packages")?;
    let files = apt.download_all(&root, &downloads, progress)?;
    let mut tree = Tree::new(&new_folder("root")?);
    debian::prepare(&mut tree)?;
    let total = root.iter().fold(0_u64, |sum, package| sum.saturating_add(package.size));
    progress.step(&format!("Unpacking {} packages", root.len()), Some(total));
    let mut before = 0;
    for (file, package) in files.iter().zip(&root) {
        rootfs::unpack(file, &mut tree, &mut |done| progress.advance(before + done))?;
        before += package.size;
        progress.advance(before);
        fs::remove_file(file).map_err(at_path("remove", file))?;
    }
    progress.step("Building the disk", None);
    debian::configure(&mut tree)?;
    debian::add_modules(&mut tree, &unpacked.release, &selection)?;
    tree.make_links()?;
    debian::index(&mut tree, &unpacked.release, tools)?;
    tree.seal()?;
    ext4.make(&tree, &ready.join(ROOT_DISK), size, scratch)?;

    let mut manifest = unpacked.manifest(recipe, packages, &selection);
    for name in [KERNEL, ROOT_DISK] {
        manifest.record(&ready, name)?;
    }
    manifest.store(&ready)?;
    Ok(ready)
}
