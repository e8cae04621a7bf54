//! Unpacks the files we want out of a Debian package, by our own code.
//!
//! A package is an `ar` archive of three members (deb(5)): `debian-binary`, `control.tar*`, `data.tar*`.
//! A package is checked against the hash in its distribution's signed lists before it comes here; still, nothing
//! in it is trusted: paths cannot leave the target folder, links are never followed, and every size has a limit.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::cache::{CacheError, at_path};
use crate::decompress;

const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER: usize = 60;

/// A package has three members; a few more are allowed for (deb(5): future versions may add some).
const MAX_MEMBERS: usize = 16;
/// Entries in `data.tar`; Debian's largest package has about 100,000.
const MAX_ENTRIES: usize = 500_000;
/// Size of one file that we take out, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Size of `data.tar` without compression, in bytes.
const MAX_DATA: u64 = 4 << 30;
/// A path inside a package, in bytes.
const MAX_PATH: u64 = 4096;

/// Why a package cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// The outer archive is not one.
    #[error("`{path}` is not a Debian package: {reason}; delete it and fetch it again")]
    Malformed {
        /// The package file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `data.tar` cannot be read.
    #[error("the contents of the Debian package `{path}` cannot be read; delete it and fetch it again")]
    Data {
        /// The package file.
        path: PathBuf,
        /// The decoder's complaint.
        #[source]
        source: io::Error,
    },
    /// A path in the package would leave the target folder.
    #[error("the Debian package `{path}` holds the unsafe path `{entry}`; nothing of it was used")]
    UnsafePath {
        /// The package file.
        path: PathBuf,
        /// The offending path.
        entry: String,
    },
    /// Writing what was unpacked failed.
    #[error(transparent)]
    Store(#[from] CacheError),
}

/// Unpacks regular files of the package `deb` into the folder `into`.
///
/// `select` is asked for every path (no leading `./`, checked to be relative and without `..`) and answers with the
/// path to store it at, relative to `into`. `progress` hears how many bytes of the package are done. Returned are
/// the relative paths that were written, in the package's order.
///
/// # Errors
/// See [`DebError`]. Files written before an error stay; `into` should be a scratch folder.
pub fn unpack(
    deb: &Path,
    into: &Path,
    select: &mut dyn FnMut(&str) -> Option<String>,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<String>, DebError> {
    let mut written = Vec::new();
    let mut visit = |member: Member<'_>| {
        if member.kind != MemberKind::File {
            return Ok(());
        }
        let Some(target) = select(member.path) else { return Ok(()) };
        let target = safe(deb, &target)?.to_owned();
        store(member.contents, member.size, &into.join(&target), deb)?;
        written.push(target);
        Ok::<(), DebError>(())
    };
    walk(deb, &mut visit, progress)?;
    Ok(written)
}

/// What an entry of a package is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MemberKind {
    Folder,
    File,
    /// The target, as it stands in the package.
    Symlink(String),
    /// The path of an earlier file, as it stands in the package.
    HardLink(String),
}

/// An entry of a package.
pub(crate) struct Member<'a> {
    /// Without leading `./` or closing `/`, checked to be relative and without `..`.
    pub(crate) path: &'a str,
    pub(crate) kind: MemberKind,
    /// Permission bits, those for set-user-id and the like included.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) changed: u64,
    /// Bytes in a file.
    pub(crate) size: u64,
    pub(crate) contents: &'a mut dyn Read,
}

