//! Finds and fetches Debian packages through the host's apt, without root and without touching the host's state.
//!
//! apt gets a state folder of our own (`Dir::State`, `Dir::Cache`) and a copy of the host's sources, so empty or
//! unreadable package lists of the host do not matter. Host, mirror, proxy and keys are the host's own; nothing is
//! hard-coded. apt checks the signatures on the lists; the hash in the lists is checked by our own code as well.

mod records;
mod sources;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

pub use records::{Dependency, Package};

use crate::cache::{CacheError, at_path, write_durably};
use crate::digest::Digest;
use crate::progress::Progress;
use sources::SourceFile;

/// Package lists older than this are fetched anew before anything is looked up in them.
const LISTS_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Output of a tool that is kept, in bytes.
const MAX_OUTPUT: usize = 16 << 20;

/// Why packages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// The host is no Debian.
    #[error(
        "`{0}` is not on this host, so the built-in images cannot be fetched; give a kernel and an initial RAM disk of \
         your own with `--kernel FILE --initrd FILE`"
    )]
    Missing(&'static str),
    /// The mirror does not answer.
    #[error(
        "the host's package sources cannot be reached; check the network, the proxy (`http_proxy`) and \
         /etc/apt/sources.list, or give `--kernel FILE --initrd FILE`. apt said:\n{0}"
    )]
    Unreachable(String),
    /// No source has it.
    #[error(
        "the package `{name}`{wanted} is in none of the host's package sources{hint}; add a source that has it to \
         /etc/apt/sources.list, or give `--kernel FILE --initrd FILE`"
    )]
    NotFound {
        /// The package.
        name: String,
        /// The version asked for, in words.
        wanted: String,
        /// Versions that do exist, in words.
        hint: String,
    },
    /// The fetched file is not the one in the lists.
    #[error(
        "the package file of `{name}` {version} does not match the signed package list (wanted {wanted}, got {got}); a \
         proxy or mirror changed it. Try again, or use another mirror"
    )]
    HashMismatch {
        /// The package.
        name: String,
        /// Its version.
        version: String,
        /// Size and SHA-256 in the list.
        wanted: String,
        /// Size and SHA-256 of the file.
        got: String,
    },
    /// apt ran out of room.
    #[error(
        "no space left for packages in `{folder}`; free some or set RINGFENCE_CACHE to a folder on another disk"
    )]
    DiskFull {
        /// Where apt was writing.
        folder: PathBuf,
    },
    /// Something else.
    #[error("`{tool}` failed. It said:\n{details}")]
    Failed {
        /// The program.
        tool: &'static str,
        /// The end of what it printed.
        details: String,
    },
    /// A file of ours.
    #[error(transparent)]
    Store(#[from] CacheError),
}

