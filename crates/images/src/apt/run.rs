//! Runs apt's programs with options that keep them in a folder of our own, and makes sense of what they say.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{AptError, Architecture};
use crate::cache::at_path;

/// Output of a tool that is kept, in bytes.
const MAX_OUTPUT: usize = 16 << 20;

/// Hooks of the host, such as one that empties the host's package cache, are not for us to run.
const SETTINGS: &str = "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
                        #clear APT::Update::Post-Invoke-Success;\n";

/// apt's programs, tied to a state folder.
#[derive(Debug)]
pub(super) struct Tools {
    state: PathBuf,
    /// Where programs are looked up, if not in `PATH`.
    search_path: Option<OsString>,
    /// Options after the host's own configuration.
    options: Vec<OsString>,
}

impl Tools {
    /// Prepares the state folder.
    pub(super) fn new(
        state: &Path,
        architecture: Architecture,
        search_path: Option<OsString>,
    ) -> Result<Self, AptError> {
        let mut tools = Self { state: state.to_owned(), search_path, options: Vec::new() };
        let dump = tools.run("apt-config", &["dump"], None, &mut |_| {})?;
        for folder in ["lists/partial", "cache/archives/partial", "sources.list.d"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).map_err(at_path("create", &folder))?;
        }
        for (name, text) in [("apt.conf", SETTINGS), ("status", "")] {
            let path = state.join(name);
            fs::write(&path, text).map_err(at_path("write", &path))?;
        }
        tools.options = private_options(state, architecture, &index_names(&dump.stdout));
        Ok(tools)
    }

    /// Where the host keeps its sources: the single file, and the folder of files.
    pub(super) fn source_paths(&self) -> Result<(PathBuf, PathBuf), AptError> {
        let arguments = ["shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"];
        let output = self.run("apt-config", &arguments, None, &mut |_| {})?;
        let value = |key: &str, default: &str| {
            let line = output.stdout.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            PathBuf::from(line.map_or(default, |value| value.trim_matches('\'')))
        };
        Ok((value("LIST", "/etc/apt/sources.list"), value("PARTS", "/etc/apt/sources.list.d")))
    }

    /// Runs a program in `folder` and waits for it. `on_line` hears every line of its output as it comes.
    pub(super) fn run(
        &self,
        tool: &'static str,
        arguments: &[&str],
        folder: Option<&Path>,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output, AptError> {
        let mut command = Command::new(tool);
        if let Some(path) = &self.search_path {
            command.env("PATH", path);
        }
        // The first question goes to the host's own configuration.
        if tool != "apt-config" {
            command.arg("-q").arg("-c").arg(self.state.join("apt.conf"));
            for option in &self.options {
                command.arg("-o").arg(option);
            }
        }
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        // Its messages go through a file, so that one thread is enough to read everything.
        let mut messages =
            tempfile::tempfile().map_err(at_path("create a file in", &std::env::temp_dir()))?;
        let for_child = messages.try_clone().map_err(at_path("use a file in", &std::env::temp_dir()))?;
        let mut child = command
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(for_child)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => AptError::Missing(tool),
                _ => AptError::Failed { tool, details: error.to_string() },
            })?;
        let failed = |error: io::Error| AptError::Failed { tool, details: error.to_string() };
        let mut stdout = String::new();
        if let Some(pipe) = child.stdout.take() {
            let mut reader = io::BufReader::new(pipe);
            let mut line = Vec::new();
            while reader.by_ref().take(1 << 20).read_until(b'\n', &mut line).map_err(failed)? > 0 {
                let text = String::from_utf8_lossy(&line);
                on_line(text.trim_end());
                if !text.starts_with("dlstatus:") && stdout.len() + text.len() <= MAX_OUTPUT {
                    stdout.push_str(&text);
                }
                line.clear();
            }
        }
        let success = child.wait().map_err(failed)?.success();
        messages.rewind().map_err(failed)?;
        let mut stderr = Vec::new();
        messages.take(1 << 20).read_to_end(&mut stderr).map_err(failed)?;
        Ok(Output { success, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() })
    }

    /// The error that fits what a program said.
    pub(super) fn explain(&self, tool: &'static str, output: &Output) -> AptError {
        let says = |phrases: &[&str]| {
            phrases.iter().any(|phrase| output.stderr.contains(phrase) || output.stdout.contains(phrase))
        };
        if says(&["No space left on device", "don't have enough free space", "Disk quota exceeded"]) {
            AptError::DiskFull { folder: self.state.clone() }
        } else if says(&["Failed to fetch", "Could not resolve", "Could not connect", "unreachable"]) {
            AptError::Unreachable(output.details())
        } else {
            AptError::Failed { tool, details: output.details() }
        }
    }
}

