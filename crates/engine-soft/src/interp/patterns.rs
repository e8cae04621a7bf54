//! Operations that have been made before, by their instructions' patterns.
//!
//! Compiled code consists of some hundred patterns ([`Layout::pattern`]). What the decoder library and the families of handlers made of
//! the first instruction of each is kept, and the next one of the same pattern is the same with its own registers, address and constant put in place:
//! a fifth of the work. The table holds a fixed number of patterns; an entry is found by all of its pattern, so that no two are
//! taken for each other. It belongs to a vCPU, whose CPU model never changes.

use iced_x86::{Instruction, OpKind, Register};
use ringfence_x86::SegmentRegister;

use super::layout::{Address, Layout};
use super::op::{Op, prefix};

/// What else is known of an operation's instruction; see [`super::found::Found`].
pub(super) type Marks = u8;

/// log2 of the number of patterns kept. Ordinary software has some two thousand.
const BITS: u32 = 12;

/// The pattern of an instruction that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    /// It as a number, never zero.
    pub(crate) number: u64,
    /// A place in tables of [`Pattern::PLACES`] that it shares with few others.
    pub(crate) place: u16,
}

impl Pattern {
    /// How many there are.
    pub(crate) const PLACES: usize = 1 << BITS;

    fn new(number: u64) -> Self {
        let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - BITS);
        Self { number, place: place as u16 }
    }
}

/// What is put in place in an operation.
mod fill {
    /// The memory operand but for its segment.
    pub(super) const MEMORY: u8 = 1;
    /// Its segment.
    pub(super) const SEGMENT: u8 = 2;
    /// ModRM's `reg` as `dst` or `src`.
    pub(super) const REG_DST: u8 = 4;
    pub(super) const REG_SRC: u8 = 8;
    /// Likewise `r/m`.
    pub(super) const RM_DST: u8 = 16;
    pub(super) const RM_SRC: u8 = 32;
    /// Numbers 4 to 7 in `reg` are AH to BH.
    pub(super) const HIGH_REG: u8 = 64;
    pub(super) const HIGH_RM: u8 = 128;
}

/// How a constant becomes [`Op::immediate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Constant {
    /// It is part of the pattern, or there is none.
    Kept,
    Unsigned,
    Signed,
}

/// What an instruction of a pattern became.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Entry {
    /// Zero if there is none.
    pattern: u64,
    op: Op,
    fill: u8,
    constant: Constant,
    marks: Marks,
}

const _: () = assert!(size_of::<Entry>() == 64);

impl Entry {
    fn new(layout: &Layout, instruction: &Instruction, op: Op, marks: Marks) -> Self {
        let mut fill = 0;
        if layout.in_memory() && op.has(prefix::MEMORY) {
            fill |= fill::MEMORY;
            // 64-bit code has no others.
            let fixed = match instruction.segment_prefix() {
                Register::FS | Register::GS => true,
                prefix => layout.is_narrow() && prefix != Register::None,
            };
            if !fixed {
                fill |= fill::SEGMENT;
            }
        }
        let high = |operand| instruction.op_register(operand).size() == 1 && !layout.has_rex();
        if let Some(operand) = layout.free_reg() {
            fill |= if operand == 0 { fill::REG_DST } else { fill::REG_SRC };
            fill |= if high(operand) { fill::HIGH_REG } else { 0 };
        }
        if let Some(operand) = layout.free_rm() {
            fill |= if operand == 0 { fill::RM_DST } else { fill::RM_SRC };
            fill |= if high(operand) { fill::HIGH_RM } else { 0 };
        }
        let constant = if layout.free_constant() { extension(instruction) } else { Constant::Kept };
        Self { pattern: layout.pattern, op, fill, constant, marks }
    }

