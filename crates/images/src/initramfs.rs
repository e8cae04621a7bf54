//! Builds the initial RAM disk: busybox, our init, kernel modules, and whatever a caller adds.
//!
//! The archive is not compressed: the host has the memory anyway, and unpacking in the guest is slow.

use std::collections::BTreeMap;

use crate::cpio::{self, CpioError, DeviceKind, Writer};
use crate::modules::Selection;

/// Paths of modules to load in any case, in order, one in a line.
const LOAD_LIST: &str = "etc/ringfence/modules";

const INIT: &str = include_str!("guest/init");
/// What a DHCP client calls with what it has learned.
pub(crate) const DHCP: &str = include_str!("guest/dhcp");
/// What is made of the machine's devices at the start.
pub(crate) const DEVICES: &str = include_str!("guest/devices");
/// Waits for the power button.
pub(crate) const BUTTON: &str = include_str!("guest/button");
const INITTAB: &str = include_str!("guest/inittab");
const SESSION: &str = include_str!("guest/session");
const SHELL_RC: &str = include_str!("guest/shrc");

/// Folders of the system that the image `shell` offers, with permission bits.
const FOLDERS: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var/log", 0o755),
];

/// Small files of the system that the image `shell` offers.
const FILES: &[(&str, u32, &str)] = &[
    ("init", 0o755, INIT),
    ("etc/inittab", 0o644, INITTAB),
    ("etc/ringfence/devices", 0o644, DEVICES),
    ("etc/ringfence/dhcp", 0o755, DHCP),
    ("etc/ringfence/button", 0o755, BUTTON),
    ("etc/ringfence/session", 0o644, SESSION),
    ("etc/ringfence/shrc", 0o644, SHELL_RC),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", 0o644, "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tringfence\n"),
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n",
    ),
];

/// Nodes needed before devtmpfs is mounted: the kernel opens `/dev/console` for init. Linux
/// `Documentation/admin-guide/devices.txt`.
const NODES: &[(&str, u32, u32, u32)] =
    &[("dev/console", 0o600, 5, 1), ("dev/null", 0o666, 1, 3), ("dev/ttyS0", 0o600, 4, 64)];

#[derive(Debug, Clone)]
enum Entry {
    Folder(u32),
    File(u32, Vec<u8>),
    Symlink(String),
    Device(u32, DeviceKind, u32, u32),
}

/// An initial RAM disk in the making. A path given twice keeps what was given last; folders on the way appear by
/// themselves. The result depends on what was added, not on the order.
#[derive(Debug, Clone, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

impl Initramfs {
    /// Nothing but the device nodes that every kernel wants.
    ///
    /// # Errors
    /// None in practice: the table's paths are valid.
    pub fn empty() -> Result<Self, CpioError> {
        let mut archive = Self::default();
        for &(path, permissions, major, minor) in NODES {
            archive.add(path, Entry::Device(permissions, DeviceKind::Character, major, minor))?;
        }
        Ok(archive)
    }

    /// The system of the image `shell` around the given busybox program, without modules.
    ///
    /// # Errors
    /// None in practice: the tables' paths are valid.
    pub fn shell(busybox: Vec<u8>) -> Result<Self, CpioError> {
        let mut archive = Self::empty()?;
        for &(path, permissions) in FOLDERS {
            archive.folder(path, permissions)?;
        }
        for &(path, permissions, text) in FILES {
            archive.file(path, permissions, text)?;
        }
        archive.file("bin/busybox", 0o755, busybox)?;
        archive.symlink("bin/sh", "busybox")?;
        Ok(archive)
    }

    /// A folder.
    ///
    /// # Errors
    /// [`CpioError::BadPath`].
    pub fn folder(&mut self, path: &str, permissions: u32) -> Result<&mut Self, CpioError> {
        self.add(path, Entry::Folder(permissions))
    }

    /// A regular file.
    ///
    /// # Errors
    /// [`CpioError::BadPath`].
    pub fn file(
        &mut self,
        path: &str,
        permissions: u32,
        contents: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, CpioError> {
        self.add(path, Entry::File(permissions, contents.into()))
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// [`CpioError::BadPath`].
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, CpioError> {
        self.add(path, Entry::Symlink(target.to_owned()))
    }

    /// Another first program; the system's other files stay.
    ///
    /// # Errors
    /// None in practice: the path is valid.
    pub fn init(&mut self, program: impl Into<Vec<u8>>) -> Result<&mut Self, CpioError> {
        self.file("init", 0o755, program)
    }

    /// Modules of the kernel `release`, with the lists that `modprobe` in the guest reads. Those in `load`, and what
    /// they need, are loaded by the standard init in any case; the others on demand.
    ///
    /// # Errors
    /// [`CpioError::BadPath`] for a strange release or module path.
    pub fn modules<S: AsRef<str>>(
        &mut self,
        release: &str,
        selection: &Selection,
        load: &[S],
    ) -> Result<&mut Self, CpioError> {
        let base = format!("lib/modules/{release}");
        for module in &selection.modules {
            self.file(&format!("{base}/{}", module.path), 0o644, module.contents.as_slice())?;
        }
        self.file(&format!("{base}/modules.dep"), 0o644, selection.modules_dep())?;
        self.file(&format!("{base}/modules.alias"), 0o644, selection.modules_alias())?;
        let list: String =
            selection.loading_order(load).iter().map(|module| format!("/{base}/{}\n", module.path)).collect();
        self.file(LOAD_LIST, 0o644, list)
    }

    /// The finished archive, uncompressed.
    ///
    /// # Errors
    /// [`CpioError::TooLarge`], [`CpioError::BadPath`].
    pub fn build(&self) -> Result<Vec<u8>, CpioError> {
        let mut writer = Writer::new();
        let mut made: std::collections::BTreeSet<&str> = std::collections::BTreeSet::new();
        for (path, entry) in &self.entries {
            for (at, _) in path.match_indices('/') {
                let parent = path.get(..at).unwrap_or_default();
                if made.insert(parent) && !self.entries.contains_key(parent) {
                    writer.folder(parent, 0o755)?;
                }
            }
            match entry {
                Entry::Folder(permissions) => writer.folder(path, *permissions)?,
                Entry::File(permissions, contents) => writer.file(path, *permissions, contents)?,
                Entry::Symlink(target) => writer.symlink(path, target)?,
                Entry::Device(permissions, kind, major, minor) => {
                    writer.device(path, *permissions, *kind, *major, *minor)?;
                }
            }
        }
        Ok(writer.finish())
    }

    fn add(&mut self, path: &str, entry: Entry) -> Result<&mut Self, CpioError> {
        self.entries.insert(cpio::clean(path)?.to_owned(), entry);
        Ok(self)
    }
}

/// Everything of this version that shapes the image `shell` besides busybox and the modules.
pub(crate) fn recipe_text() -> String {
    format!("{FOLDERS:?}{FILES:?}{NODES:?}")
}

#[cfg(test)]
mod tests;
