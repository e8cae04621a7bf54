//! Which parts of a memory operand an instruction with a mask touches.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::state::Registers;

/// Where the bits that select elements come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// An opmask register.
    Opmask(u8),
    /// The sign bits of a vector register's elements (VMASKMOV, VPMASKMOV).
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
    /// All of it if any of the low `count` bits of the mask is set, else nothing.
    Any {
        /// The selecting bits.
        mask: Mask,
        /// Number of mask bits.
        count: u8,
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
    fn bits(self, registers: &Registers, size: u8, count: u8) -> u64 {
        let all = low_bits(count);
        match self {
            Mask::Opmask(number) => registers.k[usize::from(number) & 7] & all,
            Mask::Signs(number) => {
                let register = &registers.zmm[usize::from(number) & 31];
                (0..u32::from(count)).fold(0, |bits, i| {
                    let sign = (i + 1) * 8 * u32::from(size) - 1;
                    bits | (register[(sign / 64) as usize & 7] >> (sign % 64) & 1) << i
                })
            }
        }
    }
}

impl Elements {
    /// Which bytes of a memory operand of `size` bytes are accessed: bit `i` for byte `i`.
    pub(super) fn bytes(self, registers: &Registers, size: u16) -> u64 {
        let whole = low_bits(size.min(64) as u8);
        match self {
            Elements::Whole => whole,
            Elements::Any { mask, count } if mask.bits(registers, 1, count) == 0 => 0,
            Elements::Any { .. } => whole,
            Elements::Packed { mask, size, count } => {
                let active = mask.bits(registers, size, count).count_ones();
                low_bits((active * u32::from(size)).min(64) as u8)
            }
            Elements::Masked { mask, size, count } => {
                let bits = mask.bits(registers, size, count);
                let element = low_bits(size);
                (0..count).filter(|i| bits >> i & 1 != 0).fold(0, |bytes, i| bytes | element << (i * size))
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
            mask: Mask::Signs(instruction.op1_register().number() as u8),
            size: element,
            count: (size / usize::from(element)) as u8,
        };
    }
    if instruction.code().encoding() != EncodingKind::EVEX
        || instruction.op_mask() == Register::None
        || reads_regardless(mnemonic)
    {
        return Elements::Whole;
    }
    let mask = Mask::Opmask(instruction.op_mask().number() as u8);
    let memory = instruction.code().op_code().memory_size();
    let (element, memory_count) = (memory.element_size().max(1), memory.element_count().max(1));
    // Elements that the mask governs: those of the register operand, where it is a vector.
    let vector = (0..instruction.op_count())
        .filter(|&o| instruction.op_kind(o) == OpKind::Register)
        .map(|o| instruction.op_register(o))
        .find(|register| register.is_vector_register())
        .map_or(16, |register| register.size());
    let broadcasts = instruction.is_broadcast() || is_broadcast(mnemonic);
    if broadcasts {
        let count = if instruction.is_broadcast() {
            table_count(instruction, memory_count)
        } else {
            vector / element
        };
        return Elements::Any { mask, count: count as u8 };
    }
    if dword_masked(mnemonic) {
        return Elements::Masked { mask, size: 4, count: (size / 4) as u8 };
    }
    if matches!(mnemonic, Mnemonic::Vpmuldq | Mnemonic::Vpmuludq) {
        // Doublewords of which every other one counts.
        return Elements::Masked { mask, size: 8, count: (size / 8) as u8 };
    }
    let (element, count) = (element as u8, memory_count as u8);
    if packs(mnemonic) {
        return Elements::Packed { mask, size: element, count };
    }
    Elements::Masked { mask, size: element, count }
}

/// Mask bits of an instruction whose memory operand, of `count` elements, is broadcast.
fn table_count(instruction: &Instruction, count: usize) -> usize {
    let code = instruction.code().op_code();
    count * code.memory_size().element_size() / code.broadcast_memory_size().element_size().max(1)
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
            | Mnemonic::Vpshufbitqmb
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
            | Mnemonic::Vcvtneps2bf16
    )
}
