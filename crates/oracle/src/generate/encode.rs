//! Bytes for an instruction form: prefixes, opcode, ModRM and the rest, with every field that the form leaves open
//! chosen at random.
//!
//! The bytes are built from the form's description rather than by the decoder library's encoder, which has only one
//! encoding for each instruction. The decoder then says whether they are what was meant.

use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, Mnemonic,
    OpCodeInfo, OpCodeOperandKind as Kind, OpCodeTableKind,
};

use super::forms;
use crate::case::{CODE_MAX, INT3, Mode};
use crate::random::Random;
use crate::values;

/// Bytes under construction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes {
    bytes: [u8; CODE_MAX],
    len: usize,
}

impl Bytes {
    fn new() -> Self {
        Self { bytes: [INT3; CODE_MAX], len: 0 }
    }

    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    fn push_front(&mut self, byte: u8) {
        self.bytes.copy_within(0..CODE_MAX - 1, 1);
        self.bytes[0] = byte;
        self.len = (self.len + 1).min(CODE_MAX);
    }

    /// The bytes.
    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Replaces `len` bytes from `offset` by the low bytes of `value`.
    pub(crate) fn set(&mut self, offset: usize, len: usize, value: u64) {
        if let Some(target) = self.bytes.get_mut(offset..offset + len) {
            target.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }
}

/// An instruction as bytes and as the decoder sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoded {
    pub(crate) bytes: Bytes,
    pub(crate) instruction: Instruction,
    pub(crate) offsets: ConstantOffsets,
}

/// Decodes `bytes` at `ip`, with what will follow them in memory, and cuts them to the instruction's length.
pub(crate) fn decode(mut bytes: Bytes, mode: Mode, ip: u64) -> Encoded {
    let (instruction, offsets) = {
        let mut decoder = Decoder::with_ip(mode.bits(), &bytes.bytes, ip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        (instruction, decoder.get_constant_offsets(&instruction))
    };
    if !instruction.is_invalid() {
        bytes.len = instruction.len();
        bytes.bytes[bytes.len..].fill(INT3);
    }
    Encoded { bytes, instruction, offsets }
}

/// An encoding of `code`, or `None` if the random fields never gave one.
pub(crate) fn encode(random: &mut Random, code: Code, mode: Mode, ip: u64) -> Option<Encoded> {
    const TRIES: usize = 60;
    (0..TRIES).find_map(|_| {
        let encoded = decode(draft(random, code, mode), mode, ip);
        (encoded.instruction.code() == code).then_some(encoded)
    })
}

/// Disturbs an encoding: prefixes where they mean nothing or are forbidden, too many of them. Gives it back unchanged
/// where the result would be something that cannot be run.
pub(crate) fn disturb(random: &mut Random, encoded: Encoded, mode: Mode, ip: u64) -> Encoded {
    const REDUNDANT: [u8; 8] = [0x66, 0x67, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e];
    let mut bytes = encoded.bytes;
    let illegal = match random.below(8) {
        // Some processors take a LOCK before VERR and VERW.
        0 | 1 if !matches!(encoded.instruction.mnemonic(), Mnemonic::Verr | Mnemonic::Verw) => {
            bytes.push_front(0xf0);
            true
        }
        // UD0 and UD1 end at their opcode on some processors.
        2 if random.chance(30)
            && !matches!(encoded.instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1) =>
        {
            // Longer than fifteen bytes.
            while bytes.len < 16 {
                bytes.push_front(0x2e);
            }
            true
        }
        3 if mode == Mode::Bits64 => {
            bytes.push_front(0x40 | random.below(16) as u8);
            let vex = matches!(encoded.instruction.code().encoding(), EncodingKind::VEX | EncodingKind::EVEX);
            vex || !encoded.instruction.has_lock_prefix()
        }
        _ => {
            bytes.push_front(random.pick(&REDUNDANT));
            encoded.instruction.code().encoding() != EncodingKind::Legacy
        }
    };
    let disturbed = decode(bytes, mode, ip);
    let instruction = disturbed.instruction;
    let branch = |instruction: &Instruction| {
        use iced_x86::FlowControl as F;
        !matches!(instruction.flow_control(), F::Next | F::Exception | F::Interrupt)
    };
    let fine = if instruction.is_invalid() {
        illegal
    } else {
        // Processors do not agree on what 66 does to a branch in 64-bit mode.
        let code = instruction.code();
        forms::is_suitable(code, mode)
            && forms::is_offered(code, false)
            && !branch(&instruction)
            && !branch(&encoded.instruction)
    };
    if fine { disturbed } else { encoded }
}

/// Operand kinds that call for a ModRM byte, and whether it can or must name memory.
fn modrm(info: &OpCodeInfo) -> Option<Modrm> {
    let mut found = (info.is_group() || info.is_rm_group()).then_some(Modrm::Register);
    for &kind in info.op_kinds() {
        let this = match kind {
            Kind::mem
            | Kind::mem_mpx
            | Kind::mem_mib
            | Kind::mem_vsib32x
            | Kind::mem_vsib64x
            | Kind::mem_vsib32y
            | Kind::mem_vsib64y
            | Kind::mem_vsib32z
            | Kind::mem_vsib64z
            | Kind::sibmem => Modrm::Memory,
            Kind::r8_or_mem
            | Kind::r16_or_mem
            | Kind::r32_or_mem
            | Kind::r32_or_mem_mpx
            | Kind::r64_or_mem
            | Kind::r64_or_mem_mpx
            | Kind::mm_or_mem
            | Kind::xmm_or_mem
            | Kind::ymm_or_mem
            | Kind::zmm_or_mem
            | Kind::bnd_or_mem_mpx
            | Kind::k_or_mem => Modrm::Either,
            Kind::r8_reg
            | Kind::r16_reg
            | Kind::r16_reg_mem
            | Kind::r16_rm
            | Kind::r32_reg
            | Kind::r32_reg_mem
            | Kind::r32_rm
            | Kind::r64_reg
            | Kind::r64_reg_mem
            | Kind::r64_rm
            | Kind::seg_reg
            | Kind::k_reg
            | Kind::kp1_reg
            | Kind::k_rm
            | Kind::mm_reg
            | Kind::mm_rm
            | Kind::xmm_reg
            | Kind::xmm_rm
            | Kind::ymm_reg
            | Kind::ymm_rm
            | Kind::zmm_reg
            | Kind::zmm_rm => Modrm::Register,
            _ => continue,
        };
        // Memory and either are named by at most one operand.
        found = Some(if this == Modrm::Register { found.unwrap_or(this) } else { this });
    }
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Modrm {
    Register,
    Memory,
    Either,
}

fn has_vsib(info: &OpCodeInfo) -> bool {
    info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            Kind::mem_vsib32x
                | Kind::mem_vsib64x
                | Kind::mem_vsib32y
                | Kind::mem_vsib64y
                | Kind::mem_vsib32z
                | Kind::mem_vsib64z
        )
    })
}

