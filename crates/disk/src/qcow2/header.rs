//! The header of a qcow2 image, read and judged before anything else looks at the image.
//!
//! Source: QEMU's `docs/interop/qcow2.rst`, sections "Header" and "Header extensions". Every number comes from the file,
//! which a stranger may have made: what is checked here bounds the memory that opening takes, and lets the user
//! know what is wrong in words.

use std::io;
use std::ops::Range;

use crate::file::ImageFile;
use crate::{Buffers, HostBuffer, sys};

/// "QFI\xfb"
pub(crate) const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a header of version 2; version 3 goes on.
const V2: usize = 72;
/// Bytes of a header of version 3 at least.
const V3: usize = 104;
/// Bytes of the largest cluster.
const MAX_CLUSTER: u64 = 2 << 20;
/// Bytes of an L1 table at most, as with QEMU: 64 TiB in clusters of 64 KiB need 1 MiB.
const MAX_L1: u64 = 32 << 20;
/// Bytes of a refcount table at most, as with QEMU.
const MAX_REFTABLE: u64 = 8 << 20;
/// Where a table's entry says that the table, or block, it leads to begins.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes of a backing file's name at most.
const MAX_NAME: u64 = 1023;
/// Bytes of an entry of the table of feature names.
const FEATURE_NAME: usize = 48;

/// Extensions of the header.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
}

/// Features without which an image cannot be understood.
mod incompatible {
    pub(super) const DIRTY: u64 = 1;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const DATA_FILE: u64 = 1 << 2;
    pub(super) const COMPRESSION: u64 = 1 << 3;
    pub(super) const SUBCLUSTERS: u64 = 1 << 4;
}

/// Why a file cannot be used as a qcow2 image.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It does not begin as one.
    #[error("it is not a qcow2 image; leave format=qcow2 out if it is a raw one")]
    NotQcow2,
    /// A version that is not known.
    #[error("its version is {0}, and there are 2 and 3; convert it: qemu-img convert -O qcow2")]
    Version(u32),
    /// A feature that is not offered.
    #[error("it has {0}, which is not supported; convert it: qemu-img convert -O qcow2")]
    Unsupported(&'static str),
    /// A feature that nobody has told us of.
    #[error("it needs unknown features (bits {0:#x}); convert it: qemu-img convert -O qcow2")]
    UnknownFeatures(u64),
    /// It was not closed, or an earlier check found damage.
    #[error("it is marked as {0}; repair it: qemu-img check -r all")]
    Marked(&'static str),
    /// It ends before something that it says it has.
    #[error("it is cut off: its {what} should reach to byte {end}, and the file has {len} bytes")]
    CutOff {
        /// What is missing.
        what: &'static str,
        /// Where that should end.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// A number that cannot be.
    #[error("it is damaged: its {what} is {value}, which must be {range}; look at it: qemu-img check")]
    OutOfRange {
        /// What the number is for.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it can be.
        range: &'static str,
    },
    /// A text that is none.
    #[error("it is damaged: its {0} is not text; look at it: qemu-img check")]
    NotText(&'static str),
    /// The host cannot read it.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Writing a block of direct I/O would also write to a neighbour.
    #[error(
        "its clusters of {cluster} bytes are smaller than the {block} bytes that cache=none writes at a time; use cache=writeback"
    )]
    SmallClusters {
        /// Bytes of a cluster.
        cluster: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// Something that the tables inside say is not so.
    #[error("it cannot be used: {0}; look at it: qemu-img check")]
    Inside(String),
}

/// The backing file that a header names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub(super) name: String,
    /// `raw` and `qcow2` are those that exist; none if the header does not say.
    pub(super) format: Option<String>,
}

/// What matters of a header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Size of a cluster as a power of two.
    pub(super) cluster_bits: u32,
    /// Bits of a refcount as a power of two.
    pub(super) refcount_order: u32,
    /// Where the tables are in the file.
    pub(super) l1: Range<u64>,
    pub(super) reftable: Range<u64>,
    pub(super) backing: Option<BackingName>,
}

