//! Makes thunks: a guest instruction with its operands moved to fixed host registers.
//!
//! A thunk is `extern "sysv64" fn(*mut Registers, *const Slots) -> u32`. It loads the registers that the
//! instruction names from the register file, by the numbers it is given, so one thunk serves every choice of
//! registers; runs the instruction, whose memory operand has become the register file's bounce buffer; and
//! stores the results. It returns zero, or one of the bits in [`result`].
//!
//! Registers: RDI is the register file, RSI the numbers, R11 scratch. Vector operands are XMM1 to XMM5 (XMM0 if
//! implicit), the write mask K1, other masks K2 to K5, general operands R8 to R10 or, if implicit, themselves.

use std::mem::offset_of;

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, IcedError, Instruction, InstructionInfoFactory, MemoryOperand,
    OpAccess, OpKind, Register,
};

use super::state::{Registers, Slots};
use super::table;

/// What a thunk returns: zero if all went well, else these bits.
pub(super) mod result {
    /// An x87 exception was raised that is not masked (or had been).
    pub(crate) const X87_ERROR: u32 = 0x80;
    /// A SIMD exception that is not masked: nothing was stored. The flags are in `mxcsr_out`.
    pub(crate) const SIMD: u32 = 0x100;
    /// An x87 exception was pending: nothing was done.
    pub(crate) const X87_PENDING: u32 = 0x200;
}

/// The widest vector registers that the host can load and store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// SSE.
    Xmm,
    /// AVX.
    Ymm,
    /// AVX-512.
    Zmm,
}

/// What thunk generation needs to know of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// Register width.
    pub width: Width,
    /// Opmask registers have 64 bits (AVX512BW).
    pub wide_masks: bool,
}

/// A thunk's code and how to call it.
#[derive(Debug)]
pub(super) struct Encoded {
    /// Machine code.
    pub code: Vec<u8>,
    /// General operands: how many, and which of them (bit by bit) are to be stored back.
    pub general: (u8, u8),
    /// Status flags go in and out.
    pub status: bool,
}

/// How a thunk treats the x87 unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct X87Use {
    /// Check for a pending exception first.
    pub check_before: bool,
    /// Report whether one is pending afterwards.
    pub report_after: bool,
}

/// Why an instruction cannot be run on the host.
#[derive(Debug, thiserror::Error)]
pub(super) enum EncodeError {
    /// An operand of a kind not provided for.
    #[error("operand {operand} ({kind:?}) is of a kind that thunks do not have; interpret the instruction")]
    Operand {
        /// Which.
        operand: u32,
        /// Its kind.
        kind: OpKind,
    },
    /// More operands than slots.
    #[error("the instruction has more register operands than a thunk has slots; interpret it")]
    TooMany,
    /// The encoder refuses it.
    #[error("the normalised instruction cannot be encoded")]
    Encoder(#[from] IcedError),
}

/// The register numbers of an instruction, in the order in which its thunk takes them: operands, the write mask,
/// implicit operands.
///
/// # Errors
/// When there are too many.
pub(super) fn slots(instruction: &Instruction) -> Result<Slots, EncodeError> {
    let mut slots = Slots::default();
    let (mut registers, mut general) = (0, 0);
    let mut take = |register: Register| {
        if register.is_vector_register() || register.is_k() {
            slots.set_register(registers, register.number());
            registers += 1;
        } else if register.is_gpr() {
            slots.set_general(general, register.number());
            general += 1;
        }
        if registers > Slots::REGISTERS || general > Slots::GENERAL {
            Err(EncodeError::TooMany)
        } else {
            Ok(())
        }
    };
    for operand in 0..instruction.op_count() {
        if instruction.op_kind(operand) == OpKind::Register {
            take(instruction.op_register(operand))?;
        }
    }
    take(instruction.op_mask())?;
    for &(register, ..) in table::implicit(instruction.mnemonic()) {
        take(register)?;
    }
    Ok(slots)
}

/// A register of the host that stands for an operand.
enum Binding {
    Vector { slot: usize, host: Register, written: bool },
    Mask { slot: usize, host: Register, written: bool },
    General { index: usize, host: Register, written: bool },
}

/// Writes machine code, instruction by instruction.
struct Emitter {
    encoder: Encoder,
}

impl Emitter {
    fn new() -> Self {
        Self { encoder: Encoder::new(64) }
    }

