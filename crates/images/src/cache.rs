//! The folder that keeps fetched images, and the rules that make it safe to share.
//!
//! ```text
//! <cache>/lock            held by whoever changes anything below
//! <cache>/tmp/            work in progress; left-overs of killed processes are swept by the next holder
//! <cache>/apt/            package lists of our own, those for i386 in apt-i386
//! <cache>/images/<name>/  one finished image: manifest.json and its files
//! ```
//! An image appears by renaming a finished folder, so a reader sees all of it or nothing, and needs no lock.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::apt::Architecture;

/// Overrides where the cache is.
pub const CACHE_VARIABLE: &str = "RINGFENCE_CACHE";

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither variable nor home folder.
    #[error("there is no home folder to keep images in; set {CACHE_VARIABLE} to a folder")]
    NoFolder,
    /// The variable has to work from every folder.
    #[error("{CACHE_VARIABLE} is `{0}`; give a path that begins with `/`")]
    NotAbsolute(PathBuf),
    /// No room.
    #[error(
        "no space left while trying to {action} `{path}`; free some (an image takes up to 1 GiB while it is \
         fetched) or set {CACHE_VARIABLE} to a folder on another disk"
    )]
    DiskFull {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
    },
    /// Any other trouble with a file.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// For `map_err`: says what was done to which file.
pub(crate) fn at_path(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CacheError::DiskFull { action, path },
        _ => CacheError::Io { action, path, source },
    }
}

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// The right to change the cache; given up when dropped or when the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Cache {
    /// The user's cache: `$RINGFENCE_CACHE`, else `$XDG_CACHE_HOME/ringfence`, else `~/.cache/ringfence`.
    /// Nothing is created yet.
    ///
    /// # Errors
    /// [`CacheError::NoFolder`], [`CacheError::NotAbsolute`].
    pub fn of_user() -> Result<Self, CacheError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(root) = variable(CACHE_VARIABLE) {
            if !root.is_absolute() {
                return Err(CacheError::NotAbsolute(root));
            }
            return Ok(Self { root });
        }
        // XDG base directory specification: a relative path is invalid and to be ignored.
        let base = variable("XDG_CACHE_HOME")
            .filter(|path| path.is_absolute())
            .or_else(|| Some(std::env::home_dir().filter(|home| home.is_absolute())?.join(".cache")));
        Ok(Self { root: base.ok_or(CacheError::NoFolder)?.join("ringfence") })
    }

    /// A cache in the given folder.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where our own package lists for an architecture are.
    pub fn apt_state(&self, architecture: Architecture) -> PathBuf {
        self.root.join(match architecture {
            Architecture::Amd64 => "apt",
            Architecture::I386 => "apt-i386",
        })
    }

    /// Where an image is or will be. Names come from the catalogue's table; `:` becomes `-`.
    pub fn image(&self, name: &str) -> PathBuf {
        self.root.join("images").join(name.replace([':', '/'], "-"))
    }

    /// Waits for the lock. `waiting` is called once if somebody else has it.
    ///
    /// # Errors
    /// The folder or the lock file cannot be made or locked.
    pub fn lock(&self, waiting: &mut dyn FnMut()) -> Result<Lock, CacheError> {
        fs::create_dir_all(&self.root).map_err(at_path("create", &self.root))?;
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(at_path("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(at_path("lock", &path))?;
            }
            Err(fs::TryLockError::Error(source)) => {
                return Err(at_path("lock", &path)(source));
            }
        }
        Ok(Lock { _file: file })
    }

    /// A scratch folder on the cache's own file system, removed when dropped. What killed processes left behind is
    /// removed first: the lock says that nobody uses it.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn scratch(&self, _lock: &Lock) -> Result<tempfile::TempDir, CacheError> {
        let folder = self.root.join("tmp");
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(at_path("remove", &folder))?;
        }
        fs::create_dir_all(&folder).map_err(at_path("create", &folder))?;
        tempfile::tempdir_in(&folder).map_err(at_path("create", &folder))
    }

    /// Makes the folder `ready` the image `name`, in place of an older one.
    ///
    /// # Errors
    /// A folder cannot be moved.
    pub fn publish(&self, lock: &Lock, name: &str, ready: &Path) -> Result<(), CacheError> {
        let target = self.image(name);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(at_path("create", folder))?;
        }
        self.retire(lock, name)?;
        fs::rename(ready, &target).map_err(at_path("create", &target))
    }

    /// Removes an image; gives `false` if there was none. The folder is moved away first, so that a reader never
    /// meets half of it.
    ///
    /// # Errors
    /// The folder cannot be moved or removed.
    pub fn retire(&self, _lock: &Lock, name: &str) -> Result<bool, CacheError> {
        let target = self.image(name);
        let grave = self.root.join("tmp").join(format!("retired-{}", std::process::id()));
        if let Some(folder) = grave.parent() {
            fs::create_dir_all(folder).map_err(at_path("create", folder))?;
        }
        match fs::rename(&target, &grave) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(at_path("remove", &target)(error)),
        }
        let removed = if grave.is_dir() { fs::remove_dir_all(&grave) } else { fs::remove_file(&grave) };
        removed.map_err(at_path("remove", &grave))?;
        Ok(true)
    }
}

/// Writes a file and makes sure that its contents are on disk before anything refers to it.
pub(crate) fn write_durably(path: &Path, contents: &[u8]) -> Result<(), CacheError> {
    let mut file = File::create(path).map_err(at_path("create", path))?;
    io::Write::write_all(&mut file, contents).map_err(at_path("write", path))?;
    file.sync_all().map_err(at_path("write", path))
}

#[cfg(test)]
mod tests;
