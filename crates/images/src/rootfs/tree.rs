//! Files and folders of a root file system in the making, with the owners that they will have.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::RootError;
use crate::cache::at_path;
use crate::deb;

/// Links on the way to one file. Linux itself stops after as many (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// Permissions, owner and age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) changed: u64,
}

impl Meta {
    /// Owned by root.
    pub(crate) fn root(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, changed: 0 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    Symlink(String),
}

/// The file system in the making. Paths are relative to its root, as a program inside would see them: links on the
/// way are followed within the tree.
#[derive(Debug)]
pub(crate) struct Tree {
    folder: PathBuf,
    /// By real path: no key leads through a link.
    entries: BTreeMap<String, (Kind, Meta)>,
}

impl Tree {
    /// An empty tree in the empty folder `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), entries: BTreeMap::new() }
    }

    /// A folder. One that is there already, or a link to one, stays and only takes the new permissions.
    pub(crate) fn add_folder(&mut self, path: &str, meta: Meta) -> Result<(), RootError> {
        let real = self.real(path, true)?;
        self.ensure_folder(&real)?;
        if let Some((_, old)) = self.entries.get_mut(&real) {
            *old = meta;
        }
        Ok(())
    }

    /// A file of `size` bytes from `contents`, which came out of the package `deb`. Takes the place of an older one.
    pub(crate) fn add_file(
        &mut self,
        path: &str,
        meta: Meta,
        size: u64,
        contents: &mut dyn Read,
        deb: &Path,
    ) -> Result<(), RootError> {
        let (real, place) = self.make_room(path)?;
        deb::store(contents, size, &place, deb)?;
        self.finish_file(real, meta)
    }

    /// A small file of ours. Takes the place of an older one.
    pub(crate) fn add_text(&mut self, path: &str, meta: Meta, text: &[u8]) -> Result<(), RootError> {
        let (real, place) = self.make_room(path)?;
        fs::write(&place, text).map_err(at_path("write", &place))?;
        self.finish_file(real, meta)
    }

    /// A second name of the file at `target`.
    pub(crate) fn add_hard_link(&mut self, path: &str, target: &str) -> Result<(), RootError> {
        let missing = || RootError::NoTarget { path: path.to_owned(), target: target.to_owned() };
        let from = self.real(target, false)?;
        let (kind, meta) = self.entries.get(&from).cloned().ok_or_else(missing)?;
        match kind {
            Kind::Folder => Err(missing()),
            Kind::Symlink(to) => self.add_symlink(path, &to, meta),
            Kind::File if self.real(path, false)? == from => Ok(()),
            Kind::File => {
                let (real, place) = self.make_room(path)?;
                fs::hard_link(self.folder.join(&from), &place).map_err(at_path("link", &place))?;
                self.entries.insert(real, (Kind::File, meta));
                Ok(())
            }
        }
    }

    /// A symbolic link. A folder that is there already stays: its link is one of those that other packages rely on.
    pub(crate) fn add_symlink(&mut self, path: &str, target: &str, meta: Meta) -> Result<(), RootError> {
        let real = self.real(path, false)?;
        if matches!(self.entries.get(&real), Some((Kind::Folder, _))) {
            return Err(RootError::NotAFolder(real));
        }
        let (real, _) = self.make_room(path)?;
        self.entries.insert(real, (Kind::Symlink(target.to_owned()), meta));
        Ok(())
    }

    /// Is something at the path, links followed?
    pub(crate) fn has(&self, path: &str) -> bool {
        self.real(path, true).is_ok_and(|real| self.entries.contains_key(&real))
    }

