//! Kernels made for tests, and a machine to load them into.

use std::io::Write;

use lzma_rust2::{CheckType, FilterType, XzOptions, XzWriter};
use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, RegionKind, RegionSpec};

use crate::Compression;

/// Where the test kernels are linked.
pub(super) const LINKED: u64 = 0x100_0000;
/// The virtual address of that.
pub(super) const VIRTUAL: u64 = 0xffff_ffff_8100_0000;
/// The memory that a test kernel asks for.
pub(super) const INIT_SIZE: u64 = 0x40_0000;

/// A machine of the usual layout with `size` bytes, all of it dirty.
pub(super) fn machine(size: u64) -> GuestMemory {
    let region = |start, end, kind| RegionSpec { range: GuestRange::new(start, end - start), kind };
    let memory = GuestMemory::new(&[
        region(0, 0xa_0000, RegionKind::Ram),
        region(0xc_0000, 0x10_0000, RegionKind::Rom),
        region(0x10_0000, size, RegionKind::Ram),
    ])
    .unwrap();
    for range in memory.ram().collect::<Vec<_>>() {
        memory.fill(range.start, 0xdd, range.len).unwrap();
    }
    memory
}

pub(super) fn bytes(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut into = vec![0; len];
    memory.read_bytes(GuestAddress(at), &mut into).unwrap();
    into
}

/// The text up to the NUL.
pub(super) fn text(memory: &GuestMemory, at: u64) -> String {
    let raw = bytes(memory, at, 256);
    String::from_utf8(raw.split(|b| *b == 0).next().unwrap().to_vec()).unwrap()
}

/// A segment to be put into an ELF file: physical and virtual address, contents, size in memory.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) physical: u64,
    pub(super) virtual_address: u64,
    pub(super) data: Vec<u8>,
    pub(super) memory: u64,
}

/// An ELF file to be made.
pub(super) struct ElfFile {
    pub(super) bits: u8,
    pub(super) machine: u16,
    pub(super) entry: u64,
    pub(super) parts: Vec<Part>,
    pub(super) note: Vec<u8>,
}

