//! Disk images and machines that use them, judged from outside by `mke2fs`, `e2fsck` and `debugfs` of e2fsprogs, which
//! every Debian has.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A program of e2fsprogs, which an ordinary user's PATH need not lead to.
pub fn tool(name: &str) -> Option<PathBuf> {
    let found = ["/usr/sbin", "/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(name));
    let found = found.into_iter().find(|path| path.exists());
    if found.is_none() {
        println!("skipped: no {name} on this host; install e2fsprogs");
    }
    found
}

/// An image with an empty ext4 file system.
pub fn ext4(folder: &Path, mke2fs: &Path) -> PathBuf {
    let image = folder.join("disk.ext4");
    std::fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
    let status = Command::new(mke2fs).args(["-q", "-F", "-t", "ext4"]).arg(&image).status().unwrap();
    assert!(status.success());
    image
}

/// `qemu-img`, with which QEMU judges qcow2 images. `None`, and why, where there is none.
pub fn qemu_img() -> Option<Command> {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("skipped: no qemu-img on this host; install qemu-utils");
    }
    found.then(|| Command::new("qemu-img"))
}

/// A qcow2 image, made by our own command, which stands on a raw one. The option `backing=` for its folder is in the second
/// value.
pub fn overlay(base: &Path) -> (PathBuf, String) {
    let image = base.with_extension("qcow2");
    let mut command = super::ringfence();
    command.args(["image", "create"]).arg(&image).arg("--backing").arg(base);
    let output = command.args(["--backing-format", "raw"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let folder = base.parent().unwrap().display();
    (image, format!(",format=qcow2,backing={folder}"))
}

/// Fails the test if QEMU finds damage in a qcow2 image, or, unless `leaks` are allowed, clusters that nothing leads to: a
/// machine that was killed may leave those.
pub fn check_qcow2(image: &Path, leaks: bool) {
    let Some(mut qemu_img) = qemu_img() else { return };
    let output = qemu_img.args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
    let fine = matches!((output.status.code(), leaks), (Some(0), _) | (Some(3), true));
    assert!(fine, "{output:?}");
}

/// The bytes of a qcow2 image's disk in a file of their own.
pub fn flatten(image: &Path) -> PathBuf {
    let flat = image.with_extension("flat");
    let mut qemu_img = qemu_img().expect("whoever asks has looked");
    let output =
        qemu_img.args(["convert", "-f", "qcow2", "-O", "raw"]).args([image, &flat]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    flat
}

/// A machine with the image as its first disk, on the engine that boots fastest.
pub fn machine(image: &Path, options: &str) -> Command {
    let mut command = super::ringfence();
    command.args(["run", "--engine", "jit", "--timeout", "300"]).arg(disk(image, options));
    command
}

/// Fails the test unless the file system is whole; replays its journal first, as the next mount would.
pub fn check(image: &Path, e2fsck: &Path) {
    let replay = Command::new(e2fsck).args(["-p"]).arg(image).output().unwrap();
    assert!(matches!(replay.status.code(), Some(0 | 1)), "{replay:?}");
    let second = Command::new(e2fsck).args(["-f", "-n"]).arg(image).output().unwrap();
    assert_eq!(second.status.code(), Some(0), "{second:?}");
}

/// Fails the test unless the file system is whole as it is: the guest has unmounted it.
pub fn clean(image: &Path, e2fsck: &Path) {
    let output = Command::new(e2fsck).args(["-f", "-n"]).arg(image).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("recover"), "its journal is not empty: {text}");
}

/// A file's contents, read from outside.
pub fn contents(image: &Path, debugfs: &Path, file: &str) -> String {
    let output = Command::new(debugfs).args(["-R", &format!("cat {file}")]).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image of zeroes that takes no room yet.
pub fn sparse(folder: &Path, name: &str, size: u64) -> PathBuf {
    let image = folder.join(name);
    std::fs::File::create(&image).unwrap().set_len(size).unwrap();
    image
}

/// The option that gives a machine one more disk.
pub fn disk(image: &Path, options: &str) -> String {
    format!("--disk={}{options}", image.display())
}