/// Which version of a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version<'a> {
    /// The one that the host would install.
    Candidate,
    /// The newest that begins with this and a dot; from the release's backports if need be.
    Series(&'a str),
    /// Exactly this one.
    Exact(&'a str),
}

/// A private use of the host's apt.
#[derive(Debug)]
pub struct Apt {
    state: PathBuf,
    /// Where programs are looked up, if not in `PATH`.
    search_path: Option<OsString>,
    sources: Vec<SourceFile>,
    codename: Option<String>,
    /// Names of index files besides the package lists; they are not fetched.
    other_indexes: Vec<String>,
    updated: bool,
    /// What apt complained about during the last update, if that was more than nothing.
    trouble: Option<String>,
}

impl Apt {
    /// Prepares the state folder.
    ///
    /// # Errors
    /// [`AptError::Missing`] if the host has no apt; [`AptError::Store`] if the folder cannot be written.
    pub fn new(state: &Path) -> Result<Self, AptError> {
        Self::with_search_path(state, None)
    }

    /// Like [`Self::new`], with programs looked up in `search_path` (as in `PATH`) if that is given.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_search_path(state: &Path, search_path: Option<OsString>) -> Result<Self, AptError> {
        let mut apt = Self {
            state: state.to_owned(),
            search_path,
            sources: Vec::new(),
            codename: codename(),
            other_indexes: Vec::new(),
            updated: false,
            trouble: None,
        };
        let dump = apt.run("apt-config", &["dump".as_ref()], None, &mut |_| {})?;
        apt.other_indexes = index_names(&dump.stdout);
        let (list, parts) = apt.source_paths()?;
        for folder in ["lists/partial", "cache/archives/partial", "sources.list.d"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).map_err(at_path("create", &folder))?;
        }
        apt.sources = sources::of_host(&list, &parts);
        Ok(apt)
    }

    /// Looks a package up, fetching the package lists if they are missing, old, or do not have it.
    ///
    /// # Errors
    /// [`AptError::NotFound`], [`AptError::Unreachable`] and others.
    pub fn find(
        &mut self,
        name: &str,
        version: Version<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Package, AptError> {
        if !self.lists_fresh() {
            self.update(progress)?;
        }
        if let Some(package) = self.look_up(name, version)? {
            return Ok(package);
        }
        let extra = match (version, &self.codename) {
            (Version::Series(_), Some(codename)) => sources::backports(&self.sources, codename),
            _ => None,
        };
        if extra.is_some() || !self.updated {
            self.sources.extend(extra);
            self.update(progress)?;
            if let Some(package) = self.look_up(name, version)? {
                return Ok(package);
            }
        }
        if let Some(trouble) = &self.trouble {
            return Err(AptError::Unreachable(trouble.clone()));
        }
        let others = self.show(name, true)?;
        let versions: Vec<String> = others.into_iter().map(|package| package.version).collect();
        Err(AptError::NotFound {
            name: name.to_owned(),
            wanted: match version {
                Version::Candidate => String::new(),
                Version::Series(series) => format!(" of version {series}"),
                Version::Exact(version) => format!(" of exactly version {version}"),
            },
            hint: if versions.is_empty() {
                String::new()
            } else {
                format!(" (there is {})", versions.join(", "))
            },
        })
    }

    /// Fetches a package file into the empty folder `into` and checks it against the signed lists.
    ///
    /// # Errors
    /// [`AptError::HashMismatch`], [`AptError::Unreachable`], [`AptError::DiskFull`] and others.
    pub fn download(
        &self,
        package: &Package,
        into: &Path,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, AptError> {
        progress.step(&format!("Fetching {} {}", package.name, package.version), Some(package.size));
        let wanted = format!("{}={}", package.name, package.version);
        let mut done = 0;
        let output =
            self.run("apt-get", &["download".as_ref(), wanted.as_ref()], Some(into), &mut |line| {
                if let Some(percent) = status_percent(line) {
                    done = done.max((package.size as f64 * percent / 100.0) as u64);
                    progress.advance(done.min(package.size));
                }
            })?;
        if !output.success {
            return Err(self.explain("apt-get", &output));
        }
        let file = fs::read_dir(into)
            .map_err(at_path("list", into))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension() == Some(OsStr::new("deb")))
            .ok_or_else(|| self.explain("apt-get", &output))?;
        verify(package, &file)?;
        progress.advance(package.size);
        Ok(file)
    }

    /// Fetches the package lists. Trouble with single sources is noted, not fatal: the wanted packages may well be in
    /// the others.
    ///
    /// # Errors
    /// The state folder cannot be written, or the disk is full.
    pub fn update(&mut self, progress: &mut dyn Progress) -> Result<(), AptError> {
        progress.step("Fetching package lists", None);
        self.write_sources()?;
        let lists = self.state.join("lists");
        let mut done = 0;
        let before = folder_size(&lists);
        let output = self.run("apt-get", &["update".as_ref()], None, &mut |_| {
            done = done.max(folder_size(&lists).saturating_sub(before));
            progress.advance(done);
        })?;
        self.updated = true;
        self.trouble = None;
        let stamp = self.stamp();
        if output.success && !output.complaint() {
            write_durably(&stamp, self.sources_text().as_bytes())?;
        } else {
            match self.explain("apt-get", &output) {
                full @ AptError::DiskFull { .. } => return Err(full),
                _ => self.trouble = Some(output.details()),
            }
            // Without the stamp the next start tries again.
            if stamp.exists() {
                fs::remove_file(&stamp).map_err(at_path("remove", &stamp))?;
            }
        }
        Ok(())
    }

    fn look_up(&self, name: &str, version: Version<'_>) -> Result<Option<Package>, AptError> {
        let packages = self.show(name, version != Version::Candidate)?;
        let fits = |package: &Package| match version {
            Version::Candidate => true,
            Version::Exact(exact) => package.version == exact,
            Version::Series(series) => package
                .version
                .strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(['.', '-', '~', '+'])),
        };
        let newest = |a: &Package, b: &Package| records::compare_versions(&a.version, &b.version);
        Ok(packages.into_iter().filter(|package| package.name == name).filter(fits).max_by(newest))
    }

    /// What the lists say about a package: all versions, or the one that the host would install.
    fn show(&self, name: &str, all: bool) -> Result<Vec<Package>, AptError> {
        let which = if all { "--all-versions" } else { "--no-all-versions" };
        let output =
            self.run("apt-cache", &["show".as_ref(), which.as_ref(), name.as_ref()], None, &mut |_| {})?;
        // It fails if there is no such package, which is an answer.
        Ok(records::parse(&output.stdout))
    }

    /// Are the lists there, young, and from the sources as they are now?
    fn lists_fresh(&self) -> bool {
        let stamp = self.stamp();
        let Ok(text) = fs::read_to_string(&stamp) else { return false };
        let age = fs::metadata(&stamp)
            .and_then(|metadata| metadata.modified())
            .map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
        // The lists may have been made with backports on top.
        text.starts_with(&self.sources_text()) && age.is_ok_and(|age| age < LISTS_MAX_AGE)
    }

    fn stamp(&self) -> PathBuf {
        self.state.join("updated")
    }

    fn sources_text(&self) -> String {
        self.sources.iter().map(|file| format!("# {}\n{}\n", file.name, file.text)).collect()
    }

    /// The host's sources and ours, in the private folder.
    fn write_sources(&self) -> Result<(), AptError> {
        let parts = self.state.join("sources.list.d");
        fs::remove_dir_all(&parts).map_err(at_path("remove", &parts))?;
        fs::create_dir_all(&parts).map_err(at_path("create", &parts))?;
        for file in &self.sources {
            write_durably(&parts.join(&file.name), file.text.as_bytes())?;
        }
        Ok(())
    }

    fn source_paths(&self) -> Result<(PathBuf, PathBuf), AptError> {
        let arguments = ["shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"];
        let output = self.run("apt-config", &arguments.map(OsStr::new), None, &mut |_| {})?;
        let value = |key: &str, default: &str| {
            let line = output.stdout.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            PathBuf::from(line.map_or(default, |value| value.trim_matches('\'')))
        };
        Ok((value("LIST", "/etc/apt/sources.list"), value("PARTS", "/etc/apt/sources.list.d")))
    }

    /// Options that keep apt in our folder, to go after the host's own configuration.
    fn private_options(&self) -> Vec<OsString> {
        let path = |key: &str, below: &str| {
            let mut option = OsString::from(format!("{key}="));
            option.push(self.state.join(below));
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
            "APT::Architecture=amd64",
            "APT::Status-Fd=1",
            "Acquire::Languages=none",
            "Acquire::Retries=2",
            "Acquire::http::Timeout=20",
            "Acquire::https::Timeout=20",
        ];
        options.extend(fixed.map(OsString::from));
        options.extend(
            self.other_indexes
                .iter()
                .map(|name| format!("Acquire::IndexTargets::{name}::DefaultEnabled=0").into()),
        );
        options
    }

    fn run(
        &self,
        tool: &'static str,
        arguments: &[&OsStr],
        folder: Option<&Path>,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output, AptError> {
        let mut command = Command::new(tool);
        if let Some(path) = &self.search_path {
            command.env("PATH", path);
        }
        if tool != "apt-config" {
            let settings = self.state.join("apt.conf");
            // Hooks of the host, such as one that empties the host's package cache, are not for us to run.
            let clear = "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
                         #clear APT::Update::Post-Invoke-Success;\n";
            write_durably(&settings, clear.as_bytes())?;
            write_durably(&self.state.join("status"), b"")?;
            command.arg("-q").arg("-c").arg(settings);
            for option in self.private_options() {
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

    fn explain(&self, tool: &'static str, output: &Output) -> AptError {
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

#[derive(Debug)]
struct Output {
    success: bool,
    stdout: String,
    stderr: String,
}

impl Output {
    /// Did it say that something went wrong, whatever its exit status? `apt-get update` exits with 0 even if no
    /// source could be reached.
    fn complaint(&self) -> bool {
        let failed = |line: &str| line.starts_with("Err:") || line.starts_with("E:");
        self.stdout.lines().chain(self.stderr.lines()).any(failed)
            || self.stderr.contains("Failed to fetch")
            || self.stderr.contains("Some index files failed")
    }

    /// The complaints, at most a screen's part of them.
    fn details(&self) -> String {
        let of_interest =
            |line: &&str| line.starts_with("E:") || line.starts_with("W:") || line.starts_with("Err:");
        let lines: Vec<&str> =
            self.stderr.lines().chain(self.stdout.lines()).filter(of_interest).take(8).collect();
        let text = if lines.is_empty() { self.stderr.trim().to_owned() } else { lines.join("\n") };
        if text.is_empty() { "(nothing)".to_owned() } else { text.chars().take(1600).collect() }
    }
}

/// Size and hash of a fetched file against the lists.
fn verify(package: &Package, file: &Path) -> Result<(), AptError> {
    let (digest, size) = Digest::of_file(file).map_err(at_path("read", file))?;
    if (digest, size) == (package.sha256, package.size) {
        return Ok(());
    }
    Err(AptError::HashMismatch {
        name: package.name.clone(),
        version: package.version.clone(),
        wanted: format!("{} bytes, {}", package.size, package.sha256),
        got: format!("{size} bytes, {digest}"),
    })
}

/// `dlstatus:1:12.5:Retrieving file 1 of 2` (apt's `README.progress-reporting`).
fn status_percent(line: &str) -> Option<f64> {
    let percent: f64 = line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()?;
    percent.is_finite().then(|| percent.clamp(0.0, 100.0))
}

/// Index files other than package lists that the host's configuration asks for, from `apt-config dump`.
fn index_names(dump: &str) -> Vec<String> {
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

/// The release's code name, from os-release(5).
fn codename() -> Option<String> {
    let text =
        ["/etc/os-release", "/usr/lib/os-release"].iter().find_map(|path| fs::read_to_string(path).ok())?;
    let value = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    let name = value.trim().trim_matches(['"', '\'']);
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    (plain && !name.is_empty()).then(|| name.to_owned())
}

/// Bytes in the files of a folder and of the folders directly inside it.
fn folder_size(folder: &Path) -> u64 {
    let of = |folder: &Path| -> Vec<fs::DirEntry> {
        fs::read_dir(folder).into_iter().flatten().flatten().collect()
    };
    let mut sum = 0u64;
    for entry in of(folder) {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            sum += of(&entry.path())
                .iter()
                .flat_map(fs::DirEntry::metadata)
                .map(|inner| inner.len())
                .sum::<u64>();
        } else {
            sum += metadata.len();
        }
    }
    sum
}

#[cfg(test)]
mod tests;
