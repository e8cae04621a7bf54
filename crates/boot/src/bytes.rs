//! Little-endian integers out of untrusted bytes.

/// `N` bytes at an offset, or `None` past the end.
pub(crate) fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A 16-bit integer.
pub(crate) fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    array(data, at).map(u16::from_le_bytes)
}

/// A 32-bit integer.
pub(crate) fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    array(data, at).map(u32::from_le_bytes)
}

/// A 64-bit integer.
pub(crate) fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    array(data, at).map(u64::from_le_bytes)
}

/// The first bytes in hexadecimal, for messages.
pub(crate) fn hex_head(data: &[u8]) -> String {
    if data.is_empty() {
        return "none".to_owned();
    }
    let head: Vec<String> = data.iter().take(8).map(|b| format!("{b:02x}")).collect();
    head.join(" ")
}

/// Text from an untrusted file, fit for a terminal: up to the first NUL, at most `limit` bytes, control and
/// non-ASCII characters replaced.
pub(crate) fn printable(data: &[u8], limit: usize) -> String {
    data.iter()
        .take(limit)
        .take_while(|&&b| b != 0)
        .map(|&b| if (0x20..0x7f).contains(&b) { b as char } else { '?' })
        .collect()
}
