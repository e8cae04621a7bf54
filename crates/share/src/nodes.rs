//! What the guest knows of the folder: nodes by number.
//!
//! A node stands for a file of the host (device and inode number) for as long as the guest remembers it. It may have a descriptor, opened with
//! `O_PATH`; when there are too many of those, the ones that were not used for a while are closed (a clock: used since the hand came
//! by last, or not). A node without one is opened again by its name in the folder where it was seen last, which must lead to the same file.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;

/// The folder itself.
pub(crate) const ROOT: u64 = 1;
/// Nodes that the guest may know at once; about 200 bytes each here, and much more in the guest.
const MOST: usize = 1 << 20;
/// Folders between the root and a node that are opened again.
const DEEPEST: usize = 4096;

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    inode: u64,
}

#[derive(Debug)]
struct Node {
    key: Key,
    kind: FileType,
    /// Where it was seen last.
    parent: u64,
    name: CString,
    /// How often the guest was told of it.
    lookups: u64,
    file: Option<Arc<OwnedFd>>,
    used: bool,
}

#[derive(Debug)]
struct Table {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    /// Nodes with a descriptor, and some that had one.
    clock: VecDeque<u64>,
    open: usize,
    next: u64,
}

/// All nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    table: Mutex<Table>,
    root: Arc<OwnedFd>,
    root_stat: Stat,
    /// Descriptors at most, without the root's.
    most_open: usize,
    most: usize,
}

/// A node, as far as it is needed for a request.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Opened with `O_PATH`.
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) kind: FileType,
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn key(stat: &Stat) -> Key {
    Key { device: stat.st_dev, inode: stat.st_ino }
}

/// What an open file is like; also of one opened with `O_PATH`.
pub(crate) fn stat(file: &OwnedFd) -> Result<Stat, Errno> {
    statat(file, c"", AtFlags::EMPTY_PATH)
}

