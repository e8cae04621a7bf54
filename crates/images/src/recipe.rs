//! The built-in images: which packages they are made of, and how the folder of one in memory is made. Those with a
//! disk are made in [`disk`].

pub(crate) mod disk;

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{Apt, AptError, Architecture, Dependency, Package, Version};
use crate::cache::{at_path, write_durably};
use crate::catalogue::ImageError;
use crate::deb;
use crate::digest::Digest;
use crate::initramfs::{self, Initramfs};
use crate::manifest::{Manifest, Origin};
use crate::modules::{ModuleTree, Selection};
use crate::progress::Progress;
use crate::rootfs;

/// Files of an image folder.
pub(crate) const KERNEL: &str = "vmlinuz";
pub(crate) const INITRD: &str = "initrd";
pub(crate) const ROOT_DISK: &str = "root.ext4";
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
    /// Whose packages it is made of.
    pub(crate) architecture: Architecture,
    /// Kernel command line that the image wants.
    pub(crate) append: &'static str,
    /// What the guest's files are.
    pub(crate) contents: Contents,
}

impl Recipe {
    /// Has it a disk instead of an initial RAM disk?
    pub(crate) fn on_disk(&self) -> bool {
        matches!(self.contents, Contents::Disk { .. })
    }
}

/// What an image's files are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Contents {
    /// Busybox and modules in an initial RAM disk.
    Memory,
    /// A root file system on a disk of `size` bytes, of these packages and what they need.
    Disk { packages: &'static [&'static [&'static str]], size: u64 },
}

/// All built-in images; the first is the default.
pub(crate) const RECIPES: &[Recipe] = &[
    Recipe {
        name: "shell",
        description: "A shell in memory: the release's cloud kernel and busybox",
        series: None,
        architecture: Architecture::Amd64,
        append: "console=ttyS0",
        contents: Contents::Memory,
    },
    Recipe {
        name: "shell:6.12",
        description: "The same with Linux 6.12, from the release's backports if need be",
        series: Some("6.12"),
        architecture: Architecture::Amd64,
        append: "console=ttyS0",
        contents: Contents::Memory,
    },
    Recipe {
        name: "shell:i386",
        description: "The same for i386, 32 bits: Debian 12's kernel with PAE and busybox",
        series: None,
        architecture: Architecture::I386,
        append: "console=ttyS0",
        contents: Contents::Memory,
    },
    Recipe {
        name: "debian",
        description: "Debian on a disk: the release's base system, what is written vanishes with the machine",
        series: None,
        architecture: Architecture::Amd64,
        append: DISK_APPEND,
        contents: Contents::Disk { packages: &[BASE_PACKAGES], size: 1 << 30 },
    },
    Recipe {
        name: "debian:dev",
        description: "The same with gcc, Python, Perl, SQLite, OpenSSL; what `bench engines` runs",
        series: None,
        architecture: Architecture::Amd64,
        append: DISK_APPEND,
        contents: Contents::Disk { packages: &[BASE_PACKAGES, DEVELOPMENT_PACKAGES], size: 2 << 30 },
    },
    Recipe {
        name: "debian:io",
        description: "The same base with fio, iperf3 and qperf; what `bench devices` runs",
        series: None,
        architecture: Architecture::Amd64,
        append: DISK_APPEND,
        contents: Contents::Disk { packages: &[BASE_PACKAGES, TRANSFER_PACKAGES], size: 2 << 30 },
    },
];

/// The disk is the first; nothing else has to be found or loaded for it.
const DISK_APPEND: &str = "root=/dev/nvme0n1 rootfstype=ext4 rw console=ttyS0";

/// What a Debian without services has. Each brings what it needs.
const BASE_PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    // Asks for a network address.
    "busybox-static",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "e2fsprogs",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "kmod",
    "less",
    "libc-bin",
    "login",
    "mawk",
    "mount",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "procps",
    "sed",
    "tar",
    // Otherwise a package with a large Perl is chosen, whose only work is already done here.
    "usr-is-merged",
    "util-linux",
];

