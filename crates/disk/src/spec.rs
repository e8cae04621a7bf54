//! `--disk FILE[,option]…` as the user writes it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What the file holds. Never guessed from its bytes, which a guest can forge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    #[default]
    Raw,
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
    /// A value that is planned but not there.
    #[error("{option}={value} is not in this version; {option} can be {choices}")]
    NotYet {
        /// The option.
        option: &'static str,
        /// The value given.
        value: &'static str,
        /// Those it can have.
        choices: &'static str,
    },
    /// An option that needs a value has none, or the other way round.
    #[error("{0} is written {1}")]
    Form(&'static str, &'static str),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// Two options that exclude each other.
    #[error("a disk cannot be both readonly and ephemeral; give one of them")]
    ReadOnlyEphemeral,
}

const OPTIONS: &str = "format=raw, bus=nvme|virtio, readonly, ephemeral, cache=none|writeback|unsafe, block-size=512|4096 and \
                       io=auto|uring|threads|sync";

/// A value by its name.
type Choices<T> = &'static [(&'static str, T)];

const FORMATS: Choices<DiskFormat> = &[("raw", DiskFormat::Raw)];
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
        if spec.read_only && spec.ephemeral {
            return Err(SpecError::ReadOnlyEphemeral);
        }
        Ok(spec)
    }
}

impl DiskSpec {
    /// Takes over one option and returns its name.
    fn apply(&mut self, part: &str) -> Result<&'static str, SpecError> {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (part, None),
        };
        match (name, value) {
            ("format", Some("qcow2")) => {
                return Err(SpecError::NotYet { option: "format", value: "qcow2", choices: "raw" });
            }
            ("format", value) => self.format = choose("format", "format=raw", FORMATS, "raw", value)?,
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
        let names = ["format", "bus", "cache", "block-size", "io", "readonly", "ephemeral"];
        Ok(names.into_iter().find(|known| *known == name).unwrap_or(""))
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display().to_string().replace(',', ",,"))?;
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
    }

    #[test]
    fn wrong_options_say_what_is_right() {
        let cases = [
            ("", "no disk image named"),
            (",readonly", "no disk image named"),
            ("a,", "\"\" is not an option"),
            ("a,raedonly", "\"raedonly\" is not an option of a disk; there are format=raw"),
            ("a,cache=fast", "cache=fast is not known; cache can be none, writeback or unsafe"),
            ("a,cache", "cache is written cache=none|writeback|unsafe"),
            ("a,readonly=yes", "readonly is written without a value"),
            ("a,format=qcow2", "format=qcow2 is not in this version; format can be raw"),
            ("a,format=vmdk", "format=vmdk is not known"),
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
