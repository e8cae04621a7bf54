//! `--disk FILE[,option]…` as the user writes it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What the file holds. Never guessed from its bytes, which a guest can forge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    #[default]
    Raw,
    /// QEMU's format: it grows as it is written to, and can stand on another image.
    Qcow2,
}

/// How the guest reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiskBus {
    /// An NVMe controller, which the kernels of distributions need no module for.
    #[default]
    Nvme,
    /// A virtio disk, which most kernels have a module for: it cannot hold the root of a guest without an initial RAM
    /// disk.
    Virtio,
}

/// What becomes of written data before the guest asks for a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// It goes past the host's page cache (`O_DIRECT`).
    None,
    /// It stays in the host's page cache; a flush is an `fdatasync`.
    #[default]
    Writeback,
    /// As writeback, but a flush does nothing: what the host loses in a crash is lost.
    Unsafe,
}

/// Who carries out I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IoEngine {
    /// io_uring for `cache=none` where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Worker threads.
    Threads,
    /// The thread that asks, in order: slow, but a run repeats exactly.
    Sync,
}

/// A disk as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// `format=`
    pub format: DiskFormat,
    /// `bus=`
    pub bus: DiskBus,
    /// `readonly`: the guest cannot write.
    pub read_only: bool,
    /// `ephemeral`: what the guest writes goes elsewhere and vanishes with the machine.
    pub ephemeral: bool,
    /// `cache=`
    pub cache: CacheMode,
    /// `block-size=`: bytes in a block as the guest sees it, 512 or 4096. `None`: 512, or what `cache=none` needs.
    pub block_size: Option<u32>,
    /// `io=`
    pub engine: IoEngine,
    /// `backing=`: the folder that backing files may be in.
    pub backing: Option<PathBuf>,
    /// `bps=`: bytes a second at most.
    pub bytes: Option<u64>,
    /// `iops=`: operations a second at most.
    pub operations: Option<u64>,
}

impl DiskSpec {
    /// An image with nothing said about it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::default(),
            bus: DiskBus::default(),
            read_only: false,
            ephemeral: false,
            cache: CacheMode::default(),
            block_size: None,
            engine: IoEngine::default(),
            backing: None,
            bytes: None,
            operations: None,
        }
    }
}

/// Why a disk description is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No file is named.
    #[error("no disk image named in {0:?}; write FILE[,option]…, with a comma in FILE doubled")]
    NoFile(String),
    /// An option that does not exist.
    #[error(
        "{0:?} is not an option of a disk; there are {OPTIONS} (a comma in the file's name is written twice)"
    )]
    UnknownOption(String),
    /// A value that an option does not have.
    #[error("{option}={value} is not known; {option} can be {choices}")]
    UnknownValue {
        /// The option.
        option: &'static str,
        /// The value given.
        value: String,
        /// Those it can have.
        choices: &'static str,
    },
    /// A rate that is none.
    #[error("{0}={1} is not a rate; write a whole number above 0, with K, M or G behind it, such as {0}=10M")]
    Rate(&'static str, String),
    /// An option that needs a value has none, or the other way round.
    #[error("{0} is written {1}")]
    Form(&'static str, &'static str),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// Two options that exclude each other.
    #[error("a disk cannot be both readonly and ephemeral; give one of them")]
    ReadOnlyEphemeral,
    /// Backing files without a format that has them.
    #[error("only qcow2 images have backing files; add format=qcow2, or leave backing= out")]
    RawBacking,
    /// An engine that cannot look into an image.
    #[error("io=uring is for raw images; leave it out with format=qcow2")]
    Qcow2Uring,
    /// Limits where nothing may happen at a time of its own.
    #[error("bps= and iops= need a thread of their own; leave io=sync out")]
    SyncLimit,
}

const OPTIONS: &str = "format=raw|qcow2, backing=FOLDER, bus=nvme|virtio, readonly, ephemeral, cache=none|writeback|unsafe, \
                       block-size=512|4096, bps=BYTES, iops=OPERATIONS and io=auto|uring|threads|sync";

/// A value by its name.
type Choices<T> = &'static [(&'static str, T)];

const FORMATS: Choices<DiskFormat> = &[("raw", DiskFormat::Raw), ("qcow2", DiskFormat::Qcow2)];
impl FromStr for DiskFormat {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        choose("format", "raw or qcow2", FORMATS, "raw or qcow2", Some(text))
    }
}