    /// Writes the operation of another instruction of the pattern.
    #[inline(always)]
    fn write(&self, layout: &Layout, op: &mut Op) {
        *op = self.op;
        let fill = self.fill;
        op.length = layout.length;
        if fill & fill::MEMORY != 0 {
            let Address { base, index, scale, displacement } = layout.address;
            (op.base, op.index, op.scale) = (base, index, scale);
            op.displacement = displacement.into();
            if fill & fill::SEGMENT != 0 {
                // RSP and RBP.
                let stack = matches!(base, 4 | 5);
                op.segment = if stack { SegmentRegister::Ss as u8 } else { SegmentRegister::Ds as u8 };
            }
        }
        let number =
            |number: u8, high| if fill & high != 0 && matches!(number, 4..8) { number + 12 } else { number };
        if fill & (fill::REG_DST | fill::REG_SRC) != 0 {
            let reg = number(layout.reg, fill::HIGH_REG);
            *if fill & fill::REG_DST != 0 { &mut op.dst } else { &mut op.src } = reg;
        }
        if fill & (fill::RM_DST | fill::RM_SRC) != 0 {
            let rm = number(layout.rm, fill::HIGH_RM);
            *if fill & fill::RM_DST != 0 { &mut op.dst } else { &mut op.src } = rm;
        }
        let unused = u64::BITS - 8 * u32::from(layout.constant_length);
        match self.constant {
            Constant::Kept => {}
            Constant::Unsigned => op.immediate = layout.constant << unused >> unused,
            Constant::Signed => op.immediate = ((layout.constant << unused) as i64 >> unused) as u64,
        }
    }
}

/// How an instruction's constant becomes its operation's.
fn extension(instruction: &Instruction) -> Constant {
    use OpKind as K;
    let kinds = || (0..instruction.op_count()).map(|n| instruction.op_kind(n));
    let signed = |kind| {
        matches!(
            kind,
            K::Immediate8to16
                | K::Immediate8to32
                | K::Immediate8to64
                | K::Immediate32to64
                | K::NearBranch16
                | K::NearBranch32
                | K::NearBranch64
        )
    };
    if kinds().any(signed) { Constant::Signed } else { Constant::Unsigned }
}

/// A table by pattern's places, not made on the stack.
pub(crate) fn table<T: Copy>(blank: T) -> Box<[T; Pattern::PLACES]> {
    vec![blank; Pattern::PLACES]
        .into_boxed_slice()
        .try_into()
        .unwrap_or_else(|_| Box::new([blank; Pattern::PLACES]))
}

/// The operations kept.
pub(super) struct Patterns {
    entries: Box<[Entry; Pattern::PLACES]>,
}

impl std::fmt::Debug for Patterns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = self.entries.iter().filter(|entry| entry.pattern != 0).count();
        f.debug_struct("Patterns").field("known", &known).finish()
    }
}

impl Default for Patterns {
    fn default() -> Self {
        let blank = Entry { pattern: 0, op: Op::UNDEFINED, fill: 0, constant: Constant::Kept, marks: 0 };
        Self { entries: table(blank) }
    }
}

impl Patterns {
    /// Writes the operation of an instruction, and tells what else is known of it, if one of its pattern is kept.
    #[inline(always)]
    pub(super) fn find(&self, layout: &Layout, op: &mut Op) -> Option<(Marks, Pattern)> {
        let pattern = Pattern::new(layout.pattern);
        let place = usize::from(pattern.place) % Pattern::PLACES;
        let mut entry = &self.entries[place];
        if entry.pattern != layout.pattern {
            entry = &self.entries[place ^ 1];
            if entry.pattern != layout.pattern {
                return None;
            }
        }
        entry.write(layout, op);
        Some((entry.marks, pattern))
    }

