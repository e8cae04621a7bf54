//! The built-in images: which packages they are made of, and how their folder is made.

use std::fs;
use std::path::Path;

use crate::apt::{Apt, AptError, Dependency, Package, Version};
use crate::cache::{at_path, write_durably};
use crate::catalogue::ImageError;
use crate::deb;
use crate::digest::Digest;
use crate::initramfs::{self, Initramfs};
use crate::manifest::{Manifest, Origin};
use crate::modules::{ModuleTree, Selection};
use crate::progress::Progress;

/// Files of an image folder.
pub(crate) const KERNEL: &str = "vmlinuz";
pub(crate) const INITRD: &str = "initrd";
const BUSYBOX: &str = "busybox";
/// Folder of the kept modules, laid out as below `/lib/modules/RELEASE`.
const MODULES: &str = "modules";

/// A built-in image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    /// Kernel version wanted, such as `6.12`; `None` takes what the host's release offers.
    pub(crate) series: Option<&'static str>,
    /// Kernel command line that the image wants.
    pub(crate) append: &'static str,
}

/// All built-in images; the first is the default.
pub(crate) const RECIPES: &[Recipe] = &[
    Recipe {
        name: "shell",
        description: "A shell in memory: the release's cloud kernel and busybox",
        series: None,
        append: "console=ttyS0",
    },
    Recipe {
        name: "shell:6.12",
        description: "The same with Linux 6.12, from the release's backports if need be",
        series: Some("6.12"),
        append: "console=ttyS0",
    },
];

/// Packages that lead to the kernel for virtual machines: Debian's name and Ubuntu's.
const KERNEL_PACKAGES: &[&str] = &["linux-image-cloud-amd64", "linux-image-virtual"];
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Modules packed into the image, as far as the kernel has them and they are not built in.
const MODULE_NAMES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "nvme",
    "ext4",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "isofs",
    "squashfs",
    "overlay",
    "fuse",
    "loop",
    "dm_mod",
    "tun",
    "veth",
    "dummy",
    "zram",
];

/// Changes whenever other files have to be fetched for an image.
pub(crate) fn contents_fingerprint(recipe: &Recipe) -> String {
    Digest::of(format!("{:?}{KERNEL_PACKAGES:?}{BUSYBOX_PACKAGE}{MODULE_NAMES:?}", recipe.series).as_bytes())
        .to_string()
}

/// Changes whenever the initial RAM disk has to be built again.
pub(crate) fn initrd_fingerprint() -> String {
    // The version stands for the code that writes the archive.
    Digest::of(format!("{}{}", env!("CARGO_PKG_VERSION"), initramfs::recipe_text()).as_bytes()).to_string()
}

