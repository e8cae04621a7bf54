//! Reading kernels and initrds from files.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::BootError;

/// The most that is read of a kernel. Debian's vmlinux with all its debugging information has about 400 MiB.
const KERNEL_LIMIT: u64 = 1 << 30;

fn read(what: &'static str, path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    let fail = |source| BootError::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(fail(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let too_large = || BootError::FileTooLarge { what, path: path.to_owned(), limit };
    if metadata.len() > limit {
        return Err(too_large());
    }
    let mut data = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0).saturating_add(1));
    // A device or a pipe has no length of its own, so the bound holds while reading, too.
    file.take(limit.saturating_add(1)).read_to_end(&mut data).map_err(fail)?;
    if data.len() as u64 > limit { Err(too_large()) } else { Ok(data) }
}

/// Reads a kernel, at most 1 GiB.
///
/// # Errors
/// [`BootError::Read`] or [`BootError::FileTooLarge`].
pub fn read_kernel(path: &Path) -> Result<Vec<u8>, BootError> {
    read("kernel", path, KERNEL_LIMIT)
}

/// Reads an initrd of at most `limit` bytes; the machine's memory is a sensible limit.
///
/// # Errors
/// [`BootError::Read`] or [`BootError::FileTooLarge`].
pub fn read_initrd(path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    read("initrd", path, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_file_is_named() {
        let error = read_kernel(Path::new("/no/such/kernel")).unwrap_err();
        assert!(matches!(error, BootError::Read { .. }));
        assert!(error.to_string().contains("/no/such/kernel"), "{error}");
    }

    #[test]
    fn directory_is_refused() {
        assert!(matches!(read_kernel(Path::new("/")), Err(BootError::Read { .. })));
    }

    #[test]
    fn endless_file_is_bounded() {
        let error = read_initrd(Path::new("/dev/zero"), 1 << 20).unwrap_err();
        assert!(matches!(error, BootError::FileTooLarge { limit, .. } if limit == 1 << 20));
    }
}
