//! Runs an instruction natively, unchanged, with a whole register state.

use std::mem::offset_of;
use std::sync::Arc;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::vector::arena::{Arena, Thunk};
use crate::vector::call::{self, Image};

/// Everything an instruction can read or change, but RSP, RIP and memory.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct NativeState {
    pub(super) zmm: [[u64; 8]; 32],
    pub(super) image: Image,
    pub(super) k: [u64; 8],
    pub(super) gpr: [u64; 16],
    pub(super) mxcsr: u32,
    mxcsr_host: u32,
    pub(super) status: u16,
}

impl Default for NativeState {
    fn default() -> Self {
        Self {
            zmm: [[0; 8]; 32],
            image: Image::default(),
            k: [0; 8],
            gpr: [0; 16],
            mxcsr: 0x1f80,
            mxcsr_host: 0x1f80,
            status: 0,
        }
    }
}

/// The frame around the instruction: loads a state, calls the instruction, stores the state.
#[derive(Debug)]
pub(super) struct Native {
    frame: Thunk,
    arena: Arc<Arena>,
}

impl Native {
    /// For a host with AVX-512 or with AVX alone.
    pub(super) fn new(avx512: bool) -> Self {
        let arena = Arena::new(32 << 20).expect("code memory");
        let frame = arena.thunk(&frame(avx512));
        Self { frame, arena }
    }

    /// Runs one instruction (without control flow or use of RSP) on `state`.
    pub(super) fn run(&self, instruction: &[u8], state: &mut NativeState) {
        let mut code = instruction.to_vec();
        code.push(0xc3);
        let slot = self.arena.thunk(&code);
        call::call_native(&self.frame, &slot, state);
    }

    /// Likewise, with SIMD exceptions that are not masked in MXCSR; `true` if one was raised.
    pub(super) fn run_trapping(&self, instruction: &[u8], state: &mut NativeState) -> bool {
        let mut code = instruction.to_vec();
        code.push(0xc3);
        let slot = self.arena.thunk(&code);
        call::call_trapping(&self.frame, &slot, instruction.len(), state)
    }
}

fn field(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RDI, offset as i64)
}

/// `extern "sysv64" fn(*mut NativeState, *const u8)`.
fn frame(avx512: bool) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    let mut emit = |instruction: Result<Instruction, _>| {
        encoder.encode(&instruction.expect("a valid instruction"), 0).expect("encodable");
    };
    let saved = [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
    for register in saved {
        emit(Instruction::with1(Code::Push_r64, register));
    }
    emit(Instruction::with1(Code::Push_r64, Register::RSI));
    emit(Instruction::with1(Code::Push_r64, Register::RDI));
    emit(Instruction::with1(Code::Fxrstor64_m512byte, field(offset_of!(NativeState, image))));
    let vectors = if avx512 { 32 } else { 16 };
    for n in 0..vectors {
        let memory = field(offset_of!(NativeState, zmm) + 64 * n);
        emit(if avx512 {
            Instruction::with2(Code::EVEX_Vmovups_zmm_k1z_zmmm512, Register::ZMM0 + n as u32, memory)
        } else {
            Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0 + n as u32, memory)
        });
    }
    if avx512 {
        for n in 0..8 {
            let memory = field(offset_of!(NativeState, k) + 8 * n);
            emit(Instruction::with2(Code::VEX_Kmovq_kr_km64, Register::K0 + n as u32, memory));
        }
    }
    emit(Instruction::with1(Code::Ldmxcsr_m32, field(offset_of!(NativeState, mxcsr))));
    emit(Instruction::with2(Code::Mov_r16_rm16, Register::AX, field(offset_of!(NativeState, status))));
    emit(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f));
    emit(Instruction::with(Code::Sahf).pipe());
    let general = |n: usize| Register::RAX + n as u32;
    for n in (0..16).filter(|&n| n != 4 && n != 7).chain([7]) {
        let memory = field(offset_of!(NativeState, gpr) + 8 * n);
        emit(Instruction::with2(Code::Mov_r64_rm64, general(n), memory));
    }
    emit(Instruction::with1(Code::Call_rm64, MemoryOperand::with_base_displ(Register::RSP, 8)));
    emit(Instruction::with2(Code::Xchg_rm64_r64, MemoryOperand::with_base(Register::RSP), Register::RDI));
    for n in (0..16).filter(|&n| n != 4 && n != 7) {
        let memory = field(offset_of!(NativeState, gpr) + 8 * n);
        emit(Instruction::with2(Code::Mov_rm64_r64, memory, general(n)));
    }
    emit(Instruction::with(Code::Lahf).pipe());
    emit(Instruction::with1(Code::Seto_rm8, Register::AL));
    emit(Instruction::with2(Code::Mov_rm16_r16, field(offset_of!(NativeState, status)), Register::AX));
    emit(Instruction::with1(Code::Stmxcsr_m32, field(offset_of!(NativeState, mxcsr))));
    emit(Instruction::with1(Code::Ldmxcsr_m32, field(offset_of!(NativeState, mxcsr_host))));
    for n in 0..vectors {
        let memory = field(offset_of!(NativeState, zmm) + 64 * n);
        emit(if avx512 {
            Instruction::with2(Code::EVEX_Vmovups_zmmm512_k1z_zmm, memory, Register::ZMM0 + n as u32)
        } else {
            Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, memory, Register::YMM0 + n as u32)
        });
    }
    if avx512 {
        for n in 0..8 {
            let memory = field(offset_of!(NativeState, k) + 8 * n);
            emit(Instruction::with2(Code::VEX_Kmovq_m64_kr, memory, Register::K0 + n as u32));
        }
    }
    emit(Instruction::with1(Code::Fxsave64_m512byte, field(offset_of!(NativeState, image))));
    emit(Instruction::with(Code::Fninit).pipe());
    emit(Instruction::with(Code::VEX_Vzeroupper).pipe());
    emit(Instruction::with1(Code::Pop_r64, Register::RAX));
    emit(Instruction::with2(Code::Mov_rm64_r64, field(offset_of!(NativeState, gpr) + 8 * 7), Register::RAX));
    emit(Instruction::with1(Code::Pop_r64, Register::RSI));
    for register in saved.into_iter().rev() {
        emit(Instruction::with1(Code::Pop_r64, register));
    }
    emit(Instruction::with(Code::Retnq).pipe());
    encoder.take_buffer()
}

/// Lets an instruction that cannot fail stand where a result is wanted.
trait Pipe: Sized {
    fn pipe(self) -> Result<Self, iced_x86::IcedError> {
        Ok(self)
    }
}

impl Pipe for Instruction {}
