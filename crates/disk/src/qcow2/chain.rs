//! From a path to an image with everything that it stands on.
//!
//! What a header says is what a stranger may have written, a guest with a raw disk among them. So a backing file is opened
//! only if it lies in the folder that the user has allowed, its format is what the header says and never guessed, and
//! a chain has an end.

use std::collections::HashSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::header::{BackingName, Header, Qcow2Error};
use super::order::Order;
use super::storage::{Health, Storage};
use crate::file::ImageFile;
use crate::{DiskFormat, ImageError};

/// Images of a chain at most; each costs a look for data that the ones above do not have.
const MAX_DEPTH: usize = 64;

/// Why a backing file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The user has not allowed any.
    #[error("backing files are opened only from a folder that you name: add ,backing={}", folder.display())]
    NotAllowed {
        /// Where it is.
        folder: PathBuf,
    },
    /// It lies elsewhere.
    #[error("it is not in {}, the only folder that backing= allows", allowed.display())]
    Outside {
        /// The folder that is allowed.
        allowed: PathBuf,
    },
    /// It cannot be found.
    #[error("{0}; check the path, which starts from the image's own folder")]
    NotFound(std::io::Error),
    /// The image does not say in which format it is.
    #[error(
        "the image does not say what format it has, and it is never guessed; say it: qemu-img rebase -u -F \
         raw|qcow2 -b BACKING IMAGE"
    )]
    NoFormat,
    /// A format that is not known.
    #[error("its format is {0:?}, and there are raw and qcow2")]
    UnknownFormat(String),
    /// It stands on itself.
    #[error("the chain of backing files leads back to itself")]
    Loop,
    /// The chain has no end in sight.
    #[error("the chain of backing files has more than {MAX_DEPTH} images; shorten it: qemu-img rebase")]
    TooDeep,
}

/// An image with everything that it stands on.
pub(super) struct Chain {
    pub(super) image: FormatAccess<Storage>,
    /// Of the file at the top, the only one that is written to.
    pub(super) health: Arc<Health>,
    /// Bytes in a block of direct I/O, 512 without.
    pub(super) block: u32,
}

/// What to open, and how.
pub(super) struct Wanted<'a> {
    pub(super) path: &'a Path,
    /// The folder that backing files may be in.
    pub(super) backing: Option<&'a Path>,
    pub(super) write: bool,
    pub(super) direct: bool,
    /// Whether what is written must outlive a crash of the host.
    pub(super) safe: bool,
}

/// One file of a chain.
struct Layer {
    path: PathBuf,
    file: ImageFile,
    /// None for a raw image.
    header: Option<Header>,
}

fn image_error(path: &Path) -> impl FnOnce(Qcow2Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Qcow2 { path, source }
}

/// What the library says of an image's inside.
fn inside(path: &Path) -> impl FnOnce(std::io::Error) -> ImageError {
    let path = path.to_owned();
    move |error| ImageError::Qcow2 { path, source: Qcow2Error::Inside(error.to_string()) }
}

/// Opens and locks an image and all that it stands on.
///
/// # Errors
/// [`ImageError`]
pub(super) fn open(wanted: &Wanted<'_>) -> Result<Chain, ImageError> {
    let layers = layers(wanted)?;
    let block = layers.iter().filter_map(|layer| layer.file.direct).map(|d| d.block).max().unwrap_or(512);
    let mut below = None;
    let mut health = Arc::default();
    for (depth, layer) in layers.into_iter().enumerate().rev() {
        let Layer { path, file, header } = layer;
        let write = wanted.write && depth == 0;
        let Some(header) = header else {
            let raw = Raw::builder(Storage::new(&path, &file, 1, None));
            let raw = raw.open(DenyImplicitOpenGate::default()).map_err(inside(&path))?;
            below = Some(FormatAccess::new(raw));
            continue;
        };
        if write {
            header.check_counted(&file).map_err(image_error(&path))?;
        }
        let cluster = 1 << header.cluster_bits;
        if let Some(direct) = file.direct.filter(|direct| u64::from(direct.block) > cluster) {
            let source = Qcow2Error::SmallClusters { cluster, block: direct.block };
            return Err(ImageError::Qcow2 { path, source });
        }
        let order = match write {
            true => Some(Order::new(&file, &header, wanted.safe).map_err(image_error(&path))?),
            false => None,
        };
        let storage = Storage::new(&path, &file, cluster, order);
        health = storage.health();
        let builder = Qcow2::<Storage>::builder(storage).write(write).data_file(None).backing(below);
        let image = builder.open(DenyImplicitOpenGate::default()).map_err(inside(&path))?;
        below = Some(FormatAccess::new(image));
    }
    // There is one layer at least.
    let image = below.ok_or_else(|| ImageError::Empty { path: wanted.path.to_owned() })?;
    Ok(Chain { image, health, block })
}

