//! Random instances of an instruction form.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind, OpKind, Register, RoundingControl,
};

/// A small generator (xorshift64*); the seed is printed on failure.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, limit: u32) -> u32 {
        (((self.next() >> 32) * u64::from(limit)) >> 32) as u32
    }

    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    /// Eight bytes that mean something as integers, singles, doubles or halves.
    pub(super) fn operand(&mut self) -> u64 {
        const DOUBLES: &[u64] = &[
            0,
            1 << 63,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x41e0_0000_0000_0000,
            0xc3e0_0000_0000_0000,
            0x4340_0000_0000_0001,
            0x3ca0_0000_0000_0000,
        ];
        const SINGLES: &[u32] = &[
            0,
            1 << 31,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x3f80_0000,
            0xbfc0_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x4f00_0000,
            0xdf00_0000,
            0x4b00_0001,
            0x3380_0000,
        ];
        match self.below(6) {
            0 => self.next(),
            1 => self.pick(DOUBLES),
            2 => u64::from(self.pick(SINGLES)) | u64::from(self.pick(SINGLES)) << 32,
            // Numbers near one, so that sums and products are finite and inexact.
            3 => 0x3fe0_0000_0000_0000 | self.next() >> 11,
            4 => {
                let half = |bits: u64| 0x3f00_0000 | bits & 0x00ff_ffff;
                half(self.next()) | half(self.next()) << 32
            }
            _ => (self.next() as i64 >> self.below(64)) as u64,
        }
    }
}

/// The register of a test's memory operand; its index is RCX.
pub(super) const BASE: Register = Register::RBX;

/// One random instance of `code`, decoded, with its bytes. `None` if it has no register and memory form that the
/// test can run.
pub(super) fn instance(code: Code, random: &mut Random) -> Option<(Instruction, Vec<u8>)> {
    let table = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let extended = table.encoding() == iced_x86::EncodingKind::EVEX;
    let mut memory = false;
    for (i, &kind) in table.op_kinds().iter().enumerate() {
        let i = i as u32;
        let use_memory = random.chance(50);
        let class = class(kind, use_memory)?;
        match class {
            Class::Register(first) => {
                let many = if extended && first_is_vector(first) {
                    32
                } else if first_is_vector(first) || first.is_gpr() {
                    16
                } else {
                    8
                };
                let mut number = random.below(many);
                while first.is_gpr() && matches!(number, 3 | 4) {
                    number = random.below(many);
                }
                instruction.set_op_kind(i, OpKind::Register);
                instruction.set_op_register(i, first + number);
            }
            Class::Fixed(register) => {
                instruction.set_op_kind(i, OpKind::Register);
                instruction.set_op_register(i, register);
            }
            Class::Memory => {
                memory = true;
                instruction.set_op_kind(i, OpKind::Memory);
                instruction.set_memory_base(BASE);
                let displacement = i64::from(random.below(64)) - 32;
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(displacement as u64);
            }
            Class::Elements(first) => {
                memory = true;
                instruction.set_op_kind(i, OpKind::Memory);
                instruction.set_memory_base(BASE);
                instruction.set_memory_index(first + random.below(if extended { 32 } else { 16 }));
                instruction.set_memory_index_scale(1 << random.below(4));
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64((i64::from(random.below(32)) - 16) as u64);
            }
            Class::Immediate if i > 0 && instruction.op_kind(i - 1) == OpKind::Immediate8 => {
                instruction.set_op_kind(i, OpKind::Immediate8_2nd);
                instruction.set_immediate8_2nd(random.next() as u8 & 0x3f);
            }
            Class::Immediate => {
                instruction.set_op_kind(i, OpKind::Immediate8);
                let wide = random.chance(30);
                instruction.set_immediate8(if wide { random.next() as u8 } else { random.below(8) as u8 });
            }
        }
    }
    if table.require_op_mask_register() || table.can_use_op_mask_register() && random.chance(50) {
        instruction.set_op_mask(Register::K1 + random.below(7));
        if table.can_use_zeroing_masking()
            && random.chance(50)
            && !(memory && instruction.op0_kind() == OpKind::Memory)
        {
            instruction.set_zeroing_masking(true);
        }
    }
    if memory && table.can_broadcast() && random.chance(50) {
        instruction.set_is_broadcast(true);
    }
    if !memory && table.can_use_rounding_control() && random.chance(40) {
        instruction.set_rounding_control(random.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]));
    } else if !memory && table.can_suppress_all_exceptions() && random.chance(40) {
        instruction.set_suppress_all_exceptions(true);
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
    (decoded.code() == code && decoded.len() == bytes.len()).then_some((decoded, bytes))
}

enum Class {
    Register(Register),
    /// Memory with a vector index.
    Elements(Register),
    Fixed(Register),
    Memory,
    Immediate,
}

fn first_is_vector(register: Register) -> bool {
    register.is_vector_register()
}

fn class(kind: OpCodeOperandKind, memory: bool) -> Option<Class> {
    use OpCodeOperandKind as K;
    let or_memory = |register| if memory { Class::Memory } else { Class::Register(register) };
    Some(match kind {
        K::mem => Class::Memory,
        K::mem_vsib32x | K::mem_vsib64x => Class::Elements(Register::XMM0),
        K::mem_vsib32y | K::mem_vsib64y => Class::Elements(Register::YMM0),
        K::mem_vsib32z | K::mem_vsib64z => Class::Elements(Register::ZMM0),
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => Class::Register(Register::XMM0),
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => Class::Register(Register::YMM0),
        K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Class::Register(Register::ZMM0),
        K::xmm_or_mem => or_memory(Register::XMM0),
        K::ymm_or_mem => or_memory(Register::YMM0),
        K::zmm_or_mem => or_memory(Register::ZMM0),
        K::mm_reg | K::mm_rm => Class::Register(Register::MM0),
        K::mm_or_mem => or_memory(Register::MM0),
        K::k_reg | K::k_rm | K::k_vvvv => Class::Register(Register::K0),
        K::k_or_mem => or_memory(Register::K0),
        K::r32_reg | K::r32_rm => Class::Register(Register::EAX),
        K::r64_reg | K::r64_rm => Class::Register(Register::RAX),
        K::r32_or_mem => or_memory(Register::EAX),
        K::r64_or_mem => or_memory(Register::RAX),
        K::r16_or_mem => or_memory(Register::AX),
        K::r8_or_mem => or_memory(Register::AL),
        K::sti_opcode => Class::Register(Register::ST0),
        K::st0 => Class::Fixed(Register::ST0),
        K::ax => Class::Fixed(Register::AX),
        K::imm8 => Class::Immediate,
        _ => return None,
    })
}

/// The instruction in assembler syntax.
pub(super) fn text(instruction: &Instruction) -> String {
    use iced_x86::Formatter;
    let mut text = String::new();
    iced_x86::GasFormatter::new().format(instruction, &mut text);
    text
}