/// What a program said.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) success: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Output {
    /// Did it say that something went wrong, whatever its exit status? `apt-get update` exits with 0 even if no
    /// source could be reached.
    pub(super) fn complaint(&self) -> bool {
        let failed = |line: &str| line.starts_with("Err:") || line.starts_with("E:");
        self.stdout.lines().chain(self.stderr.lines()).any(failed)
            || self.stderr.contains("Failed to fetch")
            || self.stderr.contains("Some index files failed")
    }

    /// The complaints, at most a screen's part of them.
    pub(super) fn details(&self) -> String {
        let of_interest =
            |line: &&str| line.starts_with("E:") || line.starts_with("W:") || line.starts_with("Err:");
        let lines: Vec<&str> =
            self.stderr.lines().chain(self.stdout.lines()).filter(of_interest).take(8).collect();
        let text = if lines.is_empty() { self.stderr.trim().to_owned() } else { lines.join("\n") };
        if text.is_empty() { "(nothing)".to_owned() } else { text.chars().take(1600).collect() }
    }
}

/// Options that keep apt in our folder, to go after the host's own configuration.
fn private_options(state: &Path, architecture: Architecture, other_indexes: &[String]) -> Vec<OsString> {
    let path = |key: &str, below: &str| {
        let mut option = OsString::from(format!("{key}="));
        option.push(state.join(below));
        option
    };
    let mut options = vec![
        path("Dir::State", ""),
        path("Dir::State::lists", "lists"),
        // What is installed on the host plays no part.
        path("Dir::State::status", "status"),
        path("Dir::Cache", "cache"),
        path("Dir::Cache::archives", "cache/archives"),
        path("Dir::Etc::sourcelist", "sources.list.d/none"),
        path("Dir::Etc::sourceparts", "sources.list.d"),
    ];
    let fixed = [
        // The cache folder has a lock of its own.
        "Debug::NoLocking=1",
        // The user `_apt` may not enter a private folder; everything fetched is checked by signature and hash.
        "APT::Sandbox::User=root",
        "APT::Status-Fd=1",
        "Acquire::Languages=none",
        "Acquire::Retries=2",
        "Acquire::http::Timeout=20",
        "Acquire::https::Timeout=20",
    ];
    options.extend(fixed.map(OsString::from));
    // The second would otherwise be the host's list, whose first entry apt takes for the native one.
    let only = ["APT::Architecture", "APT::Architectures"];
    options.extend(only.map(|key| OsString::from(format!("{key}={}", architecture.name()))));
    options.extend(
        other_indexes.iter().map(|name| format!("Acquire::IndexTargets::{name}::DefaultEnabled=0").into()),
    );
    options
}

/// `dlstatus:1:12.5:Retrieving file 1 of 2` (apt's `README.progress-reporting`).
pub(super) fn status_percent(line: &str) -> Option<f64> {
    let percent: f64 = line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()?;
    percent.is_finite().then(|| percent.clamp(0.0, 100.0))
}

/// Index files other than package lists that the host's configuration asks for, from `apt-config dump`.
pub(super) fn index_names(dump: &str) -> Vec<String> {
    let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    let mut names = Vec::new();
    for line in dump.lines() {
        let Some(rest) = line.strip_prefix("Acquire::IndexTargets::") else { continue };
        let key = rest.split(' ').next().unwrap_or_default();
        let mut parts = key.split("::");
        let (Some(kind), Some(name), None) = (parts.next(), parts.next(), parts.next()) else { continue };
        if plain(kind) && plain(name) && (kind, name) != ("deb", "Packages") && !name.is_empty() {
            names.push(format!("{kind}::{name}"));
        }
    }
    names
}