/// Opens the files of a chain, from the top, and reads their headers.
fn layers(wanted: &Wanted<'_>) -> Result<Vec<Layer>, ImageError> {
    let mut layers = Vec::new();
    let mut known = HashSet::new();
    let (mut path, mut format) = (wanted.path.to_owned(), DiskFormat::Qcow2);
    loop {
        let top = layers.is_empty();
        let file = ImageFile::open(&path, wanted.write && top, wanted.direct)?;
        if let (false, Some(allowed)) = (top, wanted.backing) {
            stays_inside(&path, &file, allowed)?;
        }
        if let Ok(status) = file.file.metadata() {
            known.insert((status.dev(), status.ino()));
        }
        let header = match format {
            DiskFormat::Raw => None,
            DiskFormat::Qcow2 => Some(Header::read(&file).map_err(image_error(&path))?),
        };
        let next = header.as_ref().and_then(|header| header.backing.clone());
        layers.push(Layer { path: path.clone(), file, header });
        let Some(next) = next else { return Ok(layers) };
        let failed = |source| ImageError::Backing { path: path.clone(), name: next.name.clone(), source };
        let found = find(&path, &next, wanted.backing).map_err(failed)?;
        if layers.len() >= MAX_DEPTH {
            return Err(failed(BackingError::TooDeep));
        }
        // Before it is opened: an image that is open for writing is locked against us, too.
        let status = found.0.metadata().map_err(|e| failed(BackingError::NotFound(e)))?;
        if known.contains(&(status.dev(), status.ino())) {
            return Err(failed(BackingError::Loop));
        }
        (path, format) = found;
    }
}

/// Where the backing file of the image at `path` is, without links on the way, and its format.
fn find(
    path: &Path,
    backing: &BackingName,
    allowed: Option<&Path>,
) -> Result<(PathBuf, DiskFormat), BackingError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let plain = folder.join(&backing.name);
    let Some(allowed) = allowed else {
        let folder = plain.parent().filter(|folder| !folder.as_os_str().is_empty());
        return Err(BackingError::NotAllowed { folder: folder.unwrap_or(Path::new(".")).to_owned() });
    };
    let outside = || BackingError::Outside { allowed: allowed.to_owned() };
    let real = plain.canonicalize().map_err(BackingError::NotFound)?;
    if !real.starts_with(allowed.canonicalize().map_err(|_| outside())?) {
        return Err(outside());
    }
    let format = match backing.format.as_deref() {
        Some("raw") => DiskFormat::Raw,
        Some("qcow2") => DiskFormat::Qcow2,
        Some(other) => return Err(BackingError::UnknownFormat(other.to_owned())),
        None => return Err(BackingError::NoFormat),
    };
    Ok((real, format))
}

/// Somebody may have put a link in place of a folder since the path was looked at: what is open counts.
fn stays_inside(path: &Path, file: &ImageFile, allowed: &Path) -> Result<(), ImageError> {
    let real = std::fs::read_link(format!("/proc/self/fd/{}", file.file.as_raw_fd()));
    let allowed_real = allowed.canonicalize();
    match (real, allowed_real) {
        (Ok(real), Ok(folder)) if real.starts_with(&folder) => Ok(()),
        _ => Err(ImageError::Backing {
            path: path.to_owned(),
            name: path.display().to_string(),
            source: BackingError::Outside { allowed: allowed.to_owned() },
        }),
    }
}
