//! The host: its programs and its processor; and what it is told meanwhile.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringfence_images::Progress;

/// The command to measure is not built.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not there; build it with `cargo build --release`, or name it with --ringfence")]
pub(crate) struct NoRingfence(PathBuf);

/// Trouble with a file of the host's.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} `{path}`")]
pub(crate) struct FileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// For `map_err`: says what was done to which file.
pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { action, path, source }
}

/// Tells the steps on standard error, a line each.
pub(crate) struct Steps;

impl Progress for Steps {
    fn step(&mut self, what: &str, _total: Option<u64>) {
        eprintln!("{what}");
    }

    fn advance(&mut self, _done: u64) {}
}

/// The command to measure: the one given, or that beside this program.
pub(crate) fn ringfence(given: Option<&Path>) -> Result<PathBuf, NoRingfence> {
    let path = given.map_or_else(
        || std::env::current_exe().unwrap_or_default().with_file_name("ringfence"),
        Path::to_owned,
    );
    if path.is_file() { Ok(path) } else { Err(NoRingfence(path)) }
}

/// The first line of what a program says about its version.
pub(crate) fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// The processor's name, and how many there are.
pub(crate) fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!("{}, {count} processors", name.unwrap_or("an unknown CPU"))
}