fn draft(random: &mut Random, code: Code, mode: Mode) -> Bytes {
    let info = code.op_code();
    let mut bytes = Bytes::new();
    let vsib = has_vsib(info);
    // Vectors of addresses have no 16-bit form.
    let address32 =
        info.address_size() != 0 && info.address_size() != mode.bits() || vsib && mode == Mode::Bits16;
    if address32 || info.address_size() == 0 && random.chance(8) {
        bytes.push(0x67);
    }
    if random.chance(if mode == Mode::Bits64 { 12 } else { 8 }) {
        bytes.push(random.pick(&[0x64, 0x65, 0x64, 0x65, 0x26, 0x2e, 0x36, 0x3e]));
    }
    let form = modrm(info);
    let memory = match form {
        Some(Modrm::Memory) => true,
        Some(Modrm::Either) => random.chance(60),
        _ => false,
    };
    match info.encoding() {
        EncodingKind::VEX => vex(random, info, mode, &mut bytes),
        EncodingKind::EVEX => evex(random, info, mode, memory, &mut bytes),
        _ => legacy(random, info, mode, memory, &mut bytes),
    }
    if form.is_some() {
        let reg = if info.is_group() { info.group_index() as u8 } else { random.below(8) as u8 };
        let rm = match info.is_rm_group() {
            true => info.rm_group_index() as u8,
            false if vsib => 4,
            false => random.below(8) as u8,
        };
        let kind = if memory { random.below(3) as u8 } else { 3 };
        bytes.push(kind << 6 | (reg & 7) << 3 | rm & 7);
    }
    // Index, displacement and immediate; the decoder says how much of it there is.
    bytes.push(random.bits() as u8);
    let displacement = if random.chance(50) { random.bits() } else { random.below(0x100) };
    displacement.to_le_bytes()[..4].iter().for_each(|&byte| bytes.push(byte));
    values::integer(random).to_le_bytes().iter().for_each(|&byte| bytes.push(byte));
    if random.chance(50) {
        // Short forms have their immediate where others have a displacement.
        let immediate = values::integer(random);
        let at = bytes.len - 13;
        bytes.set(at, 8, immediate);
    }
    bytes
}