    fn emit(&mut self, instruction: &Instruction) -> Result<(), IcedError> {
        self.encoder.encode(instruction, 0).map(drop)
    }

    fn load(&mut self, code: Code, register: Register, memory: MemoryOperand) -> Result<(), IcedError> {
        self.emit(&Instruction::with2(code, register, memory)?)
    }

    fn store(&mut self, code: Code, memory: MemoryOperand, register: Register) -> Result<(), IcedError> {
        self.emit(&Instruction::with2(code, memory, register)?)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.encoder.write_u8(byte);
        }
    }

    fn take(mut self) -> Vec<u8> {
        self.encoder.take_buffer()
    }
}

/// A field of the register file.
fn field(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RDI, offset as i64)
}

/// The vector register whose offset is in R11.
fn selected_vector() -> MemoryOperand {
    const { assert!(offset_of!(Registers, zmm) == 0) };
    MemoryOperand::with_base_index(Register::RDI, Register::R11)
}

/// The opmask register whose number is in R11.
fn selected_mask() -> MemoryOperand {
    let offset = offset_of!(Registers, k) as i64;
    MemoryOperand::with_base_index_scale_displ_size(Register::RDI, Register::R11, 8, offset, 8)
}

fn nth(first: Register, n: usize) -> Register {
    first + n as u32
}

/// Load and store instructions for one vector operand.
fn moves(register: Register, legacy: bool, host: Host) -> ((Code, Register), (Code, Register)) {
    let n = register.number();
    let xmm = nth(Register::XMM0, n);
    let ymm = nth(Register::YMM0, n);
    let zmm = nth(Register::ZMM0, n);
    if legacy {
        // The upper parts stay as they are because they are neither loaded nor stored.
        return ((Code::Movaps_xmm_xmmm128, xmm), (Code::Movaps_xmmm128_xmm, xmm));
    }
    let load = if register.is_zmm() {
        (Code::EVEX_Vmovups_zmm_k1z_zmmm512, zmm)
    } else if register.is_ymm() {
        (Code::VEX_Vmovups_ymm_ymmm256, ymm)
    } else {
        (Code::VEX_Vmovups_xmm_xmmm128, xmm)
    };
    // The whole register, as the instruction has left it: VEX and EVEX forms clear the upper parts. What a host without
    // AVX-512 does not have of it, no guest on it can set: it is zero.
    let store = match host.width {
        Width::Zmm => (Code::EVEX_Vmovups_zmmm512_k1z_zmm, zmm),
        _ => (Code::VEX_Vmovups_ymmm256_ymm, ymm),
    };
    (load, store)
}