/// The packages that the image is made of: those with the kernel, then busybox.
pub(crate) fn resolve(
    apt: &mut Apt,
    recipe: &Recipe,
    progress: &mut dyn Progress,
) -> Result<Vec<Package>, ImageError> {
    let version = recipe.series.map_or(Version::Candidate, Version::Series);
    let mut first_refusal = None;
    for name in KERNEL_PACKAGES {
        match apt.find(name, version, progress) {
            Ok(meta) => {
                let mut packages = kernel_packages(apt, &meta, progress)?;
                packages.push(apt.find(BUSYBOX_PACKAGE, Version::Candidate, progress)?);
                return Ok(packages);
            }
            Err(refusal @ AptError::NotFound { .. }) => first_refusal = first_refusal.or(Some(refusal)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(first_refusal.map_or(ImageError::NoKernel { image: recipe.name }, ImageError::Apt))
}

/// The packages with kernel and modules that a package without contents of its own leads to.
fn kernel_packages(
    apt: &mut Apt,
    meta: &Package,
    progress: &mut dyn Progress,
) -> Result<Vec<Package>, AptError> {
    let mut packages: Vec<Package> = Vec::new();
    let mut open: Vec<Dependency> = meta.depends.clone();
    while let Some(dependency) = open.pop() {
        if !is_kernel_part(&dependency.name) || packages.iter().any(|package| package.name == dependency.name)
        {
            continue;
        }
        let version = dependency.exact.as_deref().map_or(Version::Candidate, Version::Exact);
        let package = apt.find(&dependency.name, version, progress)?;
        open.extend(package.depends.iter().cloned());
        packages.push(package);
    }
    Ok(packages)
}

/// `linux-image-6.1.0-56-cloud-amd64`, and where modules have a package of their own, `linux-modules-6.8.0-31-generic`.
fn is_kernel_part(name: &str) -> bool {
    ["linux-image-", "linux-modules-"]
        .iter()
        .filter_map(|prefix| name.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// Fetches and unpacks the packages, and makes the image folder `ready` in `scratch`.
pub(crate) fn make(
    apt: &Apt,
    recipe: &Recipe,
    packages: &[Package],
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<std::path::PathBuf, ImageError> {
    let unpacked = scratch.join("unpacked");
    let ready = scratch.join("ready");
    for folder in [&unpacked, &ready] {
        fs::create_dir(folder).map_err(at_path("create", folder))?;
    }
    let mut release = None;
    for (index, package) in packages.iter().enumerate() {
        let folder = scratch.join(format!("package-{index}"));
        fs::create_dir(&folder).map_err(at_path("create", &folder))?;
        let file = apt.download(package, &folder, progress)?;
        progress.step(&format!("Unpacking {}", package.name), Some(package.size));
        deb::unpack(&file, &unpacked, &mut |path| place(path, &mut release), &mut |done| {
            progress.advance(done)
        })?;
        fs::remove_dir_all(&folder).map_err(at_path("remove", &folder))?;
    }
    let Some(release) = release else { return Err(ImageError::NoKernel { image: recipe.name }) };

    progress.step("Building the initial RAM disk", None);
    let keep = |name: &str| -> Result<Vec<u8>, ImageError> {
        let from = unpacked.join(name);
        let bytes = fs::read(&from).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                ImageError::MissingFile { image: recipe.name, file: name.to_owned() }
            }
            _ => ImageError::Cache(at_path("read", &from)(error)),
        })?;
        write_durably(&ready.join(name), &bytes)?;
        Ok(bytes)
    };
    keep(KERNEL)?;
    let busybox = keep(BUSYBOX)?;
    let tree = ModuleTree::open(&unpacked.join(MODULES))?;
    let selection = tree.select(MODULE_NAMES)?;

    let mut manifest = Manifest::new(recipe.name, &release);
    manifest.contents_recipe = contents_fingerprint(recipe);
    manifest.initrd_recipe = initrd_fingerprint();
    manifest.modules = selection.modules.iter().map(|module| module.name.clone()).collect();
    manifest.origins = packages.iter().map(origin).collect();
    for name in [KERNEL, BUSYBOX] {
        manifest.record(&ready, name)?;
    }
    for module in &selection.modules {
        let path = format!("{MODULES}/{}", module.path);
        let full = ready.join(&path);
        if let Some(folder) = full.parent() {
            fs::create_dir_all(folder).map_err(at_path("create", folder))?;
        }
        write_durably(&full, &module.contents)?;
        manifest.record(&ready, &path)?;
    }
    write_durably(&ready.join(INITRD), &initrd(busybox, &release, &selection)?)?;
    manifest.record(&ready, INITRD)?;
    manifest.store(&ready)?;
    Ok(ready)
}

/// Builds the initial RAM disk of an image folder again, from the busybox and modules in it.
pub(crate) fn rebuild_initrd(
    folder: &Path,
    manifest: &mut Manifest,
    scratch: &Path,
) -> Result<(), ImageError> {
    let busybox = folder.join(BUSYBOX);
    let busybox = fs::read(&busybox).map_err(at_path("read", &busybox))?;
    // What was missing in the kernel's own folder is missing here: only what was selected then is kept.
    let selection = ModuleTree::open(&folder.join(MODULES))?.select(&manifest.modules)?;
    let fresh = scratch.join(INITRD);
    write_durably(&fresh, &initrd(busybox, &manifest.kernel_release, &selection)?)?;
    let target = folder.join(INITRD);
    fs::rename(&fresh, &target).map_err(at_path("create", &target))?;
    manifest.record(folder, INITRD)?;
    manifest.initrd_recipe = initrd_fingerprint();
    manifest.store(folder)?;
    Ok(())
}

fn initrd(busybox: Vec<u8>, release: &str, selection: &Selection) -> Result<Vec<u8>, ImageError> {
    let mut archive = Initramfs::shell(busybox)?;
    archive.modules::<&str>(release, selection, &[])?;
    Ok(archive.build()?)
}

pub(crate) fn origin(package: &Package) -> Origin {
    Origin {
        package: package.name.clone(),
        version: package.version.clone(),
        sha256: package.sha256.to_string(),
    }
}

/// Where a package's file goes in the scratch folder. Newer packages have everything below `usr`.
fn place(path: &str, release: &mut Option<String>) -> Option<String> {
    let path = path.strip_prefix("usr/").unwrap_or(path);
    if let Some(version) = path.strip_prefix("boot/vmlinuz-") {
        *release = Some(version.to_owned());
        return Some(KERNEL.to_owned());
    }
    if path == "bin/busybox" {
        return Some(BUSYBOX.to_owned());
    }
    let (_release, file) = path.strip_prefix("lib/modules/")?.split_once('/')?;
    let wanted = file == "modules.builtin" || file.starts_with("kernel/");
    wanted.then(|| format!("{MODULES}/{file}"))
}

#[cfg(test)]
mod tests;
