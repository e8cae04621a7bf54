//! How many cases, from which seed: a short fixed run by default, as long as one likes by environment.

use std::time::Duration;

/// The options of a differential run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed.
    pub seed: u64,
    /// How many cases.
    pub cases: u64,
    /// When to stop even if there were fewer.
    pub time: Option<Duration>,
}

impl Options {
    /// `seed` and `cases`, unless the environment says otherwise: `RINGFENCE_SEED` (decimal or 0x…),
    /// `RINGFENCE_CASES`, `RINGFENCE_SECONDS`. With `RINGFENCE_SECONDS` alone, the number of cases is unlimited.
    ///
    /// # Panics
    /// If a variable holds no number: a test asked for something it does not do must not pass.
    pub fn from_environment(seed: u64, cases: u64) -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok()?;
            let parsed = match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => text.parse(),
            };
            Some(
                parsed.unwrap_or_else(|_| panic!("{name}={text} is no number; give a decimal or 0x… number")),
            )
        };
        let time = number("RINGFENCE_SECONDS").map(Duration::from_secs);
        let cases = number("RINGFENCE_CASES").unwrap_or(if time.is_some() { u64::MAX } else { cases });
        Self { seed: number("RINGFENCE_SEED").unwrap_or(seed), cases, time }
    }
}