/// A piece of the file, which must have it all. Aligned as direct I/O wants it, whatever is asked for.
pub(super) fn bytes(image: &ImageFile, range: Range<u64>, what: &'static str) -> Result<Vec<u8>, Qcow2Error> {
    const ALIGN: u64 = 4096;
    if range.end > image.len {
        return Err(Qcow2Error::CutOff { what, end: range.end, len: image.len });
    }
    let start = range.start & !(ALIGN - 1);
    // No longer than the file, so this cannot overflow.
    let len = (range.end - start).next_multiple_of(ALIGN);
    let buffer = HostBuffer::new(len as usize);
    let buffers = Buffers::host(&buffer, len as usize);
    let mut done = 0;
    while start + done < range.end {
        match sys::read(&image.file, start + done, &buffers, done, 0) {
            Ok(0) => return Err(Qcow2Error::CutOff { what, end: range.end, len: start + done }),
            Ok(n) => done += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
            Err(e) => return Err(e.into()),
        }
    }
    let mut bytes = vec![0; (range.end - range.start) as usize];
    buffer.read((range.start - start) as usize, &mut bytes);
    Ok(bytes)
}

/// Big-endian numbers of a table.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|entry| long(entry, 0))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.iter().skip(at).take(4).fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

/// Whether a file begins as a qcow2 image does.
pub(crate) fn looks_like_qcow2(image: &ImageFile) -> bool {
    bytes(image, 0..8, "header")
        .is_ok_and(|bytes| word(&bytes, 0) == MAGIC && matches!(word(&bytes, 4), 2 | 3))
}

impl Header {
    /// Reads a header and looks whether what it says can be.
    pub(super) fn read(image: &ImageFile) -> Result<Self, Qcow2Error> {
        if image.len < 8 || word(&bytes(image, 0..8, "header")?, 0) != MAGIC {
            return Err(Qcow2Error::NotQcow2);
        }
        let base = bytes(image, 0..V2 as u64, "header")?;
        let version = word(&base, 4);
        let mut header_len = V2 as u64;
        let mut refcount_order = 4;
        if version == 3 {
            let rest = bytes(image, 0..V3 as u64, "header")?;
            check_features(long(&rest, 72))?;
            refcount_order = word(&rest, 96);
            header_len = u64::from(word(&rest, 100));
        } else if version != 2 {
            return Err(Qcow2Error::Version(version));
        }
        let cluster_bits = word(&base, 20);
        within("cluster size as a power of two", cluster_bits.into(), 9..22, "9 to 21")?;
        let cluster = 1 << cluster_bits;
        within("refcount width as a power of two", refcount_order.into(), 0..7, "0 to 6")?;
        if version == 3 {
            within("header length", header_len, V3 as u64..cluster + 1, "from 104 to a cluster")?;
        }
        if word(&base, 32) != 0 {
            return Err(Qcow2Error::Unsupported("encryption"));
        }
        let size = long(&base, 24);
        within("disk size", size, 512..i64::MAX as u64, "from 512 bytes to 8 EiB")?;

        let l1_entries = u64::from(word(&base, 36));
        within("number of L1 entries", l1_entries, 1..MAX_L1 / 8 + 1, "1 to 4194304")?;
        // An L2 table is a cluster of entries of 8 bytes, each for a cluster.
        let per_entry = 2 * cluster_bits - 3;
        if l1_entries < size.div_ceil(1 << per_entry) {
            let range = "large enough for the disk's size";
            return Err(Qcow2Error::OutOfRange { what: "number of L1 entries", value: l1_entries, range });
        }
        let table = |what, at: u64, len: u64| {
            if at == 0 || !at.is_multiple_of(cluster) || at > OFFSET {
                return Err(Qcow2Error::OutOfRange {
                    what,
                    value: at,
                    range: "a multiple of the cluster size",
                });
            }
            let end = at + len;
            if end > image.len {
                return Err(Qcow2Error::CutOff { what, end, len: image.len });
            }
            Ok(at..end)
        };
        let reftable_len = u64::from(word(&base, 56)) * cluster;
        let most = MAX_REFTABLE.max(MAX_CLUSTER) + 1;
        within("refcount table's size", reftable_len, 1..most, "at most 8 MiB")?;
        let l1 = table("L1 table", long(&base, 40), l1_entries * 8)?;
        let reftable = table("refcount table", long(&base, 48), reftable_len)?;

        let (name_at, name_len) = (long(&base, 8), u64::from(word(&base, 16)));
        // Version 2 had no extensions at first: the name can follow the header at once.
        let last = if version == 2 && name_at != 0 { name_at.min(cluster) } else { cluster };
        let format = extensions(image, version, header_len..last)?;
        let backing = backing(image, name_at, name_len, cluster, format)?;
        Ok(Self { size, cluster_bits, refcount_order, l1, reftable, backing })
    }

