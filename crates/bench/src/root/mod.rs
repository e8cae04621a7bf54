//! The disk that all sides run from, and the same files as a folder for the native side. Made once and kept in the cache.
//!
//! An image is copied and its files are taken out by `debugfs`; ours are added, prepared there natively (compiled by the
//! image's own gcc, for one), and written back into the copy, so that every side executes the same bytes.

pub(crate) mod native;

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringfence_images::digest::Digest;
use ringfence_images::{Catalogue, Image, ImageError, Progress};

use native::{Native, NativeError};

use crate::host::{FileError, at};

/// What is measured with: an image and what is added to it.
#[derive(Debug)]
pub(crate) struct Kit {
    /// Whose it is; a word.
    pub(crate) name: &'static str,
    pub(crate) image: &'static str,
    /// Files of the guest's `/bench`. What has no dot in its name is a program, and `prepare`, if there is one, is run there
    /// natively, once.
    pub(crate) files: Vec<(String, String)>,
}

/// Where our files are, in the guest.
const BENCH: &str = "bench";

/// Why there is nothing to measure with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the image {0} has no disk")]
    NoDisk(&'static str),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("`{0}` did not do its work; it said: {1}")]
    Tool(&'static str, String),
    #[error("the image's own files have to be entered once, to prepare what is measured")]
    Native(#[from] NativeError),
    #[error("what is measured cannot be prepared in the image, sources compiled for one; it said: {0}")]
    Prepare(String),
}

/// What the sides are started with.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    pub(crate) kernel: PathBuf,
    pub(crate) append: String,
    pub(crate) disk: PathBuf,
    /// The files on the disk, as a folder.
    pub(crate) root: PathBuf,
    pub(crate) kernel_release: String,
}

/// Makes sure that disk and folder of `kit` are there.
pub(crate) fn prepare(kit: &Kit, progress: &mut dyn Progress) -> Result<Prepared, PrepareError> {
    let catalogue = Catalogue::builtin()?;
    let image = catalogue.ensure(kit.image, progress)?;
    let source = image.disk.clone().ok_or(PrepareError::NoDisk(kit.image))?;
    let bench = catalogue.cache().root().join("bench");
    let made = fs::metadata(&source).and_then(|file| file.modified()).map_err(at("read", &source))?;
    let digest = Digest::of(format!("{:?}{made:?}{:?}", image.packages, kit.files).as_bytes()).to_string();
    let ready = bench.join(format!("{}-{}", kit.name, digest.get(..16).unwrap_or(&digest)));
    if !ready.exists() {
        fs::create_dir_all(&bench).map_err(at("create", &bench))?;
        remove_older(&bench, kit.name)?;
        let work = bench.join(format!("{}-work", kit.name));
        fs::create_dir_all(&work).map_err(at("create", &work))?;
        make(kit, &source, &work, progress)?;
        fs::rename(&work, &ready).map_err(at("create", &ready))?;
    }
    Ok(described(&image, &ready))
}

/// What older versions of a kit left is of no use to anybody; nor is what has no kit's name.
fn remove_older(bench: &Path, name: &str) -> Result<(), PrepareError> {
    for entry in fs::read_dir(bench).map_err(at("list", bench))? {
        let path = entry.map_err(at("list", bench))?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if file.split_once('-').is_none_or(|(kit, _)| kit == name) {
            fs::remove_dir_all(&path).map_err(at("remove", &path))?;
        }
    }
    Ok(())
}

fn described(image: &Image, folder: &Path) -> Prepared {
    Prepared {
        kernel: image.kernel.clone(),
        append: image.append.clone(),
        disk: folder.join("disk.ext4"),
        root: folder.join("root"),
        kernel_release: image.kernel_release.clone(),
    }
}

fn make(kit: &Kit, source: &Path, work: &Path, progress: &mut dyn Progress) -> Result<(), PrepareError> {
    let (disk, root) = (work.join("disk.ext4"), work.join("root"));
    progress.step("Copying the disk", None);
    run("cp", Command::new("cp").args(["--sparse=always"]).arg(source).arg(&disk))?;
    fs::create_dir(&root).map_err(at("create", &root))?;
    progress.step("Taking its files out", None);
    // An ordinary user cannot give files away, which it complains of; the files are there all the same.
    run("debugfs", debugfs().arg("-R").arg(format!("rdump / \"{}\"", root.display())).arg(&disk))?;

    let bench = root.join(BENCH);
    for (name, text) in &kit.files {
        let path = bench.join(name);
        let folder = path.parent().unwrap_or(&bench);
        fs::create_dir_all(folder).map_err(at("create", folder))?;
        fs::write(&path, text).map_err(at("write", &path))?;
        let mode = fs::Permissions::from_mode(if name.contains('.') { 0o644 } else { 0o755 });
        fs::set_permissions(&path, mode).map_err(at("change", &path))?;
    }
    if bench.join("prepare").exists() {
        progress.step("Compiling the programs", None);
        let native = Native::new(&root)?;
        let output =
            native.command(&["/bench/prepare"]).output().map_err(at("run", &bench.join("prepare")))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(PrepareError::Prepare(said.trim().chars().take(2000).collect()));
        }
    }
    progress.step("Writing them to the disk", None);
    write_back(&bench, &disk, &work.join("script"))
}

/// Writes the folder `/bench` into the disk.
fn write_back(bench: &Path, disk: &Path, script: &Path) -> Result<(), PrepareError> {
    let mut text = format!("mkdir /{BENCH}\n");
    let mut open = vec![bench.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(at("list", &folder))? {
            let path = entry.map_err(at("list", &folder))?.path();
            let inside = path.strip_prefix(bench).unwrap_or(&path).display().to_string();
            let metadata = fs::metadata(&path).map_err(at("read", &path))?;
            // Writing to a string cannot fail.
            if metadata.is_dir() {
                let _ = writeln!(text, "mkdir /{BENCH}/{inside}");
                open.push(path);
            } else {
                let mode = metadata.permissions().mode();
                let _ = writeln!(text, "write \"{}\" /{BENCH}/{inside}", path.display());
                let _ = writeln!(text, "sif /{BENCH}/{inside} mode 0{mode:o}");
                let _ = writeln!(text, "sif /{BENCH}/{inside} uid 0\nsif /{BENCH}/{inside} gid 0");
            }
        }
    }
    fs::write(script, text).map_err(at("write", script))?;
    let said = run("debugfs", debugfs().args(["-w", "-f"]).arg(script).arg(disk))?;
    let complaints: Vec<&str> = said.lines().filter(|line| !line.starts_with("debugfs ")).take(5).collect();
    if complaints.is_empty() { Ok(()) } else { Err(PrepareError::Tool("debugfs", complaints.join("\n"))) }
}

/// It is among administrators' programs, which an ordinary user's `PATH` need not lead to.
fn debugfs() -> Command {
    let found = ["/usr/sbin/debugfs", "/sbin/debugfs"].into_iter().find(|path| Path::new(path).exists());
    Command::new(found.unwrap_or("debugfs"))
}

/// Runs a program to its end; gives what it said on standard error.
fn run(tool: &'static str, command: &mut Command) -> Result<String, PrepareError> {
    let output = command.output().map_err(|error| PrepareError::Tool(tool, error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(said) } else { Err(PrepareError::Tool(tool, said)) }
}
