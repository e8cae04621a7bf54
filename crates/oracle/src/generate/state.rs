//! The registers that a case starts from, before its operands are arranged.

use iced_x86::{Instruction, Mnemonic};

use crate::case::{Case, Mode};
use crate::layout::{DATA, selector};
use crate::random::Random;
use crate::{BACKGROUNDS, values};

const STATUS: u64 = 0x8d5;
const TF: u64 = 1 << 8;
const DF: u64 = 1 << 10;
const AC: u64 = 1 << 18;

/// Fills every register of `case`.
pub(crate) fn fill(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    case.gpr = std::array::from_fn(|_| values::integer(random));
    case.rflags = random.bits() & STATUS | 0x202;
    if random.chance(if instruction.is_string_instruction() { 30 } else { 5 }) {
        case.rflags |= DF;
    }
    if random.chance(4) {
        case.rflags |= AC;
    }
    if random.chance(2) {
        case.rflags |= TF;
    }
    case.background = random.below(u64::from(BACKGROUNDS)) as u8;
    segments(random, case);
    vectors(random, case);
    x87(random, case, instruction);
}

fn segments(random: &mut Random, case: &mut Case) {
    /// Segments that a data register can hold in 32-bit code.
    const DATA_SEGMENTS: [u16; 9] = [
        selector::DATA32,
        selector::DATA32,
        selector::SYSTEM_DATA,
        selector::DATA16,
        selector::SHORT,
        selector::READ_ONLY,
        selector::EXPAND_DOWN,
        selector::EXPAND_DOWN16,
        selector::OFFSET,
    ];
    const STACK_SEGMENTS: [u16; 6] = [
        selector::DATA32,
        selector::DATA16,
        selector::SHORT,
        selector::OFFSET,
        selector::EXPAND_DOWN,
        selector::SYSTEM_DATA,
    ];
    if case.mode() == Mode::Bits64 {
        let base = |random: &mut Random| match random.below(4) {
            0 => 0,
            1 => DATA[random.below(4) as usize].address + random.below(4096),
            2 => random.bits() >> 17,
            _ => random.below(1 << 32),
        };
        case.fs_base = base(random);
        case.gs_base = base(random);
        return;
    }
    for index in [0, 3, 4, 5] {
        if random.chance(if index < 4 { 12 } else { 50 }) {
            case.segments[index] = if random.chance(4) { 0 } else { random.pick(&DATA_SEGMENTS) };
        }
    }
    if random.chance(15) {
        case.segments[2] = random.pick(&STACK_SEGMENTS);
    }
}

fn vectors(random: &mut Random, case: &mut Case) {
    let kinds: [fn(&mut Random) -> u64; 7] = [
        |random| random.bits(),
        |random| random.bits(),
        values::integer,
        values::singles,
        values::double,
        values::halves,
        values::bytes,
    ];
    // Most cases keep to one kind of number, since operands of one instruction are of one kind.
    let common = random.pick(&kinds);
    for zmm in &mut case.vectors.zmm {
        let kind = if random.chance(70) { common } else { random.pick(&kinds) };
        *zmm = std::array::from_fn(|_| kind(random));
    }
    case.vectors.k = std::array::from_fn(|_| if random.chance(25) { u64::MAX } else { random.bits() });
    let mut mxcsr: u32 = 0x1f80;
    if random.chance(60) {
        mxcsr |= (random.below(4) as u32) << 13;
    }
    if random.chance(25) {
        // Flush to zero, denormals are zero.
        mxcsr |= random.pick(&[1 << 15, 1 << 6, 1 << 15 | 1 << 6]);
    }
    if random.chance(30) {
        mxcsr |= random.below(64) as u32;
    }
    if random.chance(12) {
        mxcsr &= !((random.below(64) as u32) << 7);
    }
    case.vectors.mxcsr = mxcsr;
    clear_absent(case);
}

/// Clears what this host has no registers for, and therefore reports as zero.
fn clear_absent(case: &mut Case) {
    for (number, zmm) in case.vectors.zmm.iter_mut().enumerate() {
        zmm[present_words(number)..].fill(0);
    }
    if !std::arch::is_x86_feature_detected!("avx512f") {
        case.vectors.k = [0; 8];
    }
}

/// How many quadwords of a vector register this host has, from the lowest.
pub(crate) fn present_words(number: usize) -> usize {
    match () {
        () if std::arch::is_x86_feature_detected!("avx512f") => 8,
        () if number >= 16 => 0,
        () if std::arch::is_x86_feature_detected!("avx") => 4,
        () => 2,
    }
}

fn x87(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let vectors = &mut case.vectors;
    for st in &mut vectors.st {
        let value = values::extended(random);
        *st = [value as u64, (value >> 64) as u64];
    }
    let unit = |mnemonic: Mnemonic| format_starts_with_f(mnemonic);
    if !unit(instruction.mnemonic()) {
        vectors.ftw = random.bits() as u8;
        return;
    }
    vectors.fcw = 0x37f;
    if random.chance(50) {
        vectors.fcw = vectors.fcw & !0xf00 | (random.below(16) as u16) << 8;
    }
    if random.chance(15) {
        vectors.fcw &= !(random.below(64) as u16);
    }
    let top = random.below(8) as u16;
    let conditions = (random.bits() as u16) & 0x4700;
    let raised = if random.chance(25) { random.below(128) as u16 } else { 0 };
    vectors.fsw = top << 11 | conditions | raised;
    if raised & 0x3f & !vectors.fcw != 0 {
        // The summary, and busy with it.
        vectors.fsw |= 0x8080;
    }
    vectors.ftw = if random.chance(60) { 0xff } else { random.bits() as u8 };
}

/// x87 instructions are those whose name begins with F, but for FXSAVE's family, which wants x87 state as well, and
/// FEMMS, which no host here has.
fn format_starts_with_f(mnemonic: Mnemonic) -> bool {
    format!("{mnemonic:?}").starts_with('F')
}
