//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, written with a binary suffix: `512M`, `2G`, `64K`, or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A size that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    #[error("{0:?} is not a size; write a whole number with K, M, G or T behind it, such as 512M or 2G")]
    Syntax(String),
    /// More than 64 bits hold.
    #[error("{0:?} is more than any machine can have")]
    TooLarge(String),
}

/// Suffixes and the powers of two they stand for.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let syntax = || SizeError::Syntax(text.to_owned());
        let bare = text.strip_suffix("iB").or_else(|| text.strip_suffix('B')).unwrap_or(text);
        let last = bare.chars().last().ok_or_else(syntax)?.to_ascii_uppercase();
        let unit = UNITS.iter().find(|(suffix, _)| *suffix == last);
        let digits = if unit.is_some() { &bare[..bare.len() - 1] } else { bare };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        let shift = unit.map_or(0, |(_, shift)| *shift);
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for ByteSize {
    /// Exact with the largest suffix that divides it, or else rounded to a tenth.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = UNITS.iter().find(|(_, shift)| self.0 >> shift != 0 && self.0.is_multiple_of(1 << shift));
        if let Some((suffix, shift)) = exact
            && self.0 >> shift < 10_000
        {
            return write!(f, "{}{suffix}", self.0 >> shift);
        }
        match UNITS.iter().find(|(_, shift)| self.0 >> shift != 0) {
            Some((suffix, shift)) => write!(f, "{:.1}{suffix}", self.0 as f64 / (1_u64 << shift) as f64),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("2g", 2 << 30),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1", "1.5G", "12X", "1 G", "B", "éM"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Syntax(_))), "{text}");
        }
        for text in ["99999999999999999999", "99999999999G"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::TooLarge(_))), "{text}");
        }
    }

    #[test]
    fn display_is_short() {
        let shown: Vec<String> =
            [0, 512 << 20, 2 << 30, (1 << 30) + 1, 1536 << 20].map(|n| ByteSize(n).to_string()).into();
        assert_eq!(shown, ["0 bytes", "512M", "2G", "1.0G", "1536M"]);
    }
}
