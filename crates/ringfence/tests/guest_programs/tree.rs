//! A folder with everything in it as lines of text, for the guest's program and for the host that looks at the same folder.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// FNV-1a.
fn sum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Adds a line for everything in `folder`, whose names begin with `prefix`.
pub(crate) fn list(folder: &Path, prefix: &str, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_str().unwrap()));
        let about = fs::symlink_metadata(&path).unwrap();
        let line = if about.is_dir() {
            list(&path, &format!("{name}/"), into);
            format!("{name} folder")
        } else if about.is_symlink() {
            format!("{name} link {}", fs::read_link(&path).unwrap().display())
        } else {
            format!("{name} file {} {} {:x}", about.len(), about.nlink(), sum(&fs::read(&path).unwrap()))
        };
        into.push(line);
    }
}
