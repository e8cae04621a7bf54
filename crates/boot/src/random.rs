//! Random numbers for placing the kernel.

use crate::{BootError, Kaslr};

/// A source of numbers: the host's, or a repeatable sequence.
#[derive(Debug)]
pub(crate) enum Random {
    Host,
    /// SplitMix64 (Steele, Lea, Flood 2014): only for repeatable runs, where nothing is secret.
    Seeded(u64),
}

impl Random {
    pub(crate) fn of(kaslr: Kaslr) -> Option<Self> {
        match kaslr {
            Kaslr::Off => None,
            Kaslr::Random => Some(Self::Host),
            Kaslr::Seeded(seed) => Some(Self::Seeded(seed)),
        }
    }

    fn next(&mut self) -> Result<u64, BootError> {
        match self {
            Self::Host => {
                let mut bytes = [0; 8];
                getrandom::fill(&mut bytes).map_err(BootError::Random)?;
                Ok(u64::from_le_bytes(bytes))
            }
            Self::Seeded(state) => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                Ok(z ^ (z >> 31))
            }
        }
    }

    /// A number below `bound`, which must not be 0. The bias is below 2^-50 for the bounds used here.
    pub(crate) fn below(&mut self, bound: u64) -> Result<u64, BootError> {
        Ok(self.next()? % bound)
    }
}
