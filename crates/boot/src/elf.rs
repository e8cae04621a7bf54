//! The part of ELF that loading a kernel needs: header and program headers, 32- and 64-bit, little-endian (System V ABI,
//! "Program Loading").

use ringfence_memory::GuestRange;

use crate::BootError;
use crate::bytes::{u16_at, u32_at, u64_at};

/// The first four bytes.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";
/// `e_machine` of x86-64.
pub(crate) const X86_64: u16 = 62;
/// `e_machine` of the 386.
pub(crate) const I386: u16 = 3;
/// The most program headers that are looked at; a kernel has about ten.
const MAX_SEGMENTS: u16 = 128;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    kind: u32,
    pub(crate) offset: u64,
    pub(crate) virtual_address: u64,
    pub(crate) physical_address: u64,
    pub(crate) file_size: u64,
    pub(crate) memory_size: u64,
    align: u64,
}

impl Segment {
    /// Where its bytes end in the file.
    pub(crate) fn file_end(&self) -> u64 {
        self.offset.saturating_add(self.file_size)
    }

    /// Its physical memory as linked.
    pub(crate) fn memory(&self) -> GuestRange {
        GuestRange::new(self.physical_address, self.memory_size)
    }
}

/// What the headers say.
#[derive(Clone, Debug)]
pub(crate) struct Elf {
    pub(crate) is_64bit: bool,
    pub(crate) machine: u16,
    pub(crate) entry: u64,
    segments: Vec<Segment>,
    /// One past the last byte that a header names: what follows in the file is not part of the ELF file.
    pub(crate) end: u64,
}

/// Offsets of the fields in the two classes' headers.
struct Class {
    header_size: usize,
    phoff: usize,
    shoff: usize,
    /// `e_phentsize`; `e_phnum`, `e_shentsize` and `e_shnum` follow.
    phentsize: usize,
    ph_size: u16,
}

const CLASS32: Class = Class { header_size: 52, phoff: 28, shoff: 32, phentsize: 42, ph_size: 32 };
const CLASS64: Class = Class { header_size: 64, phoff: 32, shoff: 40, phentsize: 54, ph_size: 56 };

/// How many bytes from the start hold all headers, or `None` if `head` is too short to tell.
///
/// # Errors
/// [`BootError::BadElf`] if the header makes no sense.
pub(crate) fn headers_len(head: &[u8]) -> Result<Option<usize>, BootError> {
    if head.len() < CLASS64.header_size {
        return Ok(None);
    }
    let header = Header::read(head)?;
    let len = header.phoff.checked_add(u64::from(header.phnum) * u64::from(header.class.ph_size));
    let len = len
        .and_then(|l| usize::try_from(l).ok())
        .ok_or(BootError::BadElf("its program headers are out of reach"))?;
    // Linkers put them right behind the file header.
    if len > 1 << 20 {
        return Err(BootError::BadElf("its program headers are more than 1 MiB into the file"));
    }
    Ok(Some(len.max(header.class.header_size)))
}

struct Header {
    class: &'static Class,
    phoff: u64,
    shoff: u64,
    phnum: u16,
}

impl Header {
    fn read(head: &[u8]) -> Result<Self, BootError> {
        if !head.starts_with(MAGIC) {
            return Err(BootError::BadElf("the magic number is missing"));
        }
        let class = match head.get(4) {
            Some(1) => &CLASS32,
            Some(2) => &CLASS64,
            _ => return Err(BootError::BadElf("it is neither 32- nor 64-bit")),
        };
        if head.get(5) != Some(&1) {
            return Err(BootError::BadElf("it is not little-endian"));
        }
        let short = BootError::Truncated {
            part: "ELF header",
            needs: class.header_size as u64,
            has: head.len() as u64,
        };
        let word =
            |at| if class.header_size == 64 { u64_at(head, at) } else { u32_at(head, at).map(u64::from) };
        let fields = (
            word(class.phoff),
            word(class.shoff),
            u16_at(head, class.phentsize),
            u16_at(head, class.phentsize + 2),
        );
        let (Some(phoff), Some(shoff), Some(phentsize), Some(phnum)) = fields else { return Err(short) };
        if phnum == 0 {
            return Err(BootError::BadElf("it has no program headers, so nothing says what to load"));
        }
        if phnum > MAX_SEGMENTS || phentsize != class.ph_size {
            return Err(BootError::BadElf("its program headers have an impossible number or size"));
        }
        Ok(Self { class, phoff, shoff, phnum })
    }
}

impl Elf {
    /// Parses headers, all of which must be in `head` (see [`headers_len`]).
    ///
    /// # Errors
    /// [`BootError::Truncated`] if they are not, [`BootError::BadElf`] if they make no sense.
    pub(crate) fn parse(head: &[u8]) -> Result<Self, BootError> {
        let header = Header::read(head)?;
        let is_64bit = header.class.header_size == 64;
        let short = || BootError::Truncated {
            part: "program headers",
            needs: header.phoff.saturating_add(u64::from(header.phnum) * u64::from(header.class.ph_size)),
            has: head.len() as u64,
        };
        let mut segments = Vec::with_capacity(header.phnum.into());
        for index in 0..header.phnum {
            let at = u64::from(index) * u64::from(header.class.ph_size);
            let at = header.phoff.checked_add(at).and_then(|a| usize::try_from(a).ok()).ok_or_else(short)?;
            let entry = head.get(at..).ok_or_else(short)?;
            let segment = if is_64bit { segment64(entry) } else { segment32(entry) };
            segments.push(segment.ok_or_else(short)?);
        }
        let entry = if is_64bit { u64_at(head, 24) } else { u32_at(head, 24).map(u64::from) };
        let (shentsize, shnum) =
            (u16_at(head, header.class.phentsize + 4), u16_at(head, header.class.phentsize + 6));
        let sections = u64::from(shentsize.unwrap_or(0)) * u64::from(shnum.unwrap_or(0));
        let end = segments.iter().map(Segment::file_end).max().unwrap_or(0);
        let elf = Self {
            is_64bit,
            machine: u16_at(head, 18).ok_or_else(short)?,
            entry: entry.ok_or_else(short)?,
            end: end.max(header.shoff.saturating_add(sections)).max(headers_len(head)?.unwrap_or(0) as u64),
            segments,
        };
        elf.check()?;
        Ok(elf)
    }

