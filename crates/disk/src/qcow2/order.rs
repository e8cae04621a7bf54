//! The order in which an image's tables reach stable storage.
//!
//! A process that is killed leaves what it wrote in the host's page cache, in order. A host that crashes does not: any part of
//! what was not synchronised may be missing. The library writes refcounts before the tables that lead to a new cluster, and the
//! other way round for one that is freed; this makes it so on stable storage, too. A table in use is written to only
//! when all that was written before is safe: the refcounts, and the data that it will lead to. New tables and
//! data need no such care, since nothing leads to them yet.

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use super::header::{Header, OFFSET, Qcow2Error, bytes, entries};
use crate::file::ImageFile;

/// Which parts of a file are tables in use.
#[derive(Debug)]
struct Tables {
    /// The L1 table and the refcount table.
    roots: [Range<u64>; 2],
    /// Where the L2 tables and the refcount blocks begin that they lead to, or led to once.
    leaves: HashSet<u64>,
}

impl Tables {
    fn read(image: &ImageFile, header: &Header) -> Result<Self, Qcow2Error> {
        let l1 = bytes(image, header.l1.clone(), "L1 table")?;
        let mut leaves: HashSet<u64> = entries(&l1).map(|entry| entry & OFFSET).collect();
        leaves.extend(header.refcount_blocks(image)?);
        Ok(Self { roots: [header.l1.clone(), header.reftable.clone()], leaves })
    }
}

/// The order of one file's writes.
#[derive(Debug)]
pub(super) struct Order {
    cluster: u64,
    tables: RwLock<Tables>,
    /// Something was written since the last synchronisation.
    written: AtomicBool,
    /// Held while synchronising: whoever wants the same waits for it.
    syncing: Mutex<()>,
}

impl Order {
    /// The order of an image's writes.
    ///
    /// # Errors
    /// [`Qcow2Error`] if its tables cannot be read or cannot be.
    pub(super) fn new(image: &ImageFile, header: &Header) -> Result<Self, Qcow2Error> {
        Ok(Self {
            cluster: 1 << header.cluster_bits,
            tables: RwLock::new(Tables::read(image, header)?),
            written: AtomicBool::new(true),
            syncing: Mutex::new(()),
        })
    }

    /// Notes that something was written.
    pub(super) fn wrote(&self) {
        self.written.store(true, Ordering::Release);
    }

    /// Calls `sync` if there is anything to synchronise; afterwards all that was written before this call is safe.
    pub(super) fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.written.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let result = sync();
        if result.is_err() {
            self.wrote();
        }
        result
    }

    /// Has `write` write the slices to `offset`, and everything safe before if a table in use is there. `image` gives the
    /// file as it is then.
    pub(super) fn write(
        &self,
        offset: u64,
        slices: &[IoSlice<'_>],
        sync: impl FnOnce() -> io::Result<()>,
        write: impl FnOnce() -> io::Result<()>,
        image: impl FnOnce() -> ImageFile,
    ) -> io::Result<()> {
        let end = offset + slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        let touches = |range: &Range<u64>| offset < range.end && range.start < end;
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let root = tables.roots.iter().any(touches);
        let header = offset < self.cluster;
        let table = root || header || tables.leaves.contains(&(offset & !(self.cluster - 1)));
        drop(tables);
        if table {
            self.sync(sync)?;
        }
        if root {
            self.learn(slices);
        }
        write()?;
        if header {
            // A root may have moved, and have leaves now that it did not have before.
            let image = image();
            if let Ok(new) = Header::read(&image).and_then(|header| Tables::read(&image, &header)) {
                let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
                tables.roots = new.roots;
                tables.leaves.extend(new.leaves);
            }
        }
        Ok(())
    }

    /// Learns from what is being written to a root where tables are.
    fn learn(&self, slices: &[IoSlice<'_>]) {
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.leaves.extend(entries(&bytes).map(|entry| entry & OFFSET));
    }
}
