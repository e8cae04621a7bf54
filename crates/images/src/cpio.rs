//! Writer of the cpio archives that Linux unpacks as its first root file system.
//!
//! Format: "newc", Linux `Documentation/driver-api/early-userspace/buffer-format.rst`. Every field is eight
//! hexadecimal digits, names and contents are padded to four bytes, several archives may follow each other.
//! Archives written here depend on their input only: no clock, no user, no inode of the host shows in them.

/// Length that a finished archive is padded to, so that any archive can be appended to any other.
const BLOCK: usize = 512;

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Why an entry cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// Leading slashes are dropped; what remains has to be a plain path.
    #[error(
        "the archive path `{0}` is empty or has an empty, `.`, `..` or NUL part; use a path such as `etc/motd`"
    )]
    BadPath(String),
    /// The size field has 32 bits.
    #[error("`{path}` has {size} bytes; a file in an initial RAM disk is limited to 4 GiB - 1")]
    TooLarge {
        /// Path in the archive.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
}

/// What kind of device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A character device.
    Character,
    /// A block device.
    Block,
}

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    inode: u32,
}

impl Writer {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder with the given permission bits.
    ///
    /// # Errors
    /// [`CpioError::BadPath`].
    pub fn folder(&mut self, path: &str, permissions: u32) -> Result<(), CpioError> {
        self.entry(path, S_IFDIR | permission_bits(permissions), 2, (0, 0), &[])
    }

    /// A regular file.
    ///
    /// # Errors
    /// [`CpioError::BadPath`], [`CpioError::TooLarge`].
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> Result<(), CpioError> {
        self.entry(path, S_IFREG | permission_bits(permissions), 1, (0, 0), contents)
    }

    /// A symbolic link to `target`, which is stored as it is.
    ///
    /// # Errors
    /// [`CpioError::BadPath`], also for an empty target or one with a NUL.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), CpioError> {
        if target.is_empty() || target.contains('\0') {
            return Err(CpioError::BadPath(target.to_owned()));
        }
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// A device node.
    ///
    /// # Errors
    /// [`CpioError::BadPath`].
    pub fn device(
        &mut self,
        path: &str,
        permissions: u32,
        kind: DeviceKind,
        major: u32,
        minor: u32,
    ) -> Result<(), CpioError> {
        let format = match kind {
            DeviceKind::Character => S_IFCHR,
            DeviceKind::Block => S_IFBLK,
        };
        self.entry(path, format | permission_bits(permissions), 1, (major, minor), &[])
    }

    /// The finished archive, padded so that another one can follow directly.
    pub fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 0, 1, (0, 0), 0);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self.bytes
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        contents: &[u8],
    ) -> Result<(), CpioError> {
        let path = clean(path)?;
        let size = u32::try_from(contents.len())
            .map_err(|_| CpioError::TooLarge { path: path.to_owned(), size: contents.len() as u64 })?;
        self.inode = self.inode.wrapping_add(1);
        self.header(path, self.inode, mode, links, device, size);
        self.bytes.extend_from_slice(contents);
        self.align();
        Ok(())
    }

    fn header(&mut self, path: &str, inode: u32, mode: u32, links: u32, device: (u32, u32), size: u32) {
        let name_size = path.len() as u32 + 1;
        let fields = [
            inode, mode, 0, /* uid */
            0, /* gid */
            links, 0, /* mtime */
            size, 0, /* device of the archive's file system, major */
            0, /* and minor */
            device.0, device.1, name_size, 0, /* checksum, unused in newc */
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn permission_bits(permissions: u32) -> u32 {
    permissions & 0o7777
}

/// A path without leading slashes, checked.
pub(crate) fn clean(path: &str) -> Result<&str, CpioError> {
    let clean = path.trim_start_matches('/');
    let bad = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
    // Linux limits a path to PATH_MAX, which counts the closing NUL.
    if clean.len() >= 4096 || clean.split('/').any(bad) {
        return Err(CpioError::BadPath(path.chars().take(200).collect()));
    }
    Ok(clean)
}

#[cfg(test)]
pub(crate) mod tests;
