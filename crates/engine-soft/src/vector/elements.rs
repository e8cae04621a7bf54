//! Which parts of a memory operand an instruction with a mask touches.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::state::{Registers, Slots};

/// Where the bits that select elements come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Every element is selected.
    All,
    /// The opmask register in a slot.
    Opmask(u8),
    /// The sign bits of the elements of the vector register in a slot (VMASKMOV, VPMASKMOV).
    Signs(u8),
}

/// How an instruction accesses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elements {
    /// All of it.
    Whole,
    /// Element `i` of `count`, each of `size` bytes, if bit `i` of the mask is set. Others can cause no fault.
    Masked {
        /// The selecting bits.
        mask: Mask,
        /// Bytes of an element.
        size: u8,
        /// Number of elements.
        count: u8,
    },
    /// As `Masked`, where the operand is repeated to fill the register (broadcasts): element `i` is accessed if one of
    /// the bits `i`, `i + count`, … below `bits` is set.
    Repeated {
        /// The selecting bits.
        mask: Mask,
        /// Bytes of an element.
        size: u8,
        /// Number of elements in memory.
        count: u8,
        /// Number of mask bits.
        bits: u8,
    },
    /// As many adjacent elements as bits are set in the mask (compress and expand).
    Packed {
        /// The selecting bits.
        mask: Mask,
        /// Bytes of an element.
        size: u8,
        /// Number of mask bits.
        count: u8,
    },
}

impl Mask {
    /// The low `count` mask bits, `size` being the bytes of an element.
    fn bits(self, registers: &Registers, slots: Slots, size: u8, count: u8) -> u64 {
        let all = low_bits(count);
        match self {
            Mask::All => all,
            Mask::Opmask(slot) => registers.k[slots.register(slot) & 7] & all,
            Mask::Signs(slot) => {
                let register = &registers.zmm[slots.register(slot) & 31];
                (0..u32::from(count)).fold(0, |bits, i| {
                    let sign = (i + 1) * 8 * u32::from(size) - 1;
                    bits | (register[(sign / 64) as usize & 7] >> (sign % 64) & 1) << i
                })
            }
        }
    }
}

impl Elements {
    /// Bytes of an element that is accessed or left alone by itself; `size` if all of the operand is accessed.
    pub(super) fn granule(self, whole: u16) -> usize {
        match self {
            Elements::Whole => whole.into(),
            Elements::Masked { size, .. }
            | Elements::Repeated { size, .. }
            | Elements::Packed { size, .. } => size.into(),
        }
    }

    /// Which bytes of a memory operand of `size` bytes are accessed: bit `i` for byte `i`.
    pub(super) fn bytes(self, registers: &Registers, slots: Slots, size: u16) -> u64 {
        let spread = |bits: u64, size: u8, count: u8| {
            let element = low_bits(size);
            (0..count).filter(|i| bits >> i & 1 != 0).fold(0, |bytes, i| bytes | element << (i * size))
        };
        match self {
            Elements::Whole => low_bits(size.min(64) as u8),
            Elements::Packed { mask, size, count } => {
                let active = mask.bits(registers, slots, size, count).count_ones();
                low_bits((active * u32::from(size)).min(64) as u8)
            }
            Elements::Masked { mask, size, count } => {
                spread(mask.bits(registers, slots, size, count), size, count)
            }
            Elements::Repeated { mask, size, count, bits } => {
                let given = mask.bits(registers, slots, size, bits);
                let folded = (0..bits).step_by(count.max(1).into()).fold(0, |all, i| all | given >> i);
                spread(folded, size, count)
            }
        }
    }
}