fn legacy(random: &mut Random, info: &OpCodeInfo, mode: Mode, memory: bool, bytes: &mut Bytes) {
    let operand = info.operand_size();
    let default = if mode == Mode::Bits16 { 16 } else { 32 };
    let mut wide = info.w() == 1;
    match operand {
        16 | 32 if operand != default && !(operand == 32 && mode == Mode::Bits64) => bytes.push(0x66),
        64 => wide = wide || !(info.default_op_size64() || info.force_op_size64()) || random.chance(20),
        0 if info.mandatory_prefix() == MandatoryPrefix::None && random.chance(3) => bytes.push(0x66),
        _ => {}
    }
    if memory && info.can_use_lock_prefix() && random.chance(25) {
        bytes.push(0xf0);
    }
    if info.can_use_rep_prefix() && random.chance(40) {
        bytes.push(0xf3);
    } else if info.can_use_repne_prefix() && random.chance(40) {
        bytes.push(0xf2);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        MandatoryPrefix::None | MandatoryPrefix::PNP => {}
    }
    if mode == Mode::Bits64 && (wide || random.chance(50)) {
        let any_width = operand == 0 && random.chance(20);
        bytes.push(0x40 | u8::from(wide || any_width) << 3 | random.below(8) as u8);
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => [0x0f, 0x38].iter().for_each(|&byte| bytes.push(byte)),
        OpCodeTableKind::T0F3A => [0x0f, 0x3a].iter().for_each(|&byte| bytes.push(byte)),
        _ => {}
    }
    let in_opcode = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode | Kind::sti_opcode
        )
    });
    let register = if in_opcode { random.below(8) as u8 } else { 0 };
    if info.op_code_len() == 2 {
        bytes.push((info.op_code() >> 8) as u8);
    }
    bytes.push(info.op_code() as u8 + register);
}

fn map(info: &OpCodeInfo) -> u8 {
    match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => 0,
    }
}

fn prefix_bits(info: &OpCodeInfo) -> u8 {
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
    }
}

fn width_bit(random: &mut Random, info: &OpCodeInfo, mode: Mode) -> u8 {
    if info.is_wig() || info.is_wig32() && mode != Mode::Bits64 {
        random.below(2) as u8
    } else {
        info.w() as u8
    }
}

/// The inverted vvvv field, top bit first: random where an operand is there, else all ones (most of the time).
fn vvvv(random: &mut Random, info: &OpCodeInfo, mode: Mode) -> u8 {
    let used = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            Kind::r32_vvvv
                | Kind::r64_vvvv
                | Kind::k_vvvv
                | Kind::xmm_vvvv
                | Kind::xmmp3_vvvv
                | Kind::ymm_vvvv
                | Kind::zmm_vvvv
                | Kind::zmmp3_vvvv
        )
    });
    let bits = if used { random.below(16) as u8 } else { 0xf };
    if mode == Mode::Bits64 { bits } else { bits | 8 }
}

fn vex(random: &mut Random, info: &OpCodeInfo, mode: Mode, bytes: &mut Bytes) {
    let length = if info.is_lig() { random.below(2) as u8 } else { info.l() as u8 };
    let width = width_bit(random, info, mode);
    // R, X and B, inverted; outside 64-bit mode R and X make the difference to LES and LDS.
    let rxb = if mode == Mode::Bits64 { random.below(8) as u8 } else { 7 };
    let last = vvvv(random, info, mode) << 3 | length << 2 | prefix_bits(info);
    if map(info) == 1 && width == 0 && rxb & 3 == 3 && random.chance(70) {
        bytes.push(0xc5);
        bytes.push((rxb & 4) << 5 | last);
    } else {
        bytes.push(0xc4);
        bytes.push(rxb << 5 | map(info));
        bytes.push(width << 7 | last);
    }
    bytes.push(info.op_code() as u8);
}

fn evex(random: &mut Random, info: &OpCodeInfo, mode: Mode, memory: bool, bytes: &mut Bytes) {
    let long = mode == Mode::Bits64;
    let mut length = if info.is_lig() { random.below(3) as u8 } else { info.l() as u8 };
    let rxb = if long { random.below(8) as u8 } else { 7 };
    let high_reg = if long { random.below(2) as u8 } else { 1 };
    let vvvv = vvvv(random, info, mode);
    let vvvv_used = vvvv != 0xf || has_vsib(info);
    let high_v = if long && vvvv_used { random.below(2) as u8 } else { 1 };
    let mask = match (info.can_use_op_mask_register(), info.require_op_mask_register()) {
        (true, true) => 1 + random.below(7) as u8,
        (true, false) if random.chance(60) => random.below(8) as u8,
        _ => 0,
    };
    let zeroing = u8::from(info.can_use_zeroing_masking() && mask != 0 && random.chance(40));
    let broadcast = if memory {
        info.can_broadcast() && random.chance(35)
    } else if (info.can_use_rounding_control() || info.can_suppress_all_exceptions()) && random.chance(30) {
        if info.can_use_rounding_control() {
            length = random.below(4) as u8;
        }
        true
    } else {
        false
    };
    bytes.push(0x62);
    bytes.push(rxb << 5 | high_reg << 4 | map(info));
    bytes.push(width_bit(random, info, mode) << 7 | vvvv << 3 | 4 | prefix_bits(info));
    bytes.push(zeroing << 7 | length << 5 | u8::from(broadcast) << 4 | high_v << 3 | mask);
    bytes.push(info.op_code() as u8);
}