/// Hands every folder, file and link of the package to `visit`, in the package's order. Devices and the like are left
/// out. `progress` hears how many bytes of the package are done.
pub(crate) fn walk<E: From<DebError>>(
    deb: &Path,
    visit: &mut dyn FnMut(Member<'_>) -> Result<(), E>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), E> {
    let (name, member, start) = open_data(deb)?;
    let read = Rc::new(Cell::new(start));
    let counted = Counted { inner: BufReader::with_capacity(256 << 10, member), read: Rc::clone(&read) };
    let bad_data = |source| DebError::Data { path: deb.to_owned(), source };
    let plain = decompress::by_suffix(&name, counted).map_err(bad_data)?.ok_or_else(|| {
        malformed(deb, format!("its member `{name}` is compressed in a way that is not known here"))
    })?;
    let mut archive = tar::Archive::new(plain.take(MAX_DATA));
    let (mut long_path, mut long_link): (Option<String>, Option<String>) = (None, None);
    // Raw entries: the long-path records are read here, where their length has a limit.
    for (count, entry) in archive.entries().map_err(bad_data)?.raw(true).enumerate() {
        let mut entry = entry.map_err(bad_data)?;
        progress(read.get());
        if count >= MAX_ENTRIES {
            return Err(malformed(deb, format!("it has more than {MAX_ENTRIES} files")).into());
        }
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_gnu_longlink() {
            let bytes = decompress::read_at_most(&mut entry, MAX_PATH).map_err(bad_data)?;
            let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
            let long = text(deb, bytes.get(..end).unwrap_or_default())?;
            *(if kind.is_gnu_longname() { &mut long_path } else { &mut long_link }) = Some(long);
            continue;
        }
        let path = match long_path.take() {
            Some(path) => path,
            None => text(deb, &entry.header().path_bytes())?,
        };
        let link = match (long_link.take(), entry.header().link_name_bytes()) {
            (Some(link), _) => link,
            (None, Some(bytes)) => text(deb, &bytes)?,
            (None, None) => String::new(),
        };
        let kind = if kind.is_file() || kind.is_contiguous() {
            MemberKind::File
        } else if kind.is_dir() {
            MemberKind::Folder
        } else if kind.is_symlink() {
            MemberKind::Symlink(link)
        } else if kind.is_hard_link() {
            MemberKind::HardLink(link)
        } else {
            continue;
        };
        let path = match kind {
            // The folder that everything is in.
            MemberKind::Folder if matches!(path.as_str(), "." | "./" | "/") => continue,
            MemberKind::Folder => path.strip_suffix('/').unwrap_or(&path),
            _ => &path,
        };
        let path = safe(deb, path)?;
        let size = match kind {
            MemberKind::File => entry.header().size().map_err(bad_data)?,
            _ => 0,
        };
        if size > MAX_FILE {
            return Err(malformed(deb, format!("its file `{path}` claims {size} bytes")).into());
        }
        let header = entry.header().clone();
        let id =
            |value: u64| u32::try_from(value).map_err(|_| malformed(deb, format!("the owner of `{path}`")));
        visit(Member {
            path,
            kind,
            mode: header.mode().map_err(bad_data)? & 0o7777,
            uid: id(header.uid().map_err(bad_data)?)?,
            gid: id(header.gid().map_err(bad_data)?)?,
            changed: header.mtime().map_err(bad_data)?,
            size,
            contents: &mut entry,
        })?;
    }
    progress(read.get());
    Ok(())
}

/// Finds `data.tar*`: its name, a reader of exactly its bytes, and where in the file it starts.
fn open_data(deb: &Path) -> Result<(String, io::Take<File>, u64), DebError> {
    let mut file = File::open(deb).map_err(at_path("open", deb))?;
    let length = file.metadata().map_err(at_path("read", deb))?.len();
    let mut magic = [0u8; AR_MAGIC.len()];
    if file.read_exact(&mut magic).is_err() || &magic != AR_MAGIC {
        return Err(malformed(deb, "it does not begin as an ar archive".to_owned()));
    }
    let mut position = AR_MAGIC.len() as u64;
    for index in 0..MAX_MEMBERS {
        let mut header = [0u8; AR_HEADER];
        file.read_exact(&mut header)
            .map_err(|_| malformed(deb, "it ends before its `data.tar` member".to_owned()))?;
        position += AR_HEADER as u64;
        let (name, size) = parse_header(&header)
            .ok_or_else(|| malformed(deb, format!("the header of its member {index} is damaged")))?;
        if size > length.saturating_sub(position) {
            return Err(malformed(
                deb,
                format!("its member `{name}` claims {size} bytes, more than the file has left"),
            ));
        }
        if index == 0 && name != "debian-binary" {
            return Err(malformed(deb, format!("its first member is `{name}`, not `debian-binary`")));
        }
        if name == "data.tar" || name.starts_with("data.tar.") {
            return Ok((name, file.take(size), position));
        }
        // Members start at even offsets; `size` is at most the file's length, so this cannot overflow.
        position += size + size % 2;
        file.seek(SeekFrom::Start(position)).map_err(at_path("read", deb))?;
    }
    Err(malformed(deb, "it has no `data.tar` member".to_owned()))
}

/// Name and size of an ar member, from its fixed-width text header.
fn parse_header(header: &[u8; AR_HEADER]) -> Option<(String, u64)> {
    if header.get(58..60) != Some(b"`\n") {
        return None;
    }
    let field = |range| std::str::from_utf8(header.get(range)?).ok();
    let name = field(0..16)?.trim_end().trim_end_matches('/');
    let size = field(48..58)?.trim_end();
    if name.is_empty() || !size.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    Some((name.to_owned(), size.parse().ok()?))
}

/// Writes a file of the package to a path where nothing is yet.
pub(crate) fn store(entry: &mut dyn Read, size: u64, target: &Path, deb: &Path) -> Result<(), DebError> {
    if let Some(folder) = target.parent() {
        std::fs::create_dir_all(folder).map_err(at_path("create", folder))?;
    }
    // A path that comes twice is refused here, so no entry can replace another.
    let mut file = File::create_new(target).map_err(at_path("create", target))?;
    let mut left = size;
    let mut chunk = vec![0u8; 256 << 10];
    while left > 0 {
        let want = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
        let part = chunk.get_mut(..want).unwrap_or_default();
        entry.read_exact(part).map_err(|source| DebError::Data { path: deb.to_owned(), source })?;
        io::Write::write_all(&mut file, part).map_err(at_path("write", target))?;
        left -= want as u64;
    }
    Ok(())
}

/// A package's path as a plain relative one.
fn safe<'a>(deb: &Path, entry: &'a str) -> Result<&'a str, DebError> {
    let mut path = entry;
    while let Some(rest) = path.strip_prefix("./") {
        path = rest;
    }
    if path.len() as u64 > MAX_PATH
        || path.split('/').any(|part| matches!(part, "" | "." | "..") || part.contains('\0'))
    {
        return Err(DebError::UnsafePath {
            path: deb.to_owned(),
            entry: entry.chars().take(200).collect::<String>().escape_debug().to_string(),
        });
    }
    Ok(path)
}

fn text(deb: &Path, bytes: &[u8]) -> Result<String, DebError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| DebError::UnsafePath {
        path: deb.to_owned(),
        entry: String::from_utf8_lossy(bytes).into_owned(),
    })
}

fn malformed(path: &Path, reason: String) -> DebError {
    DebError::Malformed { path: path.to_owned(), reason }
}

/// Counts what a decoder takes in, for the progress display.
struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read.set(self.read.get() + count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
