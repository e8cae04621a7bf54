//! Files and folders that the guest has open, by the number it was given.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// An open file or folder.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) file: OwnedFd,
    pub(crate) is_folder: bool,
    /// Held while the position in a folder is in use.
    pub(crate) position: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Arc<Open>>,
    next: u64,
}

/// All open files.
#[derive(Debug)]
pub(crate) struct Files {
    table: Mutex<Table>,
    most: usize,
}

impl Files {
    pub(crate) fn new(most: usize) -> Self {
        Self { table: Mutex::default(), most: most.max(1) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens one more by `open`, unless there are too many.
    pub(crate) fn add(
        &self,
        is_folder: bool,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<u64, Errno> {
        if self.table().open.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let file = open()?;
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        table.open.insert(id, Arc::new(Open { file, is_folder, position: Mutex::default() }));
        Ok(id)
    }

    pub(crate) fn get(&self, id: u64, is_folder: bool) -> Result<Arc<Open>, Errno> {
        let open = self.table().open.get(&id).cloned().ok_or(Errno::BADF)?;
        if open.is_folder == is_folder { Ok(open) } else { Err(Errno::BADF) }
    }

    pub(crate) fn remove(&self, id: u64) {
        self.table().open.remove(&id);
    }

    pub(crate) fn clear(&self) {
        self.table().open.clear();
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn count(&self) -> usize {
        self.table().open.len()
    }
}
