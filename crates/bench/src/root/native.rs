//! The native side: the image's programs on the host's own kernel and CPU, in the image's files, on one processor.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Why programs cannot run in the image's files.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NativeError {
    #[error(
        "running in the image's files needs root, or user namespaces for ordinary users (sysctl \
         user.max_user_namespaces and, on Debian, kernel.unprivileged_userns_clone); neither works here: {0}"
    )]
    NoNamespace(String),
    #[error("`{0}` is not on this host; install the package util-linux")]
    NoTool(&'static str),
}

/// Enters the image's files in a mount namespace of its own, so that nothing stays behind.
const ENTER: &str = r#"
root=$1
shift
mount --rbind /dev "$root/dev" && mount --rbind /proc "$root/proc" && mount --rbind /sys "$root/sys" &&
    mount -t tmpfs tmpfs "$root/tmp" || exit 125
exec chroot "$root" "$@"
"#;

/// A way to run programs in the image's files.
#[derive(Debug, Clone)]
pub(crate) struct Native {
    root: PathBuf,
    /// Options of unshare(1) that work here.
    unshare: &'static [&'static str],
    /// The processor to run on: guests have one.
    cpu: String,
}

impl Native {
    /// Finds out which way works.
    pub(crate) fn new(root: &Path) -> Result<Self, NativeError> {
        let ways: [&[&str]; 2] = [&["--mount"], &["--mount", "--user", "--map-root-user"]];
        let mut reason = String::new();
        for unshare in ways {
            let native = Self { root: root.to_owned(), unshare, cpu: last_cpu() };
            match native.command(&["/bin/true"]).output() {
                Ok(output) if output.status.success() => return Ok(native),
                Ok(output) => reason = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                Err(_) => return Err(NativeError::NoTool("taskset")),
            }
        }
        Err(NativeError::NoNamespace(reason))
    }

    /// The command, to be run in the image's files, on one processor.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &self.cpu, "unshare"]);
        self.enter(command, words)
    }

    /// The command, to be run in the image's files, on any processor: for what serves the sides.
    pub(crate) fn server(&self, words: &[&str]) -> Command {
        self.enter(Command::new("unshare"), words)
    }

    fn enter(&self, mut command: Command, words: &[&str]) -> Command {
        command.args(self.unshare);
        command.args(["/bin/sh", "-c", ENTER, "enter"]).arg(&self.root).args(words);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

/// The last processor that this process may run on; the first is the busiest with interrupts.
fn last_cpu() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or("0");
    list.trim().rsplit([',', '-']).next().unwrap_or("0").to_owned()
}
