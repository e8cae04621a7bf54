//! Operand values: random ones, and those at the edges of the number formats.

use crate::random::Random;

/// Two quadwords of one kind.
pub(crate) fn pair(random: &mut Random, one: fn(&mut Random) -> u64) -> u128 {
    u128::from(one(random)) | u128::from(one(random)) << 64
}

/// An integer: boundary values of every width, powers of two and their neighbours, small, random.
pub(crate) fn integer(random: &mut Random) -> u64 {
    const EDGES: [u64; 18] = [
        0,
        1,
        2,
        u64::MAX,
        u64::MAX - 1,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        0x0000_8000_0000_0000,
        0x8080_8080_8080_8080,
    ];
    match random.below(8) {
        0 | 1 => random.pick(&EDGES),
        2 => (1u64 << random.below(64)).wrapping_add(random.below(3)).wrapping_sub(1),
        3 => random.below(72),
        4 => random.below(1 << 16).wrapping_neg(),
        5 => random.bits() >> random.below(64),
        6 => random.bits() & random.bits() & random.bits(),
        _ => random.bits(),
    }
}

/// Eight bytes, each of them zero, an edge, a digit or random.
pub(crate) fn bytes(random: &mut Random) -> u64 {
    let byte = |random: &mut Random| match random.below(4) {
        0 => 0,
        1 => random.pick(&[0x7f, 0x80, 0xff, 1]),
        2 => b'0' + random.below(10) as u8,
        _ => random.bits() as u8,
    };
    u64::from_le_bytes(std::array::from_fn(|_| byte(random)))
}

/// A floating-point number of `exponent` and `fraction` bits: zeroes, denormals, infinities, NaNs, edges, random.
fn float(random: &mut Random, exponent: u32, fraction: u32) -> u64 {
    let all = (1u64 << exponent) - 1;
    let bias = all >> 1;
    let mantissa = (1u64 << fraction) - 1;
    let (e, f) = match random.below(12) {
        0 => (0, 0),
        1 => (0, random.bits() & mantissa),
        2 => (all, 0),
        3 => (all, (random.bits() & mantissa) | 1 << (fraction - 1)),
        4 => (all, (random.bits() & (mantissa >> 1)) | 1),
        5 => (all - 1, mantissa),
        6 => (1, random.below(2)),
        7 => (bias + random.below(70), 0),
        // Near the integers, where conversions round and overflow.
        8 => (bias + random.below(66), random.bits() & mantissa),
        9 => ((bias.wrapping_sub(3).wrapping_add(random.below(6))) & all, random.bits() & mantissa & !0xff),
        10 => (bias, random.pick(&[0, 1, mantissa, 1 << (fraction - 1)])),
        _ => (random.bits() & all, random.bits() & mantissa),
    };
    random.below(2) << (exponent + fraction) | (e & all) << fraction | (f & mantissa)
}

/// A double.
pub(crate) fn double(random: &mut Random) -> u64 {
    float(random, 11, 52)
}

/// Two singles.
pub(crate) fn singles(random: &mut Random) -> u64 {
    float(random, 8, 23) | float(random, 8, 23) << 32
}

/// Four half-precision numbers, or bfloats.
pub(crate) fn halves(random: &mut Random) -> u64 {
    let one = |random: &mut Random| {
        if random.chance(70) { float(random, 5, 10) } else { float(random, 8, 7) }
    };
    (0..4).fold(0, |value, lane| value | one(random) << (16 * lane))
}

/// A number of the x87's 80 bits, the encodings it does not support included; the top 48 bits are 0.
pub(crate) fn extended(random: &mut Random) -> u128 {
    let integer = 1u64 << 63;
    let (exponent, significand) = match random.below(16) {
        0 => (0, 0),
        1 => (0, random.bits() >> 1),
        2 => (0, random.bits() | integer),
        3 => (0x7fff, integer),
        4 => (0x7fff, integer | 1 << 62 | random.bits() >> 2),
        5 => (0x7fff, integer | random.bits() >> 2 | 1),
        6 => (0x7fff, random.bits() >> 1),
        7 => (random.below(0x7fff), random.bits() >> 1),
        8 => (0x3fff, integer),
        9 => (0x3fff + random.below(66), integer | random.bits()),
        10 => (0x3fff + random.below(66), integer),
        11 => (0x3ffe - random.below(4), integer | random.bits()),
        12 => (0x3fff + random.below(4), integer | random.bits() & !0xfff),
        // A packed decimal number, for FBLD.
        13 => (random.pick(&[0, 0x15, 0x99]), (0..16).fold(0, |v, i| v | random.below(10) << (4 * i))),
        14 => (random.pick(&[0x3c00, 0x4400, 0x3f80, 0x4080, 1, 0x7ffe]), integer | random.bits()),
        _ => (random.below(0x8000), integer | random.bits()),
    };
    u128::from(significand) | u128::from(exponent | random.below(2) << 15) << 64
}