/// Makes the thunk for an instruction that the table allows. `mxcsr`: the instruction obeys MXCSR.
///
/// # Errors
/// When an operand is of a kind not provided for.
pub(super) fn thunk(
    instruction: &Instruction,
    host: Host,
    mxcsr: bool,
    x87: X87Use,
) -> Result<Encoded, EncodeError> {
    let mut normalised = *instruction;
    let mut info_factory = InstructionInfoFactory::new();
    let info = info_factory.info(instruction);
    let legacy = instruction.code().encoding() == EncodingKind::Legacy;
    let mut bindings = Vec::with_capacity(6);
    let mut general = 0;
    let mut stored = 0;
    let (mut slot, mut vectors, mut masks) = (0, 1, 2);

    normalised.set_code_size(CodeSize::Code64);
    normalised.set_segment_prefix(Register::None);
    normalised.set_has_rep_prefix(false);
    normalised.set_has_repne_prefix(false);
    normalised.set_has_lock_prefix(false);
    let mut take_slot = || {
        let taken = slot;
        slot += 1;
        if taken < Slots::REGISTERS { Ok(taken) } else { Err(EncodeError::TooMany) }
    };
    for operand in 0..instruction.op_count() {
        let kind = instruction.op_kind(operand);
        let written = matches!(
            info.op_access(operand),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        match kind {
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            OpKind::Memory => {
                normalised.set_memory_base(Register::RDI);
                normalised.set_memory_index(Register::None);
                normalised.set_memory_index_scale(1);
                normalised.set_memory_displ_size(8);
                normalised.set_memory_displacement64(offset_of!(Registers, bounce) as u64);
            }
            OpKind::Register => {
                let register = instruction.op_register(operand);
                if register.is_vector_register() {
                    let slot = take_slot()?;
                    let first = match () {
                        () if register.is_zmm() => Register::ZMM0,
                        () if register.is_ymm() => Register::YMM0,
                        () => Register::XMM0,
                    };
                    let host = nth(first, vectors);
                    vectors += 1;
                    normalised.set_op_register(operand, host);
                    bindings.push(Binding::Vector { slot, host, written });
                } else if register.is_k() {
                    let slot = take_slot()?;
                    let host = nth(Register::K0, masks);
                    masks += 1;
                    normalised.set_op_register(operand, host);
                    bindings.push(Binding::Mask { slot, host, written });
                } else if register.is_gpr() && general < Slots::GENERAL {
                    let index = general;
                    let first = match register.size() {
                        8 => Register::R8,
                        4 => Register::R8D,
                        2 => Register::R8W,
                        _ => return Err(EncodeError::Operand { operand, kind }),
                    };
                    normalised.set_op_register(operand, nth(first, index));
                    general += 1;
                    stored |= u8::from(written) << index;
                    bindings.push(Binding::General { index, host: nth(Register::R8, index), written });
                } else if register.is_mm() {
                    // MMX registers are live in the host's, so the instruction names the guest's own.
                } else if !register.is_st() {
                    return Err(EncodeError::Operand { operand, kind });
                }
            }
            _ => return Err(EncodeError::Operand { operand, kind }),
        }
    }
    if instruction.op_mask() != Register::None {
        let slot = take_slot()?;
        normalised.set_op_mask(Register::K1);
        bindings.push(Binding::Mask { slot, host: Register::K1, written: false });
    }
    for &(register, _, written) in table::implicit(instruction.mnemonic()) {
        if register.is_vector_register() {
            let slot = take_slot()?;
            bindings.push(Binding::Vector { slot, host: register, written });
        } else {
            let index = general;
            general += 1;
            stored |= u8::from(written) << index;
            bindings.push(Binding::General { index, host: register, written });
        }
    }
    let status = instruction.rflags_modified() | instruction.rflags_read() != 0;

    let setup = prologue(&bindings, legacy, host, mxcsr, status)?;
    let mut body = Emitter::new();
    // Prefixed WAITs and such are separate instructions; what is left of them must be encodable alone.
    body.emit(&normalised)?;
    let stores = epilogue(&bindings, legacy, host)?;

    let mut code = Emitter::new();
    if x87.check_before {
        // fnstsw ax; test al, al; jns +6; mov eax, X87_PENDING; ret
        code.bytes(&[0xdf, 0xe0, 0x84, 0xc0, 0x79, 0x06, 0xb8]);
        code.bytes(&result::X87_PENDING.to_le_bytes());
        code.bytes(&[0xc3]);
    }
    code.bytes(&setup);
    code.bytes(&body.take());
    if status {
        // lahf; seto al; mov [rdi + status_out], ax
        code.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        code.store(Code::Mov_rm16_r16, field(offset_of!(Registers, status_out)), Register::AX)?;
    }
    if mxcsr {
        code.emit(&Instruction::with1(Code::Stmxcsr_m32, field(offset_of!(Registers, mxcsr_out)))?)?;
        code.emit(&Instruction::with1(Code::Ldmxcsr_m32, field(offset_of!(Registers, mxcsr_host)))?)?;
    }
    code.bytes(&stores);
    // xor eax, eax
    code.bytes(&[0x31, 0xc0]);
    if x87.report_after {
        // fnstsw ax; and eax, X87_ERROR
        code.bytes(&[0xdf, 0xe0, 0x25]);
        code.bytes(&result::X87_ERROR.to_le_bytes());
    }
    if !legacy && host.width != Width::Xmm {
        code.emit(&Instruction::with(Code::VEX_Vzeroupper))?;
    }
    code.bytes(&[0xc3]);
    Ok(Encoded { code: code.take(), general: (general as u8, stored), status })
}

/// What a thunk goes on with whose instruction has raised a SIMD exception: nothing is stored but MXCSR.
pub(super) fn landing() -> Vec<u8> {
    // stmxcsr, ldmxcsr [rdi + disp32] (SDM 2B, STMXCSR and LDMXCSR)
    let mut code = Vec::new();
    for (modrm, offset) in
        [(0x9f, offset_of!(Registers, mxcsr_out)), (0x97, offset_of!(Registers, mxcsr_host))]
    {
        code.extend_from_slice(&[0x0f, 0xae, modrm]);
        code.extend_from_slice(&(offset as u32).to_le_bytes());
    }
    if is_x86_feature_detected!("avx") {
        code.extend_from_slice(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    // mov eax, SIMD; ret
    code.push(0xb8);
    code.extend_from_slice(&result::SIMD.to_le_bytes());
    code.push(0xc3);
    code
}

/// Loads operands, flags and MXCSR.
fn prologue(
    bindings: &[Binding],
    legacy: bool,
    host: Host,
    mxcsr: bool,
    status: bool,
) -> Result<Vec<u8>, IcedError> {
    let mut code = Emitter::new();
    for binding in bindings {
        match *binding {
            Binding::Vector { slot, host: register, .. } => {
                let ((load, register), _) = moves(register, legacy, host);
                select_vector(&mut code, slot)?;
                code.load(load, register, selected_vector())?;
            }
            Binding::Mask { slot, host: register, .. } => {
                select(&mut code, slot, 7)?;
                let load = if host.wide_masks { Code::VEX_Kmovq_kr_km64 } else { Code::VEX_Kmovw_kr_km16 };
                code.load(load, register, selected_mask())?;
            }
            Binding::General { .. } => {}
        }
    }
    if status {
        // mov ax, [rdi + status]; add al, 0x7f (OF); sahf
        code.load(Code::Mov_r16_rm16, Register::AX, field(offset_of!(Registers, status)))?;
        code.bytes(&[0x04, 0x7f, 0x9e]);
    }
    for binding in bindings {
        if let Binding::General { index, host: register, .. } = *binding {
            code.load(Code::Mov_r64_rm64, register, field(offset_of!(Registers, gpr) + 8 * index))?;
        }
    }
    if mxcsr {
        code.emit(&Instruction::with1(Code::Ldmxcsr_m32, field(offset_of!(Registers, mxcsr_run)))?)?;
    }
    Ok(code.take())
}

/// Stores results.
fn epilogue(bindings: &[Binding], legacy: bool, host: Host) -> Result<Vec<u8>, IcedError> {
    let mut code = Emitter::new();
    for binding in bindings {
        match *binding {
            Binding::Vector { slot, host: register, written: true } => {
                let (_, (store, register)) = moves(register, legacy, host);
                select_vector(&mut code, slot)?;
                code.store(store, selected_vector(), register)?;
            }
            Binding::Mask { slot, host: register, written: true } => {
                select(&mut code, slot, 7)?;
                let store = if host.wide_masks { Code::VEX_Kmovq_m64_kr } else { Code::VEX_Kmovw_m16_kr };
                code.store(store, selected_mask(), register)?;
            }
            Binding::General { index, host: register, written: true } => {
                code.store(Code::Mov_rm64_r64, field(offset_of!(Registers, gpr) + 8 * index), register)?;
            }
            _ => {}
        }
    }
    Ok(code.take())
}

/// Loads R11 with the number in a slot, made to be in range.
fn select(code: &mut Emitter, slot: usize, mask: i32) -> Result<(), IcedError> {
    let memory = MemoryOperand::with_base_displ(Register::RSI, slot as i64);
    code.load(Code::Movzx_r32_rm8, Register::R11D, memory)?;
    code.emit(&Instruction::with2(Code::And_rm32_imm8, Register::R11D, mask)?)
}

/// Loads R11 with the offset of the vector register in a slot.
fn select_vector(code: &mut Emitter, slot: usize) -> Result<(), IcedError> {
    select(code, slot, 31)?;
    code.emit(&Instruction::with2(Code::Shl_rm32_imm8, Register::R11D, 6)?)
}
