//! Programs of the host that help to make a root file system.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::RootError;

/// Where administrators' programs are, which an ordinary user's `PATH` need not lead to.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Where programs are looked up.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    folders: Vec<PathBuf>,
}

impl Tools {
    /// Looks in `path` (as in `PATH`) only, if that is given.
    pub(crate) fn new(path: Option<&OsStr>) -> Self {
        let mut folders: Vec<PathBuf>;
        match path {
            Some(path) => folders = std::env::split_paths(path).collect(),
            None => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                folders = std::env::split_paths(&path).collect();
                folders.extend(SYSTEM_FOLDERS.map(PathBuf::from));
            }
        }
        Self { folders }
    }

    /// The program, if it is there.
    pub(crate) fn find(&self, tool: &str) -> Option<PathBuf> {
        self.folders.iter().map(|folder| folder.join(tool)).find(|path| path.is_file())
    }

    /// The program, or the advice how to get it.
    pub(crate) fn require(&self, tool: &'static str, package: &'static str) -> Result<PathBuf, RootError> {
        self.find(tool).ok_or(RootError::MissingTool { tool, package })
    }
}

/// Runs a program to its end; gives what it said, on both channels.
pub(crate) fn run(
    tool: &'static str,
    program: &PathBuf,
    arguments: &[OsString],
    environment: &[(&str, &str)],
) -> Result<String, RootError> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| RootError::Tool { tool, details: error.to_string() })?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(stderr);
    }
    let end = stderr.char_indices().rev().nth(1600).map_or(0, |(at, _)| at);
    Err(RootError::Tool { tool, details: stderr.get(end..).unwrap_or_default().trim().to_owned() })
}