    fn check(&self) -> Result<(), BootError> {
        let mut loads: Vec<&Segment> = self.loads().collect();
        if loads.is_empty() {
            return Err(BootError::BadElf("it has nothing to load"));
        }
        for segment in &loads {
            if segment.file_size > segment.memory_size {
                return Err(BootError::BadElf("a segment has more bytes in the file than in memory"));
            }
            let wraps = |a: u64, n: u64| a.checked_add(n).is_none();
            if wraps(segment.physical_address, segment.memory_size)
                || wraps(segment.offset, segment.file_size)
            {
                return Err(BootError::BadElf("a segment ends beyond the address space"));
            }
        }
        // Without overlaps, the bytes written are bounded by the guest's memory.
        loads.sort_by_key(|s| s.physical_address);
        if loads.windows(2).any(|w| w[0].memory().overlaps(&w[1].memory())) {
            return Err(BootError::BadElf("two segments want the same memory"));
        }
        Ok(())
    }

    /// Refuses what is not a 64-bit kernel for this architecture.
    ///
    /// # Errors
    /// [`BootError::WrongArchitecture`] or [`BootError::ThirtyTwoBit`].
    pub(crate) fn require_linux64(&self) -> Result<(), BootError> {
        match (self.machine, self.is_64bit) {
            (X86_64, true) => Ok(()),
            (I386 | X86_64, _) => Err(BootError::ThirtyTwoBit),
            (machine, _) => Err(BootError::WrongArchitecture(machine)),
        }
    }

    /// Refuses another architecture.
    ///
    /// # Errors
    /// [`BootError::WrongArchitecture`].
    pub(crate) fn require_x86(&self) -> Result<(), BootError> {
        match self.machine {
            X86_64 | I386 => Ok(()),
            machine => Err(BootError::WrongArchitecture(machine)),
        }
    }

    /// The segments that are loaded and not empty.
    pub(crate) fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0)
    }

    /// Where the loaded segments end in the file.
    pub(crate) fn loads_end(&self) -> u64 {
        self.loads().map(Segment::file_end).max().unwrap_or(0)
    }

    /// All loaded segments' physical memory, from the first to the last.
    pub(crate) fn extent(&self) -> GuestRange {
        let start = self.loads().map(|s| s.physical_address).min().unwrap_or(0);
        let end = self.loads().map(|s| s.memory().end()).max().unwrap_or(0);
        GuestRange::new(start, end - start)
    }

    /// The physical address of the entry point. Kernels differ in whether theirs is physical or virtual.
    pub(crate) fn physical_entry(&self) -> Option<u64> {
        let inside = |address: u64, start: u64, s: &Segment| {
            (start..start.saturating_add(s.memory_size)).contains(&address)
        };
        if self.loads().any(|s| inside(self.entry, s.physical_address, s)) {
            return Some(self.entry);
        }
        let segment = self.loads().find(|s| inside(self.entry, s.virtual_address, s))?;
        segment.physical_address.checked_add(self.entry - segment.virtual_address)
    }

    /// The contents of the first note of this owner (with its NUL) and type. `file` is the whole file.
    pub(crate) fn note<'a>(&self, file: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
        self.segments.iter().filter(|s| s.kind == PT_NOTE).find_map(|segment| {
            let (start, end) =
                (usize::try_from(segment.offset).ok()?, usize::try_from(segment.file_end()).ok()?);
            find_note(file.get(start..end)?, if segment.align == 8 { 8 } else { 4 }, owner, kind)
        })
    }
}

/// Searches a note segment: name size, contents size, type, then name and contents, each padded.
fn find_note<'a>(mut rest: &'a [u8], align: usize, owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    loop {
        let (name_len, len) = (u32_at(rest, 0)? as usize, u32_at(rest, 4)? as usize);
        let name = rest.get(12..12_usize.checked_add(name_len)?)?;
        let start = 12_usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let contents = rest.get(start..start.checked_add(len)?)?;
        if name == owner && u32_at(rest, 8)? == kind {
            return Some(contents);
        }
        rest = rest.get(start.checked_add(len)?.checked_next_multiple_of(align)?..)?;
    }
}

fn segment64(p: &[u8]) -> Option<Segment> {
    Some(Segment {
        kind: u32_at(p, 0)?,
        offset: u64_at(p, 8)?,
        virtual_address: u64_at(p, 16)?,
        physical_address: u64_at(p, 24)?,
        file_size: u64_at(p, 32)?,
        memory_size: u64_at(p, 40)?,
        align: u64_at(p, 48)?,
    })
}

fn segment32(p: &[u8]) -> Option<Segment> {
    let word = |at| u32_at(p, at).map(u64::from);
    Some(Segment {
        kind: u32_at(p, 0)?,
        offset: word(4)?,
        virtual_address: word(8)?,
        physical_address: word(12)?,
        file_size: word(16)?,
        memory_size: word(20)?,
        align: word(28)?,
    })
}
