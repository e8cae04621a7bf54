//! What fw_cfg offers: items by key, files by name.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Keys that every fw_cfg has.
mod key {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const ID: u16 = 0x01;
    pub(super) const FILE_DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
    /// Bit 15 tells architecture-specific keys, bit 14 is the write flag of old.
    pub(super) const LIMIT: u16 = 0x4000;
}

/// The interface has the DMA part too.
const ID: u32 = 0b11;
/// Length of a directory entry's name, with the zero at its end.
const NAME_LEN: usize = 56;

/// Why something cannot be offered.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FwCfgError {
    /// The key is one of the fixed or the files' keys, or out of range.
    #[error("fw_cfg key {0:#x} is taken, reserved for files, or not below 0x4000; choose another")]
    BadKey(u16),
    /// The name is empty, too long, holds a zero byte, or is taken.
    #[error("fw_cfg file name {0:?} is empty, longer than 55 bytes, holds a zero byte, or is taken")]
    BadName(String),
    /// All file keys are in use.
    #[error("fw_cfg has no key left for file {0:?}; offer fewer files")]
    TooManyFiles(String),
    /// The length does not fit the directory's 32 bits.
    #[error("fw_cfg item of {0} bytes is too long; 4 GiB is the limit")]
    TooLong(u64),
}

/// The items of a [`super::FwCfg`], collected before it is made.
#[derive(Clone, Debug, Default)]
pub struct FwCfgItems {
    items: BTreeMap<u16, Arc<[u8]>>,
    files: BTreeMap<String, Arc<[u8]>>,
}

fn checked(bytes: Vec<u8>) -> Result<Arc<[u8]>, FwCfgError> {
    match u32::try_from(bytes.len()) {
        Ok(_) => Ok(bytes.into()),
        Err(_) => Err(FwCfgError::TooLong(bytes.len() as u64)),
    }
}

impl FwCfgItems {
    /// Nothing but what every fw_cfg has: signature, version and directory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an item with a fixed key: 2 to 0x18, 0x1a to 0x1f, or 0x8000 and above for the architecture's own.
    ///
    /// # Errors
    /// [`FwCfgError::BadKey`] if the key cannot be used, [`FwCfgError::TooLong`].
    pub fn add(&mut self, key: u16, bytes: Vec<u8>) -> Result<(), FwCfgError> {
        let reserved = matches!(key, key::SIGNATURE | key::ID | key::FILE_DIRECTORY);
        // Of an architecture's keys, too, the write flag is no part.
        let in_range = key < key::FIRST_FILE || (0x8000..0xc000).contains(&key);
        if reserved || !in_range || self.items.contains_key(&key) {
            return Err(FwCfgError::BadKey(key));
        }
        self.items.insert(key, checked(bytes)?);
        Ok(())
    }

    /// Adds a file. By convention names begin with `etc/` or `opt/`.
    ///
    /// # Errors
    /// [`FwCfgError::BadName`], [`FwCfgError::TooManyFiles`], [`FwCfgError::TooLong`].
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), FwCfgError> {
        let fits = !name.is_empty() && name.len() < NAME_LEN && !name.contains('\0');
        if !fits || self.files.contains_key(name) {
            return Err(FwCfgError::BadName(name.to_owned()));
        }
        if self.files.len() >= usize::from(key::LIMIT - key::FIRST_FILE) {
            return Err(FwCfgError::TooManyFiles(name.to_owned()));
        }
        self.files.insert(name.to_owned(), checked(bytes)?);
        Ok(())
    }

    /// All items by key. Files get theirs in order of their names, so that the same files have the same keys.
    pub(super) fn build(self) -> BTreeMap<u16, Arc<[u8]>> {
        let mut items = self.items;
        let mut directory = Vec::with_capacity(4 + self.files.len() * (8 + NAME_LEN));
        directory.extend((self.files.len() as u32).to_be_bytes());
        for ((name, bytes), key) in self.files.into_iter().zip(key::FIRST_FILE..) {
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name.as_bytes());
            directory.resize(directory.len() + NAME_LEN - name.len(), 0);
            items.insert(key, bytes);
        }
        items.insert(key::SIGNATURE, Arc::from(*b"QEMU"));
        items.insert(key::ID, Arc::from(ID.to_le_bytes()));
        items.insert(key::FILE_DIRECTORY, directory.into());
        items
    }
}