/// Opens what `name` is in `folder`, whatever it is, without following it.
pub(crate) fn open_path(folder: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

impl Nodes {
    pub(crate) fn new(root: OwnedFd, most_open: usize) -> Result<Self, Errno> {
        let root_stat = stat(&root)?;
        let table = Table {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            clock: VecDeque::new(),
            open: 0,
            next: ROOT + 1,
        };
        Ok(Self {
            table: Mutex::new(table),
            root: Arc::new(root),
            root_stat,
            most_open: most_open.max(1),
            most: MOST,
        })
    }

    #[cfg(test)]
    pub(crate) fn limit(&mut self, most: usize) {
        self.most = most;
    }

    /// The device that the folder's file system has.
    pub(crate) fn device(&self) -> u64 {
        self.root_stat.st_dev
    }

    /// The folder's inode number.
    pub(crate) fn root_inode(&self) -> u64 {
        self.root_stat.st_ino
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node by its number.
    pub(crate) fn get(&self, id: u64) -> Result<Found, Errno> {
        if id == ROOT {
            return Ok(Found { file: Arc::clone(&self.root), kind: FileType::Directory });
        }
        // The way up to the first that is open.
        let (mut way, mut at) = (Vec::new(), id);
        let mut found = loop {
            if at == ROOT {
                break Found { file: Arc::clone(&self.root), kind: FileType::Directory };
            }
            let mut table = self.table();
            let node = table.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            node.used = true;
            if let Some(file) = &node.file {
                break Found { file: Arc::clone(file), kind: node.kind };
            }
            if way.len() >= DEEPEST {
                return Err(Errno::STALE);
            }
            way.push((at, node.key, node.kind, node.name.clone()));
            at = node.parent;
        };
        // And down again.
        for (id, wanted, kind, name) in way.into_iter().rev() {
            let file = open_path(&found.file, &name).map_err(|_| Errno::STALE)?;
            if key(&stat(&file)?) != wanted {
                return Err(Errno::STALE);
            }
            found = Found { file: Arc::new(file), kind };
            self.table().opened(id, &found.file, self.most_open);
        }
        Ok(found)
    }

    /// The folder with this number.
    pub(crate) fn folder(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let found = self.get(id)?;
        if found.kind == FileType::Directory { Ok(found.file) } else { Err(Errno::NOTDIR) }
    }

    /// Tells the guest of what `name` in the folder `parent`, which is open as `folder`, is: its node's number.
    pub(crate) fn look_up(&self, parent: u64, folder: &OwnedFd, name: &CStr) -> Result<(u64, Stat), Errno> {
        let file = open_path(folder, name)?;
        let stat = stat(&file)?;
        if key(&stat) == key(&self.root_stat) {
            // Mounted below itself. The guest's kernel allows no folder to have two parents.
            return Err(Errno::LOOP);
        }
        let mut table = self.table();
        let id = match table.by_key.get(&key(&stat)) {
            Some(&id) => id,
            None if table.nodes.len() >= self.most => return Err(Errno::NFILE),
            None => {
                let id = table.next;
                table.next += 1;
                table.by_key.insert(key(&stat), id);
                let node = Node {
                    key: key(&stat),
                    kind: kind(&stat),
                    parent,
                    name: name.to_owned(),
                    lookups: 0,
                    file: None,
                    used: true,
                };
                table.nodes.insert(id, node);
                id
            }
        };
        if let Some(node) = table.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_add(1);
            node.parent = parent;
            if *node.name != *name {
                node.name = name.to_owned();
            }
            // An inode's number may have come to another kind of file.
            node.kind = kind(&stat);
            if node.file.is_none() {
                table.opened(id, &Arc::new(file), self.most_open);
            }
        }
        Ok((id, stat))
    }

    /// `name` in `parent` has come there by a rename.
    pub(crate) fn moved(&self, parent: u64, folder: &OwnedFd, name: &CStr) {
        let Ok(stat) = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else { return };
        let mut table = self.table();
        let Some(&id) = table.by_key.get(&key(&stat)) else { return };
        if let Some(node) = table.nodes.get_mut(&id) {
            (node.parent, node.name) = (parent, name.to_owned());
        }
    }

    /// The guest forgets that it was told of a node so many times.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let mut table = self.table();
        let Some(node) = table.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if let Some(node) = table.nodes.remove(&id) {
            table.open -= usize::from(node.file.is_some());
            table.by_key.remove(&node.key);
        }
        table.tidy();
    }

    /// Forgets all, for a guest that begins anew.
    pub(crate) fn clear(&self) {
        let mut table = self.table();
        table.nodes.clear();
        table.by_key.clear();
        table.clock.clear();
        table.open = 0;
    }

    /// Nodes, and how many have a descriptor.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn count(&self) -> (usize, usize) {
        let table = self.table();
        (table.nodes.len(), table.open)
    }
}

impl Table {
    /// A node has been opened; another one is closed for it if there are too many.
    fn opened(&mut self, id: u64, file: &Arc<OwnedFd>, most: usize) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.file.is_none()) else { return };
        (node.file, node.used) = (Some(Arc::clone(file)), true);
        self.open += 1;
        self.clock.push_back(id);
        while self.open > most {
            let Some(oldest) = self.clock.pop_front() else { break };
            let Some(node) = self.nodes.get_mut(&oldest).filter(|node| node.file.is_some()) else { continue };
            if std::mem::take(&mut node.used) {
                self.clock.push_back(oldest);
            } else {
                node.file = None;
                self.open -= 1;
            }
        }
        self.tidy();
    }

    /// The clock keeps some numbers of nodes that are closed or gone, but not many.
    fn tidy(&mut self) {
        if self.clock.len() > self.open * 2 + 64 {
            let nodes = &self.nodes;
            self.clock.retain(|id| nodes.get(id).is_some_and(|node| node.file.is_some()));
        }
    }
}
