//! Rates: how people write them, and what holds a device to them.
//!
//! A [`Bucket`] is one limit, a [`Limiter`] what a device has: bytes a second and events (packets, operations) a second,
//! either or both. Neither sleeps nor has a thread; whoever asks is told how long to wait.

#![forbid(unsafe_code)]

mod bucket;
mod limiter;

pub use bucket::Bucket;
pub use limiter::Limiter;

/// A rate as it is written: a whole number above 0, with K, M or G for powers of 1000.
pub fn parse(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 1000),
        b'M' => (text.get(..text.len() - 1)?, 1_000_000),
        b'G' => (text.get(..text.len() - 1)?, 1_000_000_000),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit).filter(|&rate| rate > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_whole_numbers_with_decimal_units() {
        let cases = [("7", 7), ("5k", 5000), ("5K", 5000), ("10M", 10_000_000), ("2G", 2_000_000_000)];
        for (text, rate) in cases {
            assert_eq!(parse(text), Some(rate), "{text}");
        }
        for text in ["", "0", "K", "-1", "1.5M", "1T", "é", "18446744073709551615G"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