const DEVELOPMENT_PACKAGES: &[&str] = &[
    "bc",
    "bzip2",
    "file",
    "gawk",
    "gcc",
    "libc6-dev",
    "make",
    "openssl",
    "perl",
    "python3",
    "sqlite3",
    "xz-utils",
    "zstd",
];

/// What measures disks and networks.
const TRANSFER_PACKAGES: &[&str] = &["fio", "iperf3", "qperf"];

/// Packages that lead to the kernel: of those for virtual machines Debian's name and Ubuntu's; for i386 there are none such.
fn kernel_names(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Amd64 => &["linux-image-cloud-amd64", "linux-image-virtual"],
        Architecture::I386 => &["linux-image-686-pae"],
    }
}

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
    // The power button, and the way to read it.
    "button",
    "evdev",
    // What tells the host of a panic, and the watchdog.
    "pvpanic_mmio",
    "wdat_wdt",
    "tun",
    "veth",
    "dummy",
    "zram",
];

/// What a kernel for all sorts of machines has as modules besides those, and the ones for virtual machines have built in.
const GENERAL_MODULE_NAMES: &[&str] = &[
    // ext4 asks the kernel's cryptography for it, not for a module.
    "crc32c_generic",
];

/// What such a kernel loads at the start, whatever there is in the machine: drivers of disks are found by nobody else.
fn loaded_at_start(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Amd64 => &[],
        Architecture::I386 => &["nvme"],
    }
}

fn module_names(architecture: Architecture) -> Vec<&'static str> {
    match architecture {
        Architecture::Amd64 => MODULE_NAMES.to_vec(),
        Architecture::I386 => [MODULE_NAMES, GENERAL_MODULE_NAMES].concat(),
    }
}

/// Changes whenever other files have to be fetched for an image.
pub(crate) fn contents_fingerprint(recipe: &Recipe) -> String {
    let (kernels, modules) = (kernel_names(recipe.architecture), module_names(recipe.architecture));
    let mut text = format!("{:?}{kernels:?}{BUSYBOX_PACKAGE}{modules:?}", recipe.series);
    for name in loaded_at_start(recipe.architecture) {
        text.push_str(name);
    }
    if let Contents::Disk { packages, size } = recipe.contents {
        // A disk is always made anew as a whole. The version stands for the code that does it.
        let version = env!("CARGO_PKG_VERSION");
        text.push_str(&format!("{packages:?}{size}{version}{}", rootfs::debian::recipe_text()));
    }
    Digest::of(text.as_bytes()).to_string()
}

/// Changes whenever the initial RAM disk has to be built again.
pub(crate) fn initrd_fingerprint() -> String {
    // The version stands for the code that writes the archive.
    Digest::of(format!("{}{}", env!("CARGO_PKG_VERSION"), initramfs::recipe_text()).as_bytes()).to_string()
}

