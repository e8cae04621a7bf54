//! The order in which an image's tables reach the file, and stable storage.
//!
//! A process that is killed leaves what it wrote in the host's page cache, in order. A host that crashes does not: any part of
//! what was not synchronised may be missing. The library writes refcounts before the tables that lead to a new cluster, and the
//! other way round for one that is freed; this makes it so on stable storage, too. A table in use is written to only
//! when all that was written before is safe: the refcounts, and the data that it will lead to. New tables and
//! data need no such care, since nothing leads to them yet.
//!
//! One thing the library writes too early: the entry of a root table for a new table, whose refcount it still holds back. So
//! the count is put into the file here, before the entry. What the library writes there later says the same.

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use super::header::{Header, OFFSET, Qcow2Error, bytes, entries};
use crate::file::ImageFile;
use crate::{Buffers, HostBuffer, sys};

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
    /// Bits of a refcount.
    refcount_bits: u64,
    /// Whether anything has to reach stable storage.
    safe: bool,
    tables: RwLock<Tables>,
    /// Held while writing to a table in use.
    writing: Mutex<()>,
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
    pub(super) fn new(image: &ImageFile, header: &Header, safe: bool) -> Result<Self, Qcow2Error> {
        Ok(Self {
            cluster: 1 << header.cluster_bits,
            refcount_bits: 1 << header.refcount_order,
            safe,
            writing: Mutex::new(()),
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
        if !self.safe {
            return Ok(());
        }
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
        image: impl Fn() -> ImageFile,
    ) -> io::Result<()> {
        let end = offset + slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        let touches = |range: &Range<u64>| offset < range.end && range.start < end;
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let root = tables.roots.iter().any(touches);
        let header = offset < self.cluster;
        let table = root || header || tables.leaves.contains(&(offset & !(self.cluster - 1)));
        let new: Vec<u64> = match root {
            true => leaves(slices).into_iter().filter(|leaf| !tables.leaves.contains(leaf)).collect(),
            false => Vec::new(),
        };
        drop(tables);
        for leaf in &new {
            self.count(&image(), *leaf)?;
        }
        if table {
            self.sync(sync)?;
        }
        self.tables.write().unwrap_or_else(PoisonError::into_inner).leaves.extend(new);
        let one = table.then(|| self.writing.lock().unwrap_or_else(PoisonError::into_inner));
        write()?;
        drop(one);
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

    /// Puts the count of a cluster that nothing has led to yet into the file, if it is not there.
    fn count(&self, image: &ImageFile, leaf: u64) -> io::Result<()> {
        let index = leaf / self.cluster;
        let per_block = self.cluster * 8 / self.refcount_bits;
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let [_, reftable] = &tables.roots;
        let entry = reftable.start + index / per_block * 8;
        if entry >= reftable.end {
            return Ok(());
        }
        drop(tables);
        let block = bytes(image, entry..entry + 8, "refcount table").map_err(io::Error::other)?;
        let Some(block) = entries(&block).next().map(|entry| entry & OFFSET).filter(|block| *block != 0)
        else {
            // A block that counts itself, whose entry is what is about to be written.
            return Ok(());
        };
        // The count's last byte, which is all of it while it is 1, and the lowest bit of it.
        let bit = index % per_block * self.refcount_bits;
        let (byte, shift) = match self.refcount_bits {
            bits @ 0..8 => (bit / 8, bit % 8 / bits * bits),
            bits => ((bit + bits) / 8 - 1, 0),
        };
        let piece = image.direct.map_or(512, |direct| u64::from(direct.block));
        let at = (block + byte) & !(piece - 1);
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = HostBuffer::new(piece as usize);
        let buffers = Buffers::host(&buffer, piece as usize);
        // Where the file ends earlier, zeroes follow.
        sys::read(&image.file, at, &buffers, 0, 0)?;
        let mut found = [0];
        let place = (block + byte - at) as usize;
        buffer.read(place, &mut found);
        buffer.write(place, &[found[0] | 1 << shift]);
        match sys::write(&image.file, at, &buffers, 0, 0) {
            Ok(len) if len as u64 == piece => {
                self.wrote();
                Ok(())
            }
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(e) => Err(e),
        }
    }
}

/// Where the tables begin that entries lead to.
fn leaves(slices: &[IoSlice<'_>]) -> HashSet<u64> {
    let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
    entries(&bytes).map(|entry| entry & OFFSET).filter(|leaf| *leaf != 0).collect()
}
