//! Reads what a kernel module says about itself: the `.modinfo` section of its ELF object file.
//!
//! The section is a sequence of `key=value` strings, each closed by a NUL (Linux `include/linux/moduleparam.h`).
//! Section layout: ELF specification 1.2, figures 1-3 and 1-8; ELF-64 object file format 1.5, chapters 4 and 5.

/// What a module says about itself, as far as loading it goes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ModInfo {
    /// Modules that have to be there before; with underscores.
    pub depends: Vec<String>,
    /// Modules that should be there before if they exist (`softdep=pre:`).
    pub soft_depends: Vec<String>,
    /// Patterns of devices and names that the module stands for.
    pub aliases: Vec<String>,
}

/// Where an ELF file of one class has what is wanted here: offsets of fields in the file's header and in a section's.
struct Layout {
    /// `e_shoff`, `e_shentsize`, `e_shnum`, `e_shstrndx`.
    table: usize,
    entry_size: usize,
    count: usize,
    names: usize,
    /// Least size of a section's header, and `sh_offset` and `sh_size` in it.
    section: usize,
    start: usize,
    size: usize,
    /// Reads an address or a size.
    word: fn(&[u8], usize) -> Option<usize>,
}

const ELF32: Layout = Layout {
    table: 0x20,
    entry_size: 0x2e,
    count: 0x30,
    names: 0x32,
    section: 40,
    start: 0x10,
    size: 0x14,
    word: |bytes, at| usize::try_from(u32_at(bytes, at)?).ok(),
};

const ELF64: Layout = Layout {
    table: 0x28,
    entry_size: 0x3a,
    count: 0x3c,
    names: 0x3e,
    section: 64,
    start: 0x18,
    size: 0x20,
    word: |bytes, at| usize::try_from(u64_at(bytes, at)?).ok(),
};

/// The self-description of the module in `elf`; `None` if that is no little-endian ELF object with one.
pub(super) fn parse(elf: &[u8]) -> Option<ModInfo> {
    let layout = match elf.get(..6)? {
        b"\x7fELF\x01\x01" => ELF32,
        b"\x7fELF\x02\x01" => ELF64,
        _ => return None,
    };
    let table = (layout.word)(elf, layout.table)?;
    let entry_size = usize::from(u16_at(elf, layout.entry_size)?);
    let count = usize::from(u16_at(elf, layout.count)?);
    let names_index = usize::from(u16_at(elf, layout.names)?);
    if entry_size < layout.section {
        return None;
    }
    let header = |index: usize| {
        let start = table.checked_add(index.checked_mul(entry_size)?)?;
        elf.get(start..start.checked_add(layout.section)?)
    };
    let contents = |header: &[u8]| {
        let start = (layout.word)(header, layout.start)?;
        elf.get(start..start.checked_add((layout.word)(header, layout.size)?)?)
    };
    let names = contents(header(names_index)?)?;
    let is_modinfo = |section: &[u8]| {
        let start = u32_at(section, 0).and_then(|start| usize::try_from(start).ok());
        start.and_then(|start| names.get(start..)).is_some_and(|name| name.starts_with(b".modinfo\0"))
    };
    let section = (0..count).filter_map(header).find(|section| is_modinfo(section))?;
    Some(parse_strings(contents(section)?))
}

fn parse_strings(section: &[u8]) -> ModInfo {
    let mut info = ModInfo::default();
    for line in section.split(|&byte| byte == 0) {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        match line.split_once('=') {
            Some(("depends", names)) => {
                info.depends.extend(names.split(',').filter(|name| !name.is_empty()).map(super::canonical));
            }
            Some(("alias", pattern)) => info.aliases.push(pattern.to_owned()),
            Some(("softdep", rule)) => {
                // `pre: a b post: c`
                let mut before = false;
                for word in rule.split_whitespace() {
                    match word {
                        "pre:" => before = true,
                        "post:" => before = false,
                        name if before => info.soft_depends.push(super::canonical(name)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    info
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
