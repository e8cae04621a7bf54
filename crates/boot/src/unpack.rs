//! Unpacks the payload of a bzImage.
//!
//! The formats are those of the kernel's build: LZ4's legacy frame, gzip, xz with the x86 branch filter, zstd.
//! Whatever the format, the payload ends with the unpacked size in four bytes (gzip has them of its own).

use std::fmt;
use std::io::{self, Read};

use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

use crate::BootError;
use crate::bytes::{hex_head, u32_at};

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the formats' own names")]
pub enum Compression {
    None,
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl Compression {
    /// The first bytes of each format (Linux, Documentation/arch/x86/boot.rst, "payload_offset").
    const MAGIC: [(&'static [u8], Self); 9] = [
        (b"\x7fELF", Self::None),
        (b"\x1f\x8b", Self::Gzip),
        (b"\x1f\x9e", Self::Gzip),
        (b"BZ", Self::Bzip2),
        (b"\x5d\x00", Self::Lzma),
        (b"\xfd7zXZ\x00", Self::Xz),
        (b"\x89LZO", Self::Lzo),
        (b"\x02\x21\x4c\x18", Self::Lz4),
        (b"\x28\xb5\x2f\xfd", Self::Zstd),
    ];

    pub(crate) fn detect(payload: &[u8]) -> Option<Self> {
        Self::MAGIC.iter().find(|(magic, _)| payload.starts_with(magic)).map(|m| m.1)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "not compressed",
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "LZMA",
            Self::Xz => "xz",
            Self::Lzo => "LZO",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
        })
    }
}

/// Takes the pieces of the unpacked kernel.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), BootError>;

/// The most memory that an xz payload's dictionary may take; the kernel's build uses 128 MiB at most.
const XZ_MEMORY_KIB: u32 = 192 << 10;
/// The largest zstd window, which the kernel's build uses, too.
const ZSTD_WINDOW: u64 = 128 << 20;
/// Bytes of unpacked data in each block of LZ4's legacy frame but the last.
const LZ4_BLOCK: usize = 8 << 20;
/// Pieces of the other formats.
const PIECE: usize = 256 << 10;

/// Unpacks a payload into `sink`, at most `limit` bytes. Returns the format.
///
/// # Errors
/// [`BootError::UnknownCompression`], [`BootError::UnsupportedCompression`], [`BootError::CorruptPayload`],
/// [`BootError::PayloadTooLarge`], and what `sink` returns.
pub(crate) fn unpack(payload: &[u8], limit: u64, sink: Sink<'_>) -> Result<Compression, BootError> {
    let format = Compression::detect(payload)
        .ok_or_else(|| BootError::UnknownCompression { first: hex_head(payload) })?;
    let corrupt = |reason: String| BootError::CorruptPayload { compression: format, reason };
    let mut unpacked = 0_u64;
    let mut bounded = |piece: &[u8]| {
        unpacked += piece.len() as u64;
        if unpacked > limit { Err(BootError::PayloadTooLarge { limit }) } else { sink(piece) }
    };
    // Behind the stream there are the four bytes with the unpacked size.
    let (stream, trailer) = payload.split_at(payload.len().saturating_sub(4));
    match format {
        Compression::None => {
            bounded(payload)?;
            return Ok(format);
        }
        Compression::Gzip => pump(flate2::bufread::GzDecoder::new(payload), format, &mut bounded)?,
        Compression::Xz => pump(XzReader::new_mem_limit(stream, false, XZ_MEMORY_KIB), format, &mut bounded)?,
        Compression::Zstd => zstd(stream, &mut bounded)?,
        Compression::Lz4 => lz4(stream, &mut bounded)?,
        Compression::Bzip2 | Compression::Lzma | Compression::Lzo => {
            return Err(BootError::UnsupportedCompression(format));
        }
    }
    if u32_at(trailer, 0).map(u64::from) != Some(unpacked & 0xffff_ffff) {
        return Err(corrupt(format!("{unpacked} bytes came out, but the size at its end is another")));
    }
    Ok(format)
}

/// A zstd frame. The decoder computes its checksum, but leaves it to others to compare it.
fn zstd(stream: &[u8], sink: Sink<'_>) -> Result<(), BootError> {
    let corrupt = |reason: String| BootError::CorruptPayload { compression: Compression::Zstd, reason };
    let mut decoder = StreamingDecoder::new_with_max_window_size(stream, ZSTD_WINDOW)
        .map_err(|e| corrupt(e.to_string()))?;
    pump(&mut decoder, Compression::Zstd, sink)?;
    let decoder = decoder.into_frame_decoder();
    let told = decoder.get_checksum_from_data();
    if told.is_some() && told != decoder.get_calculated_checksum() {
        return Err(corrupt("the checksum does not match".to_owned()));
    }
    Ok(())
}

/// Moves everything that a decoder yields to the sink.
fn pump(mut from: impl Read, format: Compression, sink: Sink<'_>) -> Result<(), BootError> {
    let mut piece = vec![0; PIECE];
    let mut filled = 0;
    loop {
        match from.read(&mut piece[filled..]) {
            Ok(0) => return sink(&piece[..filled]),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                return Err(BootError::CorruptPayload { compression: format, reason: e.to_string() });
            }
        }
        if filled == piece.len() {
            sink(&piece)?;
            filled = 0;
        }
    }
}

/// LZ4's legacy frame: the magic number, then blocks, each with its compressed size in four bytes before it. A
/// magic number in the place of a size starts another frame.
fn lz4(mut stream: &[u8], sink: Sink<'_>) -> Result<(), BootError> {
    const MAGIC: u32 = 0x184c_2102;
    let corrupt = |reason: String| BootError::CorruptPayload { compression: Compression::Lz4, reason };
    let mut block = vec![0; LZ4_BLOCK];
    while !stream.is_empty() {
        let size = u32_at(stream, 0).ok_or_else(|| corrupt("a block's size is cut off".to_owned()))?;
        stream = &stream[4..];
        if size == MAGIC {
            continue;
        }
        let compressed = usize::try_from(size).ok().and_then(|n| stream.get(..n));
        let compressed = compressed
            .ok_or_else(|| corrupt(format!("a block of {size} bytes is cut off after {}", stream.len())))?;
        let n =
            lz4_flex::block::decompress_into(compressed, &mut block).map_err(|e| corrupt(e.to_string()))?;
        sink(&block[..n])?;
        stream = &stream[compressed.len()..];
    }
    Ok(())
}