    /// Looks whether an image can be written to. Header and tables that are not counted would be taken for free, and the
    /// library looks for ever for a place if that for the header's own count is missing.
    pub(super) fn check_counted(&self, image: &ImageFile) -> Result<(), Qcow2Error> {
        self.refcount_blocks(image)?;
        let table = bytes(image, self.reftable.clone(), "refcount table")?;
        let table: Vec<u64> = entries(&table).collect();
        let cluster = 1_u64 << self.cluster_bits;
        let per_block = 1_u64 << (self.cluster_bits + 3 - self.refcount_order);
        let mut last: Option<(u64, Vec<u8>)> = None;
        for range in [0..cluster, self.reftable.clone(), self.l1.clone()] {
            for index in range.start / cluster..range.end.div_ceil(cluster) {
                let at = table.get((index / per_block) as usize).copied().filter(|block| *block != 0);
                let at = at.ok_or_else(uncounted)?;
                if last.as_ref().is_none_or(|(place, _)| *place != at) {
                    let end = (at + cluster).min(image.len);
                    last = Some((at, bytes(image, at..end, "refcounts")?));
                }
                let block = last.as_ref().map_or(&[][..], |(_, block)| block);
                if !self.is_counted(block, (index % per_block) as usize) {
                    return Err(uncounted());
                }
            }
        }
        Ok(())
    }

    /// Whether an entry of a refcount block is not zero. Entries of less than a byte begin at its lowest bit.
    fn is_counted(&self, block: &[u8], entry: usize) -> bool {
        let bits = 1 << self.refcount_order;
        if bits >= 8 {
            return block.iter().skip(entry * bits / 8).take(bits / 8).any(|byte| *byte != 0);
        }
        let byte = block.get(entry * bits / 8).copied().unwrap_or_default();
        byte >> (entry * bits % 8) & ((1 << bits) - 1) as u8 != 0
    }

    /// Reads the refcount table. A block of it that is named twice, or lies outside of the file, could make looking for
    /// a free cluster take for ever.
    pub(super) fn refcount_blocks(&self, image: &ImageFile) -> Result<Vec<u64>, Qcow2Error> {
        let table = bytes(image, self.reftable.clone(), "refcount table")?;
        let mut blocks: Vec<u64> = entries(&table).filter(|entry| *entry != 0).collect();
        let cluster = 1 << self.cluster_bits;
        for &block in &blocks {
            let what = "refcount block's place";
            if !block.is_multiple_of(cluster) || block > OFFSET {
                let range = "a multiple of the cluster size";
                return Err(Qcow2Error::OutOfRange { what, value: block, range });
            }
            if block + cluster > image.len.next_multiple_of(cluster) {
                return Err(Qcow2Error::CutOff { what: "refcounts", end: block + cluster, len: image.len });
            }
        }
        blocks.sort_unstable();
        if let Some(pair) = blocks.windows(2).find(|pair| pair.first() == pair.last()) {
            let value = pair.first().copied().unwrap_or_default();
            return Err(Qcow2Error::OutOfRange { what: "refcount block's place", value, range: "its own" });
        }
        Ok(blocks)
    }
}

