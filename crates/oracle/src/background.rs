//! What the data pages hold before a case: eight fixed fillings of different character.

use std::sync::LazyLock;

use crate::case::BACKGROUNDS;
use crate::layout::DATA_LEN;
use crate::random::Random;
use crate::values;

type Page = [u8; DATA_LEN];

static FILLINGS: LazyLock<Vec<Page>> = LazyLock::new(|| (0..BACKGROUNDS).map(fill).collect());

/// Filling number `index`, modulo their number.
pub fn get(index: u8) -> &'static Page {
    &FILLINGS[usize::from(index % BACKGROUNDS)]
}

fn fill(index: u8) -> Page {
    let mut random = Random::new(0x6261_636b + u64::from(index));
    let mut page = [0; DATA_LEN];
    for chunk in page.chunks_exact_mut(16) {
        let value: u128 = match index {
            0 => 0,
            1 => values::pair(&mut random, Random::bits),
            2 => values::pair(&mut random, values::integer),
            3 => values::pair(&mut random, values::singles),
            4 => values::pair(&mut random, values::double),
            5 => values::pair(&mut random, values::halves),
            6 => values::extended(&mut random),
            _ => values::pair(&mut random, values::bytes),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    page
}
