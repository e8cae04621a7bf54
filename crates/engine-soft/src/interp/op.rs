//! A decoded instruction, ready to execute.

use std::sync::LazyLock;

use iced_x86::{Code, CodeSize, Instruction, OpKind, Register};
use ringfence_x86::{Exception, SegmentRegister};

use super::cpu::Cpu;

/// Executes one instruction.
pub type Handler = fn(&mut Cpu, &Op) -> Result<(), Exception>;

/// Index of the instruction pointer in [`Cpu::regs`].
pub const RIP: usize = 16;
/// Index of a register that is always zero.
pub const ZERO: usize = 17;

/// Prefix bits of [`Op::prefixes`].
pub mod prefix {
    /// LOCK.
    pub const LOCK: u8 = 1;
    /// REP or REPE.
    pub const REP: u8 = 2;
    /// REPNE.
    pub const REPNE: u8 = 4;
    /// Not a prefix: the instruction has an explicit memory operand.
    pub const MEMORY: u8 = 8;
}

/// One decoded instruction.
///
/// Register operands are indices into [`Cpu::regs`]; 16 to 19 stand for AH, CH, DH and BH. For other register
/// files (segments, control, debug, vector) they are the register's number.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// What to do.
    pub handler: Handler,
    /// Displacement of the memory operand; for a RIP-relative one, relative to the end of the instruction.
    pub displacement: i64,
    /// Mask that the effective address passes through: the address size.
    pub address_mask: u64,
    /// Immediate operand, sign-extended to 64 bits as the instruction does; for near branches, the distance
    /// from the end of the instruction.
    pub immediate: u64,
    /// Free for the handler's family.
    pub aux: u32,
    /// The form, as the decoder names it.
    pub code: Code,
    /// Base register of the memory operand, or [`ZERO`], or [`RIP`].
    pub base: u8,
    /// Index register, or [`ZERO`].
    pub index: u8,
    /// Shift of the index register, 0 to 3.
    pub scale: u8,
    /// Segment of the memory operand, as [`SegmentRegister`] numbers it.
    pub segment: u8,
    /// First register operand (operand 0 if that is a register).
    pub dst: u8,
    /// The register operand after the first operand, if any.
    pub src: u8,
    /// The register operand after that, if any.
    pub third: u8,
    /// Prefixes and other marks; see [`prefix`].
    pub prefixes: u8,
    /// Length in bytes.
    pub length: u8,
    /// The condition of a conditional instruction, as its opcode's low four bits say it.
    pub condition: u8,
}

impl Op {
    /// Raises #UD.
    pub const UNDEFINED: Self = Self {
        handler: super::decode::undefined,
        displacement: 0,
        address_mask: u64::MAX,
        immediate: 0,
        aux: 0,
        code: Code::INVALID,
        base: ZERO as u8,
        index: ZERO as u8,
        scale: 0,
        segment: SegmentRegister::Ds as u8,
        dst: 0,
        src: 0,
        third: 0,
        prefixes: 0,
        length: 0,
        condition: 0,
    };

    /// Takes over the operands of `instruction`.
    pub fn new(instruction: &Instruction, handler: Handler) -> Self {
        let mut op = Self {
            handler,
            code: instruction.code(),
            length: instruction.len() as u8,
            condition: condition(instruction),
            ..Self::UNDEFINED
        };
        if instruction.has_lock_prefix() {
            op.prefixes |= prefix::LOCK;
        }
        if instruction.has_rep_prefix() {
            op.prefixes |= prefix::REP;
        }
        if instruction.has_repne_prefix() {
            op.prefixes |= prefix::REPNE;
        }
        // No loop: each is at a place known to the compiler.
        let count = instruction.op_count();
        if count > 0 {
            op.add_operand(instruction, 0, instruction.op0_kind(), instruction.op0_register());
        }
        if count > 1 {
            op.add_operand(instruction, 1, instruction.op1_kind(), instruction.op1_register());
        }
        if count > 2 {
            op.add_operand(instruction, 2, instruction.op2_kind(), instruction.op2_register());
        }
        if count > 3 {
            op.add_operand(instruction, 3, instruction.op3_kind(), instruction.op3_register());
        }
        op
    }

    #[inline(always)]
    fn add_operand(&mut self, instruction: &Instruction, i: u32, kind: OpKind, register: Register) {
        if kind == OpKind::Register {
            let number = register_number(register);
            match i {
                0 => self.dst = number,
                1 => self.src = number,
                2 if instruction.op1_kind() != OpKind::Register => self.src = number,
                _ => self.third = number,
            }
        } else if kind == OpKind::Memory {
            self.add_memory(instruction);
        } else {
            self.add_other(instruction, i, kind);
        }
    }

