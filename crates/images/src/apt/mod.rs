//! Finds and fetches Debian packages through the host's apt, without root and without touching the host's state.
//!
//! apt gets a state folder of our own (`Dir::State`, `Dir::Cache`) and a copy of the host's sources, so empty or
//! unreadable package lists of the host do not matter. Host, mirror, proxy and keys are the host's own; nothing is
//! hard-coded. apt checks the signatures on the lists; the hash in the lists is checked by our own code as well.
//! Another [`Architecture`] than the host's has a state folder, and so package lists, of its own.

mod architecture;
mod closure;
mod error;
mod records;
mod run;
mod sources;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use architecture::Architecture;
pub use error::AptError;
pub use records::{Dependency, Package};

use crate::cache::{at_path, write_durably};
use crate::digest::Digest;
use crate::progress::Progress;
use run::{Tools, status_percent};
use sources::SourceFile;

/// Package lists older than this are fetched anew before anything is looked up in them.
const LISTS_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

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
    architecture: Architecture,
    tools: Tools,
    sources: Vec<SourceFile>,
    codename: Option<String>,
    updated: bool,
    /// What apt complained about during the last update, if that was more than nothing.
    trouble: Option<String>,
}

impl Apt {
    /// Prepares the state folder, which is for one architecture's packages only.
    ///
    /// # Errors
    /// [`AptError::Missing`] if the host has no apt; [`AptError::Store`] if the folder cannot be written.
    pub fn new(state: &Path, architecture: Architecture) -> Result<Self, AptError> {
        Self::with_search_path(state, architecture, None)
    }

    /// Like [`Self::new`], with programs looked up in `search_path` (as in `PATH`) if that is given.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_search_path(
        state: &Path,
        architecture: Architecture,
        search_path: Option<OsString>,
    ) -> Result<Self, AptError> {
        let tools = Tools::new(state, architecture, search_path)?;
        let (list, parts) = tools.source_paths()?;
        Ok(Self {
            state: state.to_owned(),
            architecture,
            tools,
            sources: sources::of_host(&list, &parts),
            codename: codename(),
            updated: false,
            trouble: None,
        })
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
        self.freshen(progress)?;
        if let Some(package) = self.look_up(name, version)? {
            return Ok(package);
        }
        let extra =
            self.codename.as_ref().and_then(|codename| match (version, self.architecture.release()) {
                (_, Some(release)) => sources::release(&self.sources, codename, release),
                (Version::Series(_), None) => sources::backports(&self.sources, codename),
                _ => None,
            });
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
            wanted: self.architecture.in_words().to_owned()
                + &match version {
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
        let output = self.tools.run("apt-get", &["download", &wanted], Some(into), &mut |line| {
            if let Some(percent) = status_percent(line) {
                done = done.max((package.size as f64 * percent / 100.0) as u64);
                progress.advance(done.min(package.size));
            }
        })?;
        if !output.success {
            return Err(self.tools.explain("apt-get", &output));
        }
        let file = fs::read_dir(into)
            .map_err(at_path("list", into))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension() == Some(OsStr::new("deb")))
            .ok_or_else(|| self.tools.explain("apt-get", &output))?;
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
        let output = self.tools.run("apt-get", &["update"], None, &mut |_| {
            done = done.max(folder_size(&lists).saturating_sub(before));
            progress.advance(done);
        })?;
        self.updated = true;
        self.trouble = None;
        let stamp = self.stamp();
        if output.success && !output.complaint() {
            write_durably(&stamp, self.sources_text().as_bytes())?;
        } else {
            match self.tools.explain("apt-get", &output) {
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
        let output = self.tools.run("apt-cache", &["show", which, name], None, &mut |_| {})?;
        // It fails if there is no such package, which is an answer.
        Ok(records::parse(&output.stdout))
    }

    /// Fetches the package lists if they are missing or old, unless that has been tried.
    fn freshen(&mut self, progress: &mut dyn Progress) -> Result<(), AptError> {
        if self.updated || self.lists_fresh() { Ok(()) } else { self.update(progress) }
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