    /// Keeps what an instruction of this layout became. The older one of the two in its places goes.
    pub(super) fn keep(
        &mut self,
        layout: &Layout,
        instruction: &Instruction,
        op: Op,
        marks: Marks,
    ) -> Pattern {
        let pattern = Pattern::new(layout.pattern);
        let place = usize::from(pattern.place) % Pattern::PLACES;
        self.entries[place ^ 1] = self.entries[place];
        self.entries[place] = Entry::new(layout, instruction, op, marks);
        pattern
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::Cpu;
    use super::super::found::tests::{show, show_of};
    use super::super::handlers::tests::bytes;
    use super::super::layout::LOOKED_AT;
    use super::super::testing::Lab;
    use super::*;
    use ringfence_x86::cpuid::Vendor;

    /// An instruction with other bytes behind its opcode, or another prefix.
    fn changed(old: &[u8; 15], seed: u64) -> [u8; 15] {
        let mut new = bytes(seed ^ 0x5555_5555);
        let kept = 1 + seed as usize % 5;
        new[..kept].copy_from_slice(&old[..kept]);
        if seed.is_multiple_of(7) {
            let prefixes =
                [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x40, 0x48, 0x4f];
            new.copy_within(..14, 1);
            new[0] = prefixes[seed as usize / 7 % prefixes.len()];
        }
        new
    }

    /// Looks at bytes twice; whether the second time they had a pattern that was known. Whatever is known is compared with what
    /// the library makes of the bytes, as it always is where debug assertions are on.
    fn look<const NARROW: bool>(cpu: &mut Cpu, bytes: &[u8]) -> bool {
        let mut all = [0; LOOKED_AT];
        all[..bytes.len()].copy_from_slice(bytes);
        let layout = Layout::of::<NARROW>(&all);
        let bits = if NARROW { 32 } else { 64 };
        let instruction = iced_x86::Decoder::new(bits, bytes, cpu.features.decoder_options()).decode();
        if let (Some(layout), false) = (&layout, instruction.is_invalid()) {
            assert_eq!(usize::from(layout.length), instruction.len(), "{bytes:x?}");
        }
        let before =
            layout.is_some_and(|layout| cpu.patterns.find(&layout, &mut Op::UNDEFINED.clone()).is_some());
        for _ in 0..2 {
            let found = show_of::<NARROW>(cpu, bytes, |_, _| ());
            assert_eq!(found.is_some_and(|_| before), before, "{bytes:x?}");
        }
        before
    }

    #[test]
    fn operation_of_a_known_pattern_is_what_decoding_makes_of_the_bytes() {
        let scale =
            std::env::var("RINGFENCE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000_u64);
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let mut lab = Lab::long_of(vendor);
            let (mut known, mut narrow) = (0, 0);
            for seed in 0..300 * scale {
                let bytes = bytes(seed);
                let cpu = &mut lab.m.cpu;
                for bytes in [bytes, changed(&bytes, seed)] {
                    // One mode after the other: neither must find what is the other's.
                    known += u64::from(look::<false>(cpu, &bytes));
                    narrow += u64::from(look::<true>(cpu, &bytes));
                }
            }
            assert!(known > 100 * scale && narrow > 100 * scale, "{known} {narrow}");
        }
    }

    #[test]
    fn every_opcode_is_known_the_second_time_with_other_operands() {
        let maps: [&[u8]; 12] = [
            &[],
            &[0x48],
            &[0x41],
            &[0x0f],
            &[0x66, 0x0f],
            &[0xf3, 0x0f],
            &[0xf2, 0x0f],
            &[0x4d, 0x0f],
            &[0x66],
            &[0x0f, 0x38],
            &[0x66, 0x0f, 0x3a],
            &[0xf0, 0x48],
        ];
        let known = every_opcode(&maps, look::<false>);
        assert!(known > 800_000, "{known}");
    }

    #[test]
    fn every_opcode_of_32_bit_code_is_known_the_second_time_with_other_operands() {
        let maps: [&[u8]; 14] = [
            &[],
            &[0x2e],
            &[0x65],
            &[0x0f],
            &[0x66, 0x0f],
            &[0xf3, 0x0f],
            &[0xf2, 0x0f],
            &[0x36, 0x0f],
            &[0x66],
            &[0x67],
            &[0x0f, 0x38],
            &[0x66, 0x0f, 0x3a],
            &[0xf0, 0x3e],
            &[0x66, 0x64],
        ];
        let known = every_opcode(&maps, look::<true>);
        assert!(known > 900_000, "{known}");
    }

    /// Looks at every opcode behind each of some bytes, with every ModRM byte: how many are known.
    fn every_opcode(maps: &[&[u8]], look: fn(&mut Cpu, &[u8]) -> bool) -> u64 {
        let mut lab = Lab::long();
        let mut known = 0;
        for prefix in maps {
            for opcode in 0..=255 {
                for modrm in 0..=255_u8 {
                    for seed in 0..3 {
                        let mut bytes = bytes(seed << 16 | u64::from(modrm));
                        bytes[..prefix.len()].copy_from_slice(prefix);
                        bytes[prefix.len()] = opcode;
                        bytes[prefix.len() + 1] = modrm;
                        known += u64::from(look(&mut lab.m.cpu, &bytes));
                    }
                }
            }
        }
        known
    }

    #[test]
    fn what_compiled_32_bit_code_is_made_of_has_patterns() {
        let codes: [&[u8]; 16] = [
            &[0x55],                               // push ebp
            &[0x40],                               // inc eax
            &[0x66, 0x4f],                         // dec di
            &[0xa1, 0x78, 0x56, 0x34, 0x92],       // mov eax, [0x92345678]
            &[0x66, 0xa3, 1, 2, 3, 4],             // mov [0x4030201], ax
            &[0x64, 0xa0, 1, 2, 3, 4],             // mov al, fs:[0x4030201]
            &[0x8b, 0x15, 0x78, 0x56, 0x34, 0x92], // mov edx, [0x92345678]
            &[0x65, 0x8b, 0x0d, 1, 0, 0, 0],       // mov ecx, gs:[1]
            &[0x8b, 0x44, 0x24, 4],                // mov eax, [esp + 4]
            &[0x2e, 0xff, 0x24, 0x85, 1, 2, 3, 4], // jmp cs:[eax * 4 + 0x4030201]
            &[0xc4, 0xe2, 0x70, 0xf2, 0xc2],       // andn eax, ecx, edx
            &[0xc5, 0xf9, 0x6f, 0x45, 8],          // vmovdqa xmm0, [ebp + 8]
            &[0x0f, 0x84, 1, 2, 3, 0xff],          // je
            &[0xe8, 1, 2, 3, 0xff],                // call
            &[0xc2, 4, 0],                         // ret 4: has none
            &[0xc4, 0x45, 8],                      // les eax, [ebp + 8]: has none
        ];
        let mut lab = Lab::long();
        let known = |bytes| {
            look::<true>(&mut lab.m.cpu, bytes);
            look::<true>(&mut lab.m.cpu, bytes)
        };
        assert_eq!(codes.map(known), std::array::from_fn(|i| i < 14));
    }

    #[test]
    fn instruction_without_all_of_its_bytes_is_not_taken_for_a_known_one() {
        let mut lab = Lab::long();
        let whole = [0x48, 0x8b, 0x84, 0x24, 0, 1, 0, 0];
        assert!(show(&mut lab.m.cpu, &whole, |_, _| ()) == Some(8));
        for length in 0..8 {
            assert_eq!(show(&mut lab.m.cpu, &whole[..length], |_, _| ()), None, "{length}");
        }
    }

    #[test]
    fn pattern_that_has_lost_its_place_is_decoded_again() {
        let mut lab = Lab::long();
        for seed in 0..200_000 {
            look::<false>(&mut lab.m.cpu, &bytes(seed));
        }
        let known = lab.m.cpu.patterns.entries.iter().filter(|entry| entry.pattern != 0).count();
        assert!(known > Pattern::PLACES * 9 / 10, "{known}");
    }
}