    fn add_other(&mut self, instruction: &Instruction, i: u32, kind: OpKind) {
        use OpKind as K;
        match kind {
            K::NearBranch16 | K::NearBranch32 | K::NearBranch64 => {
                self.immediate = instruction.near_branch_target().wrapping_sub(instruction.next_ip());
            }
            K::FarBranch16 | K::FarBranch32 => {
                self.immediate = u64::from(if kind == K::FarBranch16 {
                    u32::from(instruction.far_branch16())
                } else {
                    instruction.far_branch32()
                });
                self.aux = u32::from(instruction.far_branch_selector());
            }
            K::Immediate8_2nd => self.aux = u32::from(instruction.immediate8_2nd()),
            K::Immediate8
            | K::Immediate16
            | K::Immediate32
            | K::Immediate64
            | K::Immediate8to16
            | K::Immediate8to32
            | K::Immediate8to64
            | K::Immediate32to64 => self.immediate = instruction.immediate(i),
            _ => self.add_string_operand(instruction, kind),
        }
    }

    /// String operands: the segment of the source can be overridden.
    fn add_string_operand(&mut self, instruction: &Instruction, kind: OpKind) {
        use OpKind as K;
        match kind {
            K::MemorySegSI
            | K::MemorySegESI
            | K::MemorySegRSI
            | K::MemorySegDI
            | K::MemorySegEDI
            | K::MemorySegRDI => self.segment = segment_number(instruction),
            _ => {}
        }
        match kind {
            K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => self.address_mask = 0xffff,
            K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => self.address_mask = 0xffff_ffff,
            _ => {}
        }
    }

    fn add_memory(&mut self, instruction: &Instruction) {
        self.prefixes |= prefix::MEMORY;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        self.segment = segment_number(instruction);
        self.scale = instruction.memory_index_scale().trailing_zeros() as u8;
        self.displacement = instruction.memory_displacement64() as i64;
        let size = if base == Register::RIP || base == Register::EIP {
            // Absolute in the decoder's view, but the block may be mapped anywhere.
            self.base = RIP as u8;
            self.displacement =
                instruction.memory_displacement64().wrapping_sub(instruction.next_ip()) as i64;
            if base == Register::RIP { 8 } else { 4 }
        } else {
            if base != Register::None {
                self.base = register_number(base);
            }
            if index != Register::None && index.is_gpr() {
                self.index = register_number(index);
            }
            match (base, index) {
                // Absolute: the displacement is as wide as the address.
                (Register::None, i) if !i.is_gpr() => instruction.memory_displ_size() as usize,
                (Register::None, i) => i.size(),
                (b, _) => b.size(),
            }
        };
        self.address_mask = match size {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
    }

    /// Whether two are the same in everything.
    #[cfg(debug_assertions)]
    pub(super) fn is(&self, other: &Self) -> bool {
        let fields = |op: &Self| {
            let Self {
                handler, displacement, address_mask, immediate, aux, code, base, index, scale, ..
            } = *op;
            let Self { segment, dst, src, third, prefixes, length, condition, .. } = *op;
            let bytes = [base, index, scale, segment, dst, src, third, prefixes, length, condition];
            (handler as usize, displacement, address_mask, immediate, aux, code, bytes)
        };
        fields(self) == fields(other)
    }

    /// Whether it has its operand in memory locked: XCHG does so unasked (SDM 2C, XCHG).
    #[inline(always)]
    pub fn is_locked(&self) -> bool {
        let exchanges = matches!(self.code, Code::Xchg_rm16_r16 | Code::Xchg_rm32_r32 | Code::Xchg_rm64_r64);
        self.has(prefix::LOCK) || exchanges && self.has(prefix::MEMORY)
    }

    /// Whether `bit` of [`prefix`] is present.
    #[inline(always)]
    pub fn has(&self, bit: u8) -> bool {
        self.prefixes & bit != 0
    }
}

/// The segment of the memory operand. 64-bit mode ignores overrides other than FS and GS (SDM 1 3.4.2.1), also where it
/// comes to choosing between #GP and #SS.
fn segment_number(instruction: &Instruction) -> u8 {
    if instruction.code_size() != CodeSize::Code64 {
        return register_number(instruction.memory_segment());
    }
    let segment = match instruction.segment_prefix() {
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        _ => match instruction.memory_base() {
            Register::RSP | Register::ESP | Register::RBP | Register::EBP => SegmentRegister::Ss,
            _ => SegmentRegister::Ds,
        },
    };
    segment as u8
}

/// The condition code in the encoding of Jcc, SETcc and CMOVcc (SDM 2D B.1.4.7); 0 for other instructions.
#[inline]
fn condition(instruction: &Instruction) -> u8 {
    CONDITIONS[instruction.code() as usize]
}

/// It for each form.
static CONDITIONS: LazyLock<Box<[u8]>> = LazyLock::new(|| Code::values().map(condition_of).collect());

fn condition_of(code: Code) -> u8 {
    use iced_x86::ConditionCode as C;
    match code.condition_code() {
        C::None | C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}

/// The number of a register in its file; see [`Op`].
#[inline]
pub fn register_number(register: Register) -> u8 {
    NUMBERS[register as usize]
}

/// It for each register.
static NUMBERS: LazyLock<Box<[u8]>> = LazyLock::new(|| Register::values().map(number_of).collect());

fn number_of(register: Register) -> u8 {
    match register {
        Register::AH => 16,
        Register::CH => 17,
        Register::DH => 18,
        Register::BH => 19,
        r if r.is_gpr() => r.full_register().number() as u8,
        r => r.number() as u8,
    }
}
