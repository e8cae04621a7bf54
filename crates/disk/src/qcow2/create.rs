//! New images.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::DenyImplicitOpenGate;
use imago::format::builder::FormatCreateBuilder;
use imago::qcow2::Qcow2;

use super::header::Header;
use super::storage::Storage;
use crate::file::ImageFile;
use crate::{DiskFormat, ImageError, SECTOR};

/// Bytes of the largest disk: as many as an L1 table of 32 MiB leads to by clusters of 64 KiB.
const MAX_SIZE: u64 = 1 << 51;

/// An image to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Where.
    pub path: PathBuf,
    /// In which format.
    pub format: DiskFormat,
    /// Bytes of the disk; those of the backing file if not said.
    pub size: Option<u64>,
    /// What a qcow2 image stands on: the file as the image is to name it, and its format. A relative path starts from the
    /// image's folder.
    pub backing: Option<(PathBuf, DiskFormat)>,
}

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The host refused.
    #[error("cannot make the disk image {path}: {source}")]
    Make {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// There is something already.
    #[error("{0} is there already; give another name, or remove it first")]
    Exists(PathBuf),
    /// No disk can have this size.
    #[error("a disk cannot have {0} bytes; give a multiple of 512 up to 2048T")]
    Size(u64),
    /// No size is given.
    #[error("how large is the disk to be? Give a size, such as --size 10G")]
    NoSize,
    /// Only one format has it.
    #[error("only qcow2 images have backing files; add --format qcow2")]
    RawBacking,
    /// A name that an image cannot hold.
    #[error("{0:?} cannot be the name of a backing file: it must be text of at most 1023 bytes")]
    BackingName(PathBuf),
    /// The backing file is not there or cannot be.
    #[error("cannot use {path} as a backing file")]
    Backing {
        /// The backing file.
        path: PathBuf,
        /// Why not.
        source: ImageError,
    },
}

/// Makes an image. A file that is there already is left alone.
///
/// # Errors
/// [`CreateError`]
pub fn create(new: &NewImage) -> Result<u64, CreateError> {
    let name = match &new.backing {
        None => None,
        Some(_) if new.format == DiskFormat::Raw => return Err(CreateError::RawBacking),
        Some((path, _)) => {
            let text = path.to_str().filter(|text| (1..=1023).contains(&text.len()));
            Some(text.ok_or_else(|| CreateError::BackingName(path.clone()))?)
        }
    };
    let size = match (new.size, &new.backing) {
        (size, Some((path, format))) => {
            let below = backing_size(&new.path, path, *format)?;
            size.unwrap_or(below)
        }
        (Some(size), None) => size,
        (None, None) => return Err(CreateError::NoSize),
    };
    if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
        return Err(CreateError::Size(size));
    }
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => CreateError::Exists(new.path.clone()),
        _ => CreateError::Make { path: new.path.clone(), source },
    };
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&new.path).map_err(failed)?;
    let made = match new.format {
        DiskFormat::Raw => file.set_len(size),
        DiskFormat::Qcow2 => {
            let backing = new.backing.as_ref().zip(name);
            format_qcow2(&new.path, &file, size, backing.map(|((_, format), name)| (name, *format)))
        }
    };
    if let Err(error) = made.and_then(|()| file.sync_all()) {
        // Half an image is worth nothing; that it cannot be removed changes nothing about the error.
        let _ = std::fs::remove_file(&new.path);
        return Err(failed(error));
    }
    Ok(size)
}

/// Bytes of the disk in a backing file, rounded up to whole sectors.
fn backing_size(image: &Path, backing: &Path, format: DiskFormat) -> Result<u64, CreateError> {
    let path = image.parent().unwrap_or(Path::new("")).join(backing);
    let failed = |source| CreateError::Backing { path: path.clone(), source };
    let file = ImageFile::open(&path, false, false).map_err(failed)?;
    match format {
        DiskFormat::Raw => Ok(file.disk_size()),
        DiskFormat::Qcow2 => match Header::read(&file) {
            Ok(header) => Ok(header.size.next_multiple_of(SECTOR)),
            Err(source) => Err(failed(ImageError::Qcow2 { path: path.clone(), source })),
        },
    }
}

fn format_qcow2(path: &Path, file: &File, size: u64, backing: Option<(&str, DiskFormat)>) -> io::Result<()> {
    let file = ImageFile { file: Arc::new(file.try_clone()?), len: 0, direct: None };
    // Tables are read back that are shorter than a cluster.
    let storage = Storage::new(path, &file, 2 << 20, None);
    let mut builder = Qcow2::<Storage>::create_builder(storage).size(size);
    if let Some((name, format)) = backing {
        let format = if format == DiskFormat::Raw { "raw" } else { "qcow2" };
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    let open = |storage| Ok(Qcow2::<Storage>::builder(storage).backing(None));
    let image = builder.create_open(DenyImplicitOpenGate::default(), open)?;
    imago::format::drivers::FormatDriverInstance::flush(&image)
}
