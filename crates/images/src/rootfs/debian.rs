//! What Debian packages' install scripts would have made, and our init.
//!
//! No package's script runs: that would need root and a system to run it on. The few things that programs miss then are
//! tables here. There is no record of what is installed (`dpkg --list` is empty), since nothing can be added anyway
//! without a network.

use std::ffi::OsString;

use super::tools::{Tools, run};
use super::{Meta, RootError, Tree};
use crate::modules::Selection;

const INIT: &str = include_str!("../guest/debian/init");
const POWEROFF: &str = include_str!("../guest/debian/poweroff");
const SESSION: &str = include_str!("../guest/session");
const SHELL_RC: &str = "# Read by every interactive shell.\nPS1='\\u@\\h:\\w\\$ '\nalias ll='ls -l'\n";

/// A merged `/usr`, as every Debian since 12 has it: packages may hold files in either place.
const MERGED: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")];

/// Folders, with permission bits.
const FOLDERS: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("media", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/local/bin", 0o755),
    ("usr/local/lib", 0o755),
    ("usr/local/sbin", 0o755),
    ("var/cache", 0o755),
    ("var/lib", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

/// Small files of ours.
const FILES: &[(&str, u32, &str)] = &[
    ("usr/sbin/init", 0o755, INIT),
    ("usr/sbin/poweroff", 0o755, POWEROFF),
    ("etc/ringfence/session", 0o644, SESSION),
    ("etc/ringfence/devices", 0o644, crate::initramfs::DEVICES),
    ("etc/ringfence/dhcp", 0o755, crate::initramfs::DHCP),
    ("etc/ringfence/button", 0o755, crate::initramfs::BUTTON),
    ("etc/ringfence/shrc", 0o644, SHELL_RC),
    ("etc/bash.bashrc", 0o644, SHELL_RC),
    ("etc/hostname", 0o644, "ringfence\n"),
    ("etc/hosts", 0o644, "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tringfence\n"),
    ("etc/fstab", 0o644, "/dev/nvme0n1 / ext4 defaults 0 1\n"),
    ("etc/ld.so.conf", 0o644, "include /etc/ld.so.conf.d/*.conf\n"),
    ("etc/environment", 0o644, ""),
    ("etc/shells", 0o644, "/bin/sh\n/bin/bash\n/usr/bin/bash\n/bin/dash\n"),
];

/// Files that packages bring as a pattern, and where their scripts copy them to.
const COPIES: &[(&str, &str, bool)] = &[
    ("usr/share/base-passwd/passwd.master", "etc/passwd", true),
    ("usr/share/base-passwd/group.master", "etc/group", true),
    ("usr/share/base-files/profile", "etc/profile", false),
    ("usr/share/base-files/dot.profile", "root/.profile", false),
    ("usr/share/libc-bin/nsswitch.conf", "etc/nsswitch.conf", false),
];

/// Links, each to the first of several programs that is there: what `update-alternatives` would choose.
const LINKS: &[(&str, &[&str])] = &[
    ("usr/bin/sh", &["dash", "bash"]),
    ("usr/bin/awk", &["gawk", "mawk"]),
    ("usr/bin/nawk", &["gawk", "mawk"]),
    ("usr/bin/cc", &["gcc"]),
    ("usr/bin/c++", &["g++"]),
    ("usr/bin/which", &["which.debianutils"]),
    ("usr/bin/pager", &["less", "more"]),
    ("usr/bin/python3", &["python3.13", "python3.12", "python3.11"]),
    ("usr/sbin/reboot", &["poweroff"]),
    ("usr/sbin/halt", &["poweroff"]),
    ("etc/mtab", &["../proc/self/mounts"]),
    ("var/run", &["../run"]),
    ("var/lock", &["../run/lock"]),
];

/// Everything of this version that shapes a Debian root besides the packages.
pub(crate) fn recipe_text() -> String {
    format!("{MERGED:?}{FOLDERS:?}{FILES:?}{COPIES:?}{LINKS:?}")
}

/// What has to be there before the first package.
pub(crate) fn prepare(tree: &mut Tree) -> Result<(), RootError> {
    for (link, target) in MERGED {
        tree.add_folder(target, Meta::root(0o755))?;
        tree.add_symlink(link, target, Meta::root(0o777))?;
    }
    for &(path, mode) in FOLDERS {
        tree.add_folder(path, Meta::root(mode))?;
    }
    Ok(())
}

/// What comes after the last package.
pub(crate) fn configure(tree: &mut Tree) -> Result<(), RootError> {
    for &(path, mode, text) in FILES {
        tree.add_text(path, Meta::root(mode), text.as_bytes())?;
    }
    for &(from, to, required) in COPIES {
        if required || tree.has(from) {
            let text = tree.read(from)?;
            tree.add_text(to, Meta::root(0o644), &text)?;
        }
    }
    for &(link, targets) in LINKS {
        let folder = link.rsplit_once('/').map_or("", |(folder, _)| folder);
        // What leads out of its own folder is made by the running system.
        let there = |target: &&&str| target.starts_with("..") || tree.has(&format!("{folder}/{target}"));
        if let Some(target) = targets.iter().find(there)
            && !tree.has(link)
        {
            tree.add_symlink(link, target, Meta::root(0o777))?;
        }
    }
    Ok(())
}

/// Modules of the kernel, with the lists that tools make others from.
pub(crate) fn add_modules(tree: &mut Tree, release: &str, selection: &Selection) -> Result<(), RootError> {
    let base = format!("usr/lib/modules/{release}");
    for module in &selection.modules {
        tree.add_text(&format!("{base}/{}", module.path), Meta::root(0o644), &module.contents)?;
    }
    tree.add_text(&format!("{base}/modules.dep"), Meta::root(0o644), selection.modules_dep().as_bytes())?;
    tree.add_text(&format!("{base}/modules.alias"), Meta::root(0o644), selection.modules_alias().as_bytes())
}

/// Lets the host's own tools write what programs find libraries and modules by faster. Where they are missing, the loader
/// searches folders and the guest makes the module lists at its start.
pub(crate) fn index(tree: &mut Tree, release: &str, tools: &Tools) -> Result<(), RootError> {
    let folder = tree.folder().as_os_str().to_owned();
    if let Some(ldconfig) = tools.find("ldconfig") {
        // The links that it could make are in the packages.
        run("ldconfig", &ldconfig, &[OsString::from("-X"), "-r".into(), folder.clone()], &[])?;
        tree.adopt("etc")?;
    }
    if let Some(depmod) = tools.find("depmod") {
        run("depmod", &depmod, &[OsString::from("-b"), folder, release.into()], &[])?;
        tree.adopt(&format!("usr/lib/modules/{release}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