const BUSES: Choices<DiskBus> = &[("nvme", DiskBus::Nvme), ("virtio", DiskBus::Virtio)];
const CACHES: Choices<CacheMode> =
    &[("none", CacheMode::None), ("writeback", CacheMode::Writeback), ("unsafe", CacheMode::Unsafe)];
const BLOCK_SIZES: Choices<u32> = &[("512", 512), ("4096", 4096)];
const ENGINES: Choices<IoEngine> = &[
    ("auto", IoEngine::Auto),
    ("uring", IoEngine::Uring),
    ("threads", IoEngine::Threads),
    ("sync", IoEngine::Sync),
];

fn choose<T: Copy>(
    option: &'static str,
    form: &'static str,
    choices: Choices<T>,
    names: &'static str,
    value: Option<&str>,
) -> Result<T, SpecError> {
    let value = value.ok_or(SpecError::Form(option, form))?;
    let found = choices.iter().find(|(name, _)| *name == value);
    found.map(|(_, choice)| *choice).ok_or_else(|| SpecError::UnknownValue {
        option,
        value: value.to_owned(),
        choices: names,
    })
}

fn rate(option: &'static str, form: &'static str, value: Option<&str>) -> Result<u64, SpecError> {
    let value = value.ok_or(SpecError::Form(option, form))?;
    ringfence_rate::parse(value).ok_or_else(|| SpecError::Rate(option, value.to_owned()))
}

/// Splits at single commas; a double comma is one that belongs to the text.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts
}

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut parts = parts(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let mut spec = Self::new(path.ok_or_else(|| SpecError::NoFile(text.to_owned()))?);
        let mut seen: Vec<&'static str> = Vec::new();
        for part in parts {
            let name = spec.apply(&part)?;
            if seen.contains(&name) {
                return Err(SpecError::Twice(name));
            }
            seen.push(name);
        }
        let (qcow2, engine) = (spec.format == DiskFormat::Qcow2, spec.engine);
        match () {
            () if spec.read_only && spec.ephemeral => Err(SpecError::ReadOnlyEphemeral),
            () if spec.backing.is_some() && !qcow2 => Err(SpecError::RawBacking),
            () if engine == IoEngine::Uring && qcow2 => Err(SpecError::Qcow2Uring),
            () if engine == IoEngine::Sync && spec.is_limited() => Err(SpecError::SyncLimit),
            () => Ok(spec),
        }
    }
}