    /// The bytes of the file at the path, links followed.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, RootError> {
        let real = self.real(path, true)?;
        if !matches!(self.entries.get(&real), Some((Kind::File, _))) {
            return Err(RootError::MissingFile(path.into()));
        }
        let place = self.folder.join(real);
        Ok(fs::read(&place).map_err(at_path("read", &place))?)
    }

    /// Makes the links. Nothing can be added afterwards.
    pub(crate) fn make_links(&self) -> Result<(), RootError> {
        for (path, (kind, _)) in &self.entries {
            if let Kind::Symlink(target) = kind {
                let place = self.folder.join(path);
                symlink(target, &place).map_err(at_path("link", &place))?;
            }
        }
        Ok(())
    }

    /// Records files that a program of the host made in the tree's folder `path`, as root's.
    pub(crate) fn adopt(&mut self, path: &str) -> Result<(), RootError> {
        let real = self.real(path, true)?;
        let place = self.folder.join(&real);
        for entry in fs::read_dir(&place).map_err(at_path("list", &place))?.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            if is_file {
                self.entries.entry(format!("{real}/{name}")).or_insert((Kind::File, Meta::root(0o644)));
            }
        }
        Ok(())
    }

    /// Sets the folders' permissions and ages, deepest first; nothing may change below afterwards.
    pub(crate) fn seal(&self) -> Result<(), RootError> {
        for (path, (kind, meta)) in self.entries.iter().rev() {
            if *kind == Kind::Folder {
                set(&self.folder.join(path), *meta)?;
            }
        }
        Ok(())
    }

    /// Where it is on the host.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Everything whose owner on the host is not the one that it will have: path, user and group.
    pub(crate) fn strangers(&self) -> Result<Vec<(&str, u32, u32)>, RootError> {
        let mut strangers = Vec::new();
        for (path, (_, meta)) in &self.entries {
            let place = self.folder.join(path);
            let host = fs::symlink_metadata(&place).map_err(at_path("read", &place))?;
            if (host.uid(), host.gid()) != (meta.uid, meta.gid) {
                strangers.push((path.as_str(), meta.uid, meta.gid));
            }
        }
        Ok(strangers)
    }

    fn finish_file(&mut self, real: String, meta: Meta) -> Result<(), RootError> {
        set(&self.folder.join(&real), meta)?;
        self.entries.insert(real, (Kind::File, meta));
        Ok(())
    }

    /// The real path for a new file or link, with all folders on the way there and nothing in its place; and where
    /// that is on the host.
    fn make_room(&mut self, path: &str) -> Result<(String, PathBuf), RootError> {
        let real = self.real(path, false)?;
        if let Some((parent, _)) = real.rsplit_once('/') {
            self.ensure_folder(parent)?;
        }
        let place = self.folder.join(&real);
        match self.entries.get(&real) {
            Some((Kind::Folder, _)) => return Err(RootError::NotAFolder(real)),
            Some((Kind::File, _)) => fs::remove_file(&place).map_err(at_path("remove", &place))?,
            Some((Kind::Symlink(_), _)) | None => {}
        }
        self.entries.remove(&real);
        Ok((real, place))
    }

    /// Makes a folder at a real path, and those on the way to it.
    fn ensure_folder(&mut self, real: &str) -> Result<(), RootError> {
        let ends = real.match_indices('/').map(|(at, _)| at).chain([real.len()]);
        for path in ends.filter_map(|end| real.get(..end)).filter(|path| !path.is_empty()) {
            match self.entries.get(path) {
                Some((Kind::Folder, _)) => {}
                Some(_) => return Err(RootError::NotAFolder(path.to_owned())),
                None => {
                    let place = self.folder.join(path);
                    fs::create_dir(&place).map_err(at_path("create", &place))?;
                    self.entries.insert(path.to_owned(), (Kind::Folder, Meta::root(0o755)));
                }
            }
        }
        Ok(())
    }

    /// The path with every link on the way followed, and the last one too if `follow_last`. What does not exist stays
    /// as it is written. Cannot leave the tree: `..` at its root stays there.
    fn real(&self, path: &str, follow_last: bool) -> Result<String, RootError> {
        let mut open: VecDeque<String> = path.split('/').map(str::to_owned).collect();
        let mut real: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(part) = open.pop_front() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    real.pop();
                    continue;
                }
                _ => real.push(part),
            }
            let last = open.iter().all(|part| part.is_empty() || part == ".");
            match self.entries.get(&real.join("/")) {
                Some((Kind::Symlink(target), _)) if follow_last || !last => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(RootError::LinkLoop(path.to_owned()));
                    }
                    real.pop();
                    if target.starts_with('/') {
                        real.clear();
                    }
                    for part in target.split('/').rev() {
                        open.push_front(part.to_owned());
                    }
                }
                Some((Kind::File, _)) if !last => return Err(RootError::NotAFolder(real.join("/"))),
                _ => {}
            }
        }
        Ok(real.join("/"))
    }
}

/// Sets permissions and age of a file or folder on the host.
fn set(place: &Path, meta: Meta) -> Result<(), RootError> {
    let file = fs::File::open(place).map_err(at_path("open", place))?;
    let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(meta.changed);
    file.set_modified(changed).map_err(at_path("change", place))?;
    file.set_permissions(fs::Permissions::from_mode(meta.mode)).map_err(at_path("change", place))?;
    Ok(())
}

#[cfg(test)]
mod tests;