/// The packages that the image is made of: those with the kernel, then busybox or the root's.
pub(crate) fn resolve(
    apt: &mut Apt,
    recipe: &Recipe,
    progress: &mut dyn Progress,
) -> Result<Vec<Package>, ImageError> {
    let version = recipe.series.map_or(Version::Candidate, Version::Series);
    let mut first_refusal = None;
    for name in kernel_names(recipe.architecture) {
        match apt.find(name, version, progress) {
            Ok(meta) => {
                let mut packages = kernel_packages(apt, &meta, progress)?;
                match recipe.contents {
                    Contents::Memory => {
                        packages.push(apt.find(BUSYBOX_PACKAGE, Version::Candidate, progress)?);
                    }
                    Contents::Disk { packages: names, .. } => {
                        packages.extend(apt.closure(&names.concat(), progress)?);
                    }
                }
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

/// Kernel, modules and busybox, unpacked into a folder.
struct Unpacked {
    folder: PathBuf,
    /// As `uname -r` prints it in the guest.
    release: String,
}

impl Unpacked {
    /// Fetches packages one by one and takes out what is wanted of them.
    fn fetch(
        apt: &Apt,
        recipe: &Recipe,
        packages: &[&Package],
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Self, ImageError> {
        let unpacked = scratch.join("unpacked");
        fs::create_dir(&unpacked).map_err(at_path("create", &unpacked))?;
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
        let release = release.ok_or(ImageError::NoKernel { image: recipe.name })?;
        Ok(Self { folder: unpacked, release })
    }

    /// Copies one of the files into an image folder.
    fn keep(&self, recipe: &Recipe, name: &str, ready: &Path) -> Result<Vec<u8>, ImageError> {
        let from = self.folder.join(name);
        let bytes = fs::read(&from).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                ImageError::MissingFile { image: recipe.name, file: name.to_owned() }
            }
            _ => ImageError::Cache(at_path("read", &from)(error)),
        })?;
        write_durably(&ready.join(name), &bytes)?;
        Ok(bytes)
    }

    fn modules(&self, recipe: &Recipe) -> Result<Selection, ImageError> {
        Ok(ModuleTree::open(&self.folder.join(MODULES))?.select(module_names(recipe.architecture))?)
    }

    /// A manifest of the image, without files yet.
    fn manifest(&self, recipe: &Recipe, packages: &[Package], selection: &Selection) -> Manifest {
        let mut manifest = Manifest::new(recipe.name, &self.release);
        manifest.contents_recipe = contents_fingerprint(recipe);
        manifest.modules = selection.modules.iter().map(|module| module.name.clone()).collect();
        manifest.origins = packages.iter().map(origin).collect();
        manifest
    }
}

/// Fetches and unpacks the packages, and makes the image folder `ready` in `scratch`.
pub(crate) fn make(
    apt: &Apt,
    recipe: &Recipe,
    packages: &[Package],
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ImageError> {
    let ready = scratch.join("ready");
    fs::create_dir(&ready).map_err(at_path("create", &ready))?;
    let unpacked = Unpacked::fetch(apt, recipe, &packages.iter().collect::<Vec<_>>(), scratch, progress)?;

    progress.step("Building the initial RAM disk", None);
    unpacked.keep(recipe, KERNEL, &ready)?;
    let busybox = unpacked.keep(recipe, BUSYBOX, &ready)?;
    let selection = unpacked.modules(recipe)?;

    let mut manifest = unpacked.manifest(recipe, packages, &selection);
    manifest.initrd_recipe = initrd_fingerprint();
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
    write_durably(&ready.join(INITRD), &initrd(recipe, busybox, &unpacked.release, &selection)?)?;
    manifest.record(&ready, INITRD)?;
    manifest.store(&ready)?;
    Ok(ready)
}

/// Builds the initial RAM disk of an image folder again, from the busybox and modules in it.
pub(crate) fn rebuild_initrd(
    recipe: &Recipe,
    folder: &Path,
    manifest: &mut Manifest,
    scratch: &Path,
) -> Result<(), ImageError> {
    let busybox = folder.join(BUSYBOX);
    let busybox = fs::read(&busybox).map_err(at_path("read", &busybox))?;
    // What was missing in the kernel's own folder is missing here: only what was selected then is kept.
    let selection = ModuleTree::open(&folder.join(MODULES))?.select(&manifest.modules)?;
    let fresh = scratch.join(INITRD);
    write_durably(&fresh, &initrd(recipe, busybox, &manifest.kernel_release, &selection)?)?;
    let target = folder.join(INITRD);
    fs::rename(&fresh, &target).map_err(at_path("create", &target))?;
    manifest.record(folder, INITRD)?;
    manifest.initrd_recipe = initrd_fingerprint();
    manifest.store(folder)?;
    Ok(())
}

fn initrd(
    recipe: &Recipe,
    busybox: Vec<u8>,
    release: &str,
    selection: &Selection,
) -> Result<Vec<u8>, ImageError> {
    let mut archive = Initramfs::shell(busybox)?;
    archive.modules(release, selection, loaded_at_start(recipe.architecture))?;
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