impl DiskSpec {
    /// Whether there is any limit on its rates.
    pub fn is_limited(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// Takes over one option and returns its name.
    fn apply(&mut self, part: &str) -> Result<&'static str, SpecError> {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (part, None),
        };
        match (name, value) {
            ("format", value) => {
                self.format = choose("format", "format=raw|qcow2", FORMATS, "raw or qcow2", value)?;
            }
            ("backing", Some(folder)) if !folder.is_empty() => self.backing = Some(folder.into()),
            ("backing", _) => return Err(SpecError::Form("backing", "backing=FOLDER")),
            ("bps", value) => self.bytes = Some(rate("bps", "bps=10M", value)?),
            ("iops", value) => self.operations = Some(rate("iops", "iops=500", value)?),
            ("bus", value) => self.bus = choose("bus", "bus=nvme|virtio", BUSES, "nvme or virtio", value)?,
            ("cache", value) => {
                let names = "none, writeback or unsafe";
                self.cache = choose("cache", "cache=none|writeback|unsafe", CACHES, names, value)?;
            }
            ("block-size", value) => {
                let size = choose("block-size", "block-size=512|4096", BLOCK_SIZES, "512 or 4096", value)?;
                self.block_size = Some(size);
            }
            ("io", value) => {
                let names = "auto, uring, threads or sync";
                self.engine = choose("io", "io=auto|uring|threads|sync", ENGINES, names, value)?;
            }
            ("readonly", None) => self.read_only = true,
            ("ephemeral", None) => self.ephemeral = true,
            ("readonly", Some(_)) => return Err(SpecError::Form("readonly", "without a value")),
            ("ephemeral", Some(_)) => return Err(SpecError::Form("ephemeral", "without a value")),
            _ => return Err(SpecError::UnknownOption(part.to_owned())),
        }
        let names =
            ["format", "backing", "bus", "cache", "block-size", "io", "readonly", "ephemeral", "bps", "iops"];
        Ok(names.into_iter().find(|known| *known == name).unwrap_or(""))
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doubled = |path: &Path| path.display().to_string().replace(',', ",,");
        write!(f, "{}", doubled(&self.path))?;
        if self.format == DiskFormat::Qcow2 {
            write!(f, ",format=qcow2")?;
        }
        if let Some(folder) = &self.backing {
            write!(f, ",backing={}", doubled(folder))?;
        }
        if self.read_only {
            write!(f, ",readonly")?;
        }
        if self.ephemeral {
            write!(f, ",ephemeral")?;
        }
        if let Some((name, _)) =
            BUSES.iter().find(|(_, bus)| *bus == self.bus && self.bus != DiskBus::default())
        {
            write!(f, ",bus={name}")?;
        }
        if let Some((name, _)) =
            CACHES.iter().find(|(_, mode)| *mode == self.cache && self.cache != CacheMode::default())
        {
            write!(f, ",cache={name}")?;
        }
        if let Some(size) = self.block_size {
            write!(f, ",block-size={size}")?;
        }
        for (name, rate) in [("bps", self.bytes), ("iops", self.operations)] {
            if let Some(rate) = rate {
                write!(f, ",{name}={rate}")?;
            }
        }
        match ENGINES.iter().find(|(_, engine)| *engine == self.engine) {
            Some((name, engine)) if *engine != IoEngine::default() => write!(f, ",io={name}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskSpec, SpecError> {
        text.parse()
    }

    #[test]
    fn options_are_understood_and_written_back() {
        assert_eq!(parse("root.ext4").unwrap(), DiskSpec::new("root.ext4"));
        let spec =
            parse("a,,b.img,format=raw,bus=nvme,readonly,cache=none,block-size=4096,io=uring").unwrap();
        let expected = DiskSpec {
            read_only: true,
            cache: CacheMode::None,
            block_size: Some(4096),
            engine: IoEngine::Uring,
            ..DiskSpec::new("a,b.img")
        };
        assert_eq!(spec, expected);
        assert_eq!(parse(&spec.to_string()).unwrap(), spec);
        let spec = parse("/x=y,ephemeral,cache=unsafe,bus=virtio").unwrap();
        assert!(
            spec.ephemeral && spec.cache == CacheMode::Unsafe && parse(&spec.to_string()).unwrap() == spec
        );
        assert_eq!(spec.bus, DiskBus::Virtio);
        let spec = parse("a,format=qcow2,backing=/b,,c,bps=10M,iops=5").unwrap();
        let expected = DiskSpec {
            format: DiskFormat::Qcow2,
            backing: Some("/b,c".into()),
            bytes: Some(10_000_000),
            operations: Some(5),
            ..DiskSpec::new("a")
        };
        assert_eq!(spec, expected);
        assert_eq!(parse(&spec.to_string()).unwrap(), spec);
    }

    #[test]
    fn wrong_options_say_what_is_right() {
        let cases = [
            ("", "no disk image named"),
            (",readonly", "no disk image named"),
            ("a,", "\"\" is not an option"),
            ("a,raedonly", "\"raedonly\" is not an option of a disk; there are format=raw|qcow2"),
            ("a,cache=fast", "cache=fast is not known; cache can be none, writeback or unsafe"),
            ("a,cache", "cache is written cache=none|writeback|unsafe"),
            ("a,readonly=yes", "readonly is written without a value"),
            ("a,format=vmdk", "format=vmdk is not known; format can be raw or qcow2"),
            ("a,backing=/b", "only qcow2 images have backing files; add format=qcow2"),
            ("a,format=qcow2,backing", "backing is written backing=FOLDER"),
            ("a,format=qcow2,backing=", "backing is written backing=FOLDER"),
            ("a,format=qcow2,io=uring", "io=uring is for raw images"),
            ("a,bps=0", "bps=0 is not a rate"),
            ("a,iops=fast", "iops=fast is not a rate; write a whole number above 0, with K, M or G"),
            ("a,iops", "iops is written iops=500"),
            ("a,iops=5,io=sync", "leave io=sync out"),
            ("a,bus=ide", "bus=ide is not known; bus can be nvme or virtio"),
            ("a,block-size=1024", "block-size can be 512 or 4096"),
            ("a,cache=none,cache=none", "cache is given twice"),
            ("a,ephemeral,readonly", "cannot be both"),
        ];
        for (text, message) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
