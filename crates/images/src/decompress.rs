//! Decoders for what Debian compresses with, bounded in memory.

use std::io::{self, Read};

/// xz may ask for this much memory, in KiB: `xz -9` needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 128 << 10;

/// zstd may ask for a window of this many bytes.
const ZSTD_WINDOW: u64 = 128 << 20;

/// A reader of the plain bytes inside a compressed stream, chosen by a file name's ending.
/// `None` means that the ending is not known; an unknown ending without a compression suffix
/// (`.tar`, `.ko`) is the caller's to treat as plain.
pub(crate) fn by_suffix<'a>(name: &str, raw: impl Read + 'a) -> io::Result<Option<Box<dyn Read + 'a>>> {
    let suffix = name.rsplit('.').next().unwrap_or_default();
    Ok(Some(match suffix {
        "xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(raw, true, XZ_MEMORY_KIB)),
        "zst" => {
            let mut decoder = ruzstd::decoding::FrameDecoder::new();
            decoder.set_max_window_size(ZSTD_WINDOW);
            Box::new(
                ruzstd::decoding::StreamingDecoder::new_with_decoder(raw, decoder)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?,
            )
        }
        "tar" | "ko" => Box::new(raw),
        _ => return Ok(None),
    }))
}

/// Reads at most `limit` bytes; one byte more is an error, never a cut.
pub(crate) fn read_at_most(reader: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it holds more than {limit} bytes")));
    }
    Ok(bytes)
}