fn uncounted() -> Qcow2Error {
    Qcow2Error::Inside("its header or tables are not counted as used".to_owned())
}

fn within(
    what: &'static str,
    value: u64,
    allowed: Range<u64>,
    range: &'static str,
) -> Result<(), Qcow2Error> {
    if allowed.contains(&value) { Ok(()) } else { Err(Qcow2Error::OutOfRange { what, value, range }) }
}

fn check_features(bits: u64) -> Result<(), Qcow2Error> {
    let named = [
        (incompatible::DIRTY, Qcow2Error::Marked("in use, or not closed when it was last used")),
        (incompatible::CORRUPT, Qcow2Error::Marked("damaged")),
        (incompatible::DATA_FILE, Qcow2Error::Unsupported("its data in a file of its own")),
        (incompatible::COMPRESSION, Qcow2Error::Unsupported("clusters that are not compressed by zlib")),
        (incompatible::SUBCLUSTERS, Qcow2Error::Unsupported("extended L2 entries")),
    ];
    let mut left = bits;
    for (bit, error) in named {
        if bits & bit != 0 {
            return Err(error);
        }
        left &= !bit;
    }
    if left == 0 { Ok(()) } else { Err(Qcow2Error::UnknownFeatures(left)) }
}

/// Reads the header's extensions. Returns the backing file's format, if it is there.
fn extensions(image: &ImageFile, version: u32, range: Range<u64>) -> Result<Option<String>, Qcow2Error> {
    let first = bytes(image, 0..range.end.min(image.len), "header")?;
    let mut at = usize::try_from(range.start).unwrap_or(usize::MAX);
    let mut format = None;
    loop {
        let Some(head) = first.get(at..at.saturating_add(8)) else {
            // Version 2 did not have them at first.
            return if version == 2 { Ok(format) } else { Err(beyond()) };
        };
        let (kind, len) = (word(head, 0), word(head, 4) as usize);
        if kind == extension::END {
            return Ok(format);
        }
        at = at.saturating_add(8);
        let data = first.get(at..at.saturating_add(len)).ok_or_else(beyond)?;
        match kind {
            extension::BACKING_FORMAT => {
                let text =
                    std::str::from_utf8(data).map_err(|_| Qcow2Error::NotText("backing file's format"))?;
                format = Some(text.to_owned());
            }
            // The library takes whole entries for granted.
            extension::FEATURE_NAMES if !len.is_multiple_of(FEATURE_NAME) => {
                let value = len as u64;
                let what = "table of feature names' length";
                return Err(Qcow2Error::OutOfRange { what, value, range: "a multiple of 48" });
            }
            _ => (),
        }
        at = at.saturating_add(len.next_multiple_of(8));
    }
}

fn beyond() -> Qcow2Error {
    Qcow2Error::Inside("its header's extensions do not end within the first cluster".to_owned())
}

fn backing(
    image: &ImageFile,
    at: u64,
    len: u64,
    cluster: u64,
    format: Option<String>,
) -> Result<Option<BackingName>, Qcow2Error> {
    if at == 0 {
        return Ok(None);
    }
    within("backing file's name's length", len, 1..MAX_NAME + 1, "1 to 1023")?;
    within("backing file's name's place", at, V2 as u64..cluster - len.min(cluster), "in the first cluster")?;
    let name = bytes(image, at..at + len, "backing file's name")?;
    let name = String::from_utf8(name).map_err(|_| Qcow2Error::NotText("backing file's name"))?;
    Ok(Some(BackingName { name, format }))
}
