//! The disk that all sides run from, and the same files as a folder for the native side. Made once and kept in the cache.
//!
//! The image `debian:dev` is copied and its files are taken out by `debugfs`; the programs are compiled there by the
//! image's own gcc, natively, and written back into the copy, so that every side executes the same bytes.

use std::fmt::Write;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringfence_images::digest::Digest;
use ringfence_images::{Catalogue, Image, ImageError, Progress};

use super::catalogue::{FILES, PROGRAMS, fingerprint};
use super::native::{Native, NativeError};

const IMAGE: &str = "debian:dev";
/// Where the programs are, in the guest.
const BENCH: &str = "bench";

/// Why there is nothing to measure with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the image {IMAGE} has no disk")]
    NoDisk,
    #[error("cannot {action} `{path}`")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{0}` did not do its work; it said: {1}")]
    Tool(&'static str, String),
    #[error("the programs have to be compiled once in the image's own files")]
    Native(#[from] NativeError),
    #[error("the programs' sources do not compile in the image; it said: {0}")]
    Compile(String),
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrepareError {
    let path = path.to_owned();
    move |source| PrepareError::Io { action, path, source }
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

/// Makes sure that disk and folder are there.
pub(crate) fn prepare(progress: &mut dyn Progress) -> Result<Prepared, PrepareError> {
    let catalogue = Catalogue::builtin()?;
    let image = catalogue.ensure(IMAGE, progress)?;
    let source = image.disk.clone().ok_or(PrepareError::NoDisk)?;
    let bench = catalogue.cache().root().join("bench");
    let made = fs::metadata(&source).and_then(|file| file.modified()).map_err(at("read", &source))?;
    let name = Digest::of(format!("{:?}{made:?}{}", image.packages, fingerprint()).as_bytes()).to_string();
    let ready = bench.join(name.get(..16).unwrap_or(&name));
    if !ready.exists() {
        // What older versions left is of no use to anybody.
        if bench.exists() {
            fs::remove_dir_all(&bench).map_err(at("remove", &bench))?;
        }
        let work = bench.join("work");
        fs::create_dir_all(&work).map_err(at("create", &work))?;
        make(&source, &work, progress)?;
        fs::rename(&work, &ready).map_err(at("create", &ready))?;
    }
    Ok(described(&image, &ready))
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

fn make(source: &Path, work: &Path, progress: &mut dyn Progress) -> Result<(), PrepareError> {
    let (disk, root) = (work.join("disk.ext4"), work.join("root"));
    progress.step("Copying the disk", None);
    run("cp", Command::new("cp").args(["--sparse=always"]).arg(source).arg(&disk))?;
    fs::create_dir(&root).map_err(at("create", &root))?;
    progress.step("Taking its files out", None);
    // An ordinary user cannot give files away, which it complains of; the files are there all the same.
    run("debugfs", debugfs().arg("-R").arg(format!("rdump / \"{}\"", root.display())).arg(&disk))?;

    progress.step("Compiling the programs", None);
    let bench = root.join(BENCH);
    for folder in ["src", "commands"] {
        let folder = bench.join(folder);
        fs::create_dir_all(&folder).map_err(at("create", &folder))?;
    }
    for (name, text) in FILES {
        let path = bench.join(name);
        fs::write(&path, text).map_err(at("write", &path))?;
        let mode = fs::Permissions::from_mode(if name.contains('.') { 0o644 } else { 0o755 });
        fs::set_permissions(&path, mode).map_err(at("change", &path))?;
    }
    for program in PROGRAMS {
        let path = bench.join("commands").join(program.name);
        fs::write(&path, format!("{}\n", program.command)).map_err(at("write", &path))?;
    }
    let native = Native::new(&root)?;
    let output = native.command(&["/bench/prepare"]).output().map_err(at("run", &bench.join("prepare")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(PrepareError::Compile(said.trim().chars().take(2000).collect()));
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