/// `count` ones.
fn low_bits(count: u8) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// How the instruction accesses its memory operand of `size` bytes.
pub(super) fn elements(instruction: &Instruction, size: usize) -> Elements {
    let mnemonic = instruction.mnemonic();
    if matches!(
        mnemonic,
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    ) {
        let element = if matches!(mnemonic, Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd) { 4 } else { 8 };
        return Elements::Masked {
            // The destination's slot comes first where it is a register.
            mask: Mask::Signs(u8::from(instruction.op0_kind() == OpKind::Register)),
            size: element,
            count: (size / usize::from(element)) as u8,
        };
    }
    if instruction.code().encoding() != EncodingKind::EVEX
        || instruction.op_mask() == Register::None && !compresses(instruction)
        || reads_regardless(mnemonic) && !shifts_by_immediate(instruction)
    {
        return Elements::Whole;
    }
    let operands = (0..instruction.op_count())
        .filter(|&o| instruction.op_kind(o) == OpKind::Register)
        .map(|o| instruction.op_register(o));
    // The write mask's slot is behind those of the operands.
    let slot = operands.filter(|register| register.is_vector_register() || register.is_k()).count() as u8;
    let mask = if instruction.op_mask() == Register::None { Mask::All } else { Mask::Opmask(slot) };
    let table = instruction.code().op_code();
    let element = match mnemonic {
        _ if dword_masked(mnemonic) => 4,
        // Doublewords of which every other one counts.
        Mnemonic::Vpmuldq | Mnemonic::Vpmuludq => 8,
        _ => table.memory_size().element_size().max(1),
    };
    let count = (size / element).max(1) as u8;
    if instruction.is_broadcast() {
        let bits = table.memory_size().size() / size.max(1);
        return Elements::Repeated { mask, size: size as u8, count: 1, bits: bits as u8 };
    }
    let element = element as u8;
    if is_broadcast(mnemonic) {
        let bits = (instruction.op0_register().size() / usize::from(element)) as u8;
        return Elements::Repeated { mask, size: element, count, bits };
    }
    if packs(mnemonic) {
        return Elements::Packed { mask, size: element, count };
    }
    Elements::Masked { mask, size: element, count }
}

/// A compressing store, which goes element by element without a mask, too.
fn compresses(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Memory && packs(instruction.mnemonic())
}

/// Whether a store with a mask wants all of its operand writable, though it writes selected elements only.
pub(super) fn probes_whole(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vextractf32x4
            | Mnemonic::Vextractf32x8
            | Mnemonic::Vextractf64x2
            | Mnemonic::Vextractf64x4
            | Mnemonic::Vextracti32x4
            | Mnemonic::Vextracti32x8
            | Mnemonic::Vextracti64x2
            | Mnemonic::Vextracti64x4
    )
}

/// Loads that repeat a smaller memory operand.
fn is_broadcast(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vbroadcastss
            | Mnemonic::Vbroadcastsd
            | Mnemonic::Vpbroadcastb
            | Mnemonic::Vpbroadcastw
            | Mnemonic::Vpbroadcastd
            | Mnemonic::Vpbroadcastq
            | Mnemonic::Vbroadcastf32x2
            | Mnemonic::Vbroadcastf32x4
            | Mnemonic::Vbroadcastf32x8
            | Mnemonic::Vbroadcastf64x2
            | Mnemonic::Vbroadcastf64x4
            | Mnemonic::Vbroadcasti32x2
            | Mnemonic::Vbroadcasti32x4
            | Mnemonic::Vbroadcasti32x8
            | Mnemonic::Vbroadcasti64x2
            | Mnemonic::Vbroadcasti64x4
    )
}

/// Compress to memory, expand from it.
fn packs(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vcompressps
            | Mnemonic::Vcompresspd
            | Mnemonic::Vpcompressb
            | Mnemonic::Vpcompressw
            | Mnemonic::Vpcompressd
            | Mnemonic::Vpcompressq
            | Mnemonic::Vexpandps
            | Mnemonic::Vexpandpd
            | Mnemonic::Vpexpandb
            | Mnemonic::Vpexpandw
            | Mnemonic::Vpexpandd
            | Mnemonic::Vpexpandq
    )
}

/// Instructions on bytes or words that are masked by doubleword.
fn dword_masked(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vpdpbusd
            | Mnemonic::Vpdpbusds
            | Mnemonic::Vpdpwssd
            | Mnemonic::Vpdpwssds
            | Mnemonic::Vdpbf16ps
    )
}