impl ElfFile {
    /// Code that a test can recognize, and data with a cleared rest.
    pub(super) fn linux() -> Self {
        let part = |offset: u64, data: Vec<u8>, memory| Part {
            physical: LINKED + offset,
            virtual_address: VIRTUAL + offset,
            data,
            memory,
        };
        let code: Vec<u8> = (0..0x3000_u32).map(|i| ((i * 7) >> 3) as u8).collect();
        Self {
            bits: 64,
            machine: 62,
            entry: LINKED + 0x10,
            parts: vec![part(0, code, 0x3000), part(0x20_0000, vec![0x5a; 0x123], 0x2000)],
            note: Vec::new(),
        }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let wide = self.bits == 64;
        let (header, entry_size) = if wide { (64, 56) } else { (52, 32) };
        let count = self.parts.len() + usize::from(!self.note.is_empty());
        let word = |v: u64| if wide { v.to_le_bytes().to_vec() } else { (v as u32).to_le_bytes().to_vec() };
        let mut file = vec![0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1];
        file.resize(16, 0);
        file.extend(2_u16.to_le_bytes());
        file.extend(self.machine.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        file.extend(word(self.entry));
        file.extend(word(header));
        file.extend(word(0));
        file.extend(0_u32.to_le_bytes());
        for half in [header as u16, entry_size, count as u16, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = header + u64::from(entry_size) * count as u64;
        let mut contents: Vec<u8> = Vec::new();
        let note = Part { physical: 0, virtual_address: 0, data: self.note.clone(), memory: 0 };
        let notes = Some((4_u32, &note)).filter(|_| !self.note.is_empty());
        for (kind, part) in self.parts.iter().map(|p| (1_u32, p)).chain(notes) {
            let size = part.data.len() as u64;
            file.extend(kind.to_le_bytes());
            if wide {
                file.extend(5_u32.to_le_bytes());
            }
            for value in [offset, part.virtual_address, part.physical, size, part.memory] {
                file.extend(word(value));
            }
            if !wide {
                file.extend(5_u32.to_le_bytes());
            }
            file.extend(word(4));
            contents.extend(&part.data);
            offset += size;
        }
        file.extend(contents);
        file
    }
}

/// A note of Xen's with a 32-bit entry.
pub(super) fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // Another owner's note first.
    for word in [3_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"GN\0\0\x01\0\0\0");
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// Compresses as the kernel's build does, unpacked size at the end.
pub(super) fn compress(data: &[u8], format: Compression) -> Vec<u8> {
    let mut packed = match format {
        Compression::None => return data.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            return encoder.finish().unwrap();
        }
        Compression::Xz => {
            let mut options = XzOptions::with_preset(1);
            options.set_check_sum_type(CheckType::Crc32);
            options.prepend_pre_filter(FilterType::BcjX86, 0);
            let mut writer = XzWriter::new(Vec::new(), options).unwrap();
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
        }
        Compression::Lz4 => {
            let mut frame = 0x184c_2102_u32.to_le_bytes().to_vec();
            for block in data.chunks(8 << 20) {
                let packed = lz4_flex::block::compress(block);
                frame.extend((packed.len() as u32).to_le_bytes());
                frame.extend(packed);
            }
            frame
        }
        Compression::Bzip2 => b"BZh91AY&SY".to_vec(),
        Compression::Lzma => b"\x5d\0\0\0\x04".to_vec(),
        Compression::Lzo => b"\x89LZO\0\r\n".to_vec(),
    };
    packed.extend((data.len() as u32).to_le_bytes());
    packed
}

/// Setup sectors and the payload's place behind them.
pub(super) const CODE_OFFSET: usize = 1024;
pub(super) const PAYLOAD_OFFSET: usize = 0x220;

/// A bzImage around a payload, as Linux 6.x has it. Tests change fields by [`patch`].
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; CODE_OFFSET];
    let code_len = (PAYLOAD_OFFSET + payload.len()).next_multiple_of(16);
    patch(&mut file, 0x1f1, &[1]);
    patch(&mut file, 0x1f4, &((code_len / 16) as u32).to_le_bytes());
    patch(&mut file, 0x1fe, &0xaa55_u16.to_le_bytes());
    patch(&mut file, 0x200, b"\xeb\x6a");
    patch(&mut file, 0x202, b"HdrS");
    patch(&mut file, 0x206, &0x20f_u16.to_le_bytes());
    patch(&mut file, 0x20e, &0x100_u16.to_le_bytes());
    patch(&mut file, 0x211, &[1 | 2]);
    patch(&mut file, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    patch(&mut file, 0x230, &(2_u32 << 20).to_le_bytes());
    patch(&mut file, 0x234, &[1, 21]);
    patch(&mut file, 0x236, &0x7f_u16.to_le_bytes());
    patch(&mut file, 0x238, &2047_u32.to_le_bytes());
    patch(&mut file, 0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    patch(&mut file, 0x24c, &(payload.len() as u32).to_le_bytes());
    patch(&mut file, 0x250, &0xdead_beef_u64.to_le_bytes());
    patch(&mut file, 0x258, &LINKED.to_le_bytes());
    patch(&mut file, 0x260, &(INIT_SIZE as u32).to_le_bytes());
    patch(&mut file, 0x300, b"6.9.0-test (me@here)\x1b[2J #1\0");
    file.extend((0..PAYLOAD_OFFSET).map(|i| i as u8));
    file.extend(payload);
    file.resize(CODE_OFFSET + code_len, 0);
    file
}

/// Overwrites bytes.
pub(super) fn patch(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage around [`ElfFile::linux`] with relocations behind it.
pub(super) fn linux(format: Compression) -> Vec<u8> {
    bzimage(&compress(&linux_with_relocations(), format))
}

/// Offsets in the test kernel of a place of each kind: 64-bit, inverse 32-bit, 32-bit.
pub(super) const PLACES: [u64; 3] = [0x1000, 0x1010, 0x1020];

/// The ELF file with the relocations behind it.
pub(super) fn linux_with_relocations() -> Vec<u8> {
    let mut kernel = ElfFile::linux();
    let code = &mut kernel.parts[0].data;
    patch(code, PLACES[0] as usize, &(VIRTUAL + 0x2222).to_le_bytes());
    patch(code, PLACES[1] as usize, &0x1234_u32.to_le_bytes());
    patch(code, PLACES[2] as usize, &((VIRTUAL + 0x3333) as u32).to_le_bytes());
    let mut file = kernel.build();
    for place in PLACES {
        file.extend(0_u32.to_le_bytes());
        file.extend(((VIRTUAL + place) as u32).to_le_bytes());
    }
    file
}