/// Masked instructions that suppress no memory fault (SDM 2A 2.8, the exception types with "NF"): an element of
/// the result depends on other elements of the source.
fn reads_regardless(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Valignd
            | Mnemonic::Valignq
            | Mnemonic::Vdbpsadbw
            | Mnemonic::Vgf2p8affineqb
            | Mnemonic::Vgf2p8affineinvqb
            | Mnemonic::Vinsertf32x4
            | Mnemonic::Vinsertf32x8
            | Mnemonic::Vinsertf64x2
            | Mnemonic::Vinsertf64x4
            | Mnemonic::Vinserti32x4
            | Mnemonic::Vinserti32x8
            | Mnemonic::Vinserti64x2
            | Mnemonic::Vinserti64x4
            | Mnemonic::Vmovddup
            | Mnemonic::Vmovshdup
            | Mnemonic::Vmovsldup
            | Mnemonic::Vpackssdw
            | Mnemonic::Vpacksswb
            | Mnemonic::Vpackusdw
            | Mnemonic::Vpackuswb
            | Mnemonic::Vpalignr
            | Mnemonic::Vpconflictd
            | Mnemonic::Vpconflictq
            | Mnemonic::Vpermb
            | Mnemonic::Vpermd
            | Mnemonic::Vpermi2b
            | Mnemonic::Vpermi2d
            | Mnemonic::Vpermi2pd
            | Mnemonic::Vpermi2ps
            | Mnemonic::Vpermi2q
            | Mnemonic::Vpermi2w
            | Mnemonic::Vpermilpd
            | Mnemonic::Vpermilps
            | Mnemonic::Vpermpd
            | Mnemonic::Vpermps
            | Mnemonic::Vpermq
            | Mnemonic::Vpermt2b
            | Mnemonic::Vpermt2d
            | Mnemonic::Vpermt2pd
            | Mnemonic::Vpermt2ps
            | Mnemonic::Vpermt2q
            | Mnemonic::Vpermt2w
            | Mnemonic::Vpermw
            | Mnemonic::Vpmaddubsw
            | Mnemonic::Vpmaddwd
            | Mnemonic::Vpmultishiftqb
            | Mnemonic::Vpshufb
            | Mnemonic::Vpshufd
            | Mnemonic::Vpshufhw
            | Mnemonic::Vpshuflw
            | Mnemonic::Vpslld
            | Mnemonic::Vpsllq
            | Mnemonic::Vpsllw
            | Mnemonic::Vpsrad
            | Mnemonic::Vpsraq
            | Mnemonic::Vpsraw
            | Mnemonic::Vpsrld
            | Mnemonic::Vpsrlq
            | Mnemonic::Vpsrlw
            | Mnemonic::Vpunpckhbw
            | Mnemonic::Vpunpckhdq
            | Mnemonic::Vpunpckhqdq
            | Mnemonic::Vpunpckhwd
            | Mnemonic::Vpunpcklbw
            | Mnemonic::Vpunpckldq
            | Mnemonic::Vpunpcklqdq
            | Mnemonic::Vpunpcklwd
            | Mnemonic::Vshuff32x4
            | Mnemonic::Vshuff64x2
            | Mnemonic::Vshufi32x4
            | Mnemonic::Vshufi64x2
            | Mnemonic::Vshufpd
            | Mnemonic::Vshufps
            | Mnemonic::Vunpckhpd
            | Mnemonic::Vunpckhps
            | Mnemonic::Vunpcklpd
            | Mnemonic::Vunpcklps
            | Mnemonic::Vcvtne2ps2bf16
    )
}

/// A shift whose memory operand is the vector to be shifted, not the count.
fn shifts_by_immediate(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Vpslld
            | Mnemonic::Vpsllq
            | Mnemonic::Vpsllw
            | Mnemonic::Vpsrad
            | Mnemonic::Vpsraq
            | Mnemonic::Vpsraw
            | Mnemonic::Vpsrld
            | Mnemonic::Vpsrlq
            | Mnemonic::Vpsrlw
    ) && instruction.op2_kind() == OpKind::Immediate8
}
