//! The positive table: which instructions run on the host, and how each kind is treated.
//!
//! An instruction is run only if every extension it belongs to is listed in [`THUNKED`] (or is one of the state
//! instructions in [`special`]), its operands are of kinds the encoder knows, and its implicit operands, if any,
//! are listed in [`implicit`]. Anything else is refused.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, Register};

/// Extensions whose instructions compute on vector, mask, MMX or x87 registers and nothing else.
const THUNKED: &[CpuidFeature] = &[
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::CMOV,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSE4A,
    CpuidFeature::AES,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::SHA,
    CpuidFeature::GFNI,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::VAES,
    CpuidFeature::VPCLMULQDQ,
    CpuidFeature::AVX_VNNI,
    CpuidFeature::AVX_IFMA,
    CpuidFeature::AVX_VNNI_INT8,
    CpuidFeature::AVX_NE_CONVERT,
    CpuidFeature::AVX512F,
    CpuidFeature::AVX512VL,
    CpuidFeature::AVX512BW,
    CpuidFeature::AVX512DQ,
    CpuidFeature::AVX512CD,
    CpuidFeature::AVX512_IFMA,
    CpuidFeature::AVX512_VBMI,
    CpuidFeature::AVX512_VBMI2,
    CpuidFeature::AVX512_VNNI,
    CpuidFeature::AVX512_BITALG,
    CpuidFeature::AVX512_VPOPCNTDQ,
    CpuidFeature::AVX512_BF16,
    CpuidFeature::AVX512_FP16,
];

/// Instructions that are not an operation on operands but on the unit's state, or whose memory accesses follow
/// their own rules. They are executed in Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// WAIT.
    Wait,
    /// FNINIT.
    InitX87,
    /// FNSTSW AX.
    StoreStatusAx,
    /// FNSTENV.
    StoreEnvironment,
    /// FLDENV.
    LoadEnvironment,
    /// FNSAVE.
    SaveX87,
    /// FRSTOR.
    RestoreX87,
    /// FXSAVE, FXSAVE64.
    Fxsave,
    /// FXRSTOR, FXRSTOR64.
    Fxrstor,
    /// XSAVE.
    Xsave,
    /// XSAVEOPT.
    Xsaveopt,
    /// XSAVEC.
    Xsavec,
    /// XSAVES.
    Xsaves,
    /// XRSTOR.
    Xrstor,
    /// XRSTORS.
    Xrstors,
    /// XGETBV.
    Xgetbv,
    /// XSETBV.
    Xsetbv,
    /// LDMXCSR, VLDMXCSR.
    LoadMxcsr,
    /// STMXCSR, VSTMXCSR.
    StoreMxcsr,
    /// VZEROUPPER.
    ZeroUpper,
    /// VZEROALL.
    ZeroAll,
    /// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes selected by a mask go to DS:rDI.
    MaskedBytes,
    /// VGATHER…, VPGATHER….
    Gather,
    /// VSCATTER…, VPSCATTER….
    Scatter,
}

/// The special treatment of an instruction, if it has one.
pub(super) fn special(instruction: &Instruction) -> Option<Special> {
    Some(match instruction.mnemonic() {
        Mnemonic::Wait => Special::Wait,
        Mnemonic::Fninit => Special::InitX87,
        Mnemonic::Fnstsw if instruction.code() == Code::Fnstsw_AX => Special::StoreStatusAx,
        Mnemonic::Fnstenv => Special::StoreEnvironment,
        Mnemonic::Fldenv => Special::LoadEnvironment,
        Mnemonic::Fnsave => Special::SaveX87,
        Mnemonic::Frstor => Special::RestoreX87,
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => Special::Fxsave,
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => Special::Fxrstor,
        Mnemonic::Xsave | Mnemonic::Xsave64 => Special::Xsave,
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Special::Xsaveopt,
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => Special::Xsavec,
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => Special::Xsaves,
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => Special::Xrstor,
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => Special::Xrstors,
        Mnemonic::Xgetbv => Special::Xgetbv,
        Mnemonic::Xsetbv => Special::Xsetbv,
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => Special::LoadMxcsr,
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => Special::StoreMxcsr,
        Mnemonic::Vzeroupper => Special::ZeroUpper,
        Mnemonic::Vzeroall => Special::ZeroAll,
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => Special::MaskedBytes,
        Mnemonic::Vgatherdps
        | Mnemonic::Vgatherdpd
        | Mnemonic::Vgatherqps
        | Mnemonic::Vgatherqpd
        | Mnemonic::Vpgatherdd
        | Mnemonic::Vpgatherdq
        | Mnemonic::Vpgatherqd
        | Mnemonic::Vpgatherqq => Special::Gather,
        Mnemonic::Vscatterdps
        | Mnemonic::Vscatterdpd
        | Mnemonic::Vscatterqps
        | Mnemonic::Vscatterqpd
        | Mnemonic::Vpscatterdd
        | Mnemonic::Vpscatterdq
        | Mnemonic::Vpscatterqd
        | Mnemonic::Vpscatterqq => Special::Scatter,
        _ => return None,
    })
}

/// Whether an instruction belongs to this module at all, supported by a CPU or not.
#[inline]
pub(super) fn concerns(instruction: &Instruction) -> bool {
    CONCERNS[instruction.code() as usize]
}

/// The answer for each form: every instruction that is decoded asks.
static CONCERNS: std::sync::LazyLock<Box<[bool]>> =
    std::sync::LazyLock::new(|| Code::values().map(is_of_units).collect());

fn is_of_units(code: Code) -> bool {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    special(&instruction).is_some()
        || matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
            && code.cpuid_features().iter().all(|feature| THUNKED.contains(feature))
            && !matches!(
                code.mnemonic(),
                // Of these extensions, but on integer registers or nothing.
                Mnemonic::Crc32
                    | Mnemonic::Lfence
                    | Mnemonic::Mfence
                    | Mnemonic::Sfence
                    | Mnemonic::Movnti
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
                    | Mnemonic::Pause
            )
            && !is_conditional_move(code.mnemonic())
}

/// The integer CMOVcc (FCMOVcc is of FPU and CMOV).
fn is_conditional_move(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Cmova
            | Mnemonic::Cmovae
            | Mnemonic::Cmovb
            | Mnemonic::Cmovbe
            | Mnemonic::Cmove
            | Mnemonic::Cmovg
            | Mnemonic::Cmovge
            | Mnemonic::Cmovl
            | Mnemonic::Cmovle
            | Mnemonic::Cmovne
            | Mnemonic::Cmovno
            | Mnemonic::Cmovnp
            | Mnemonic::Cmovns
            | Mnemonic::Cmovo
            | Mnemonic::Cmovp
            | Mnemonic::Cmovs
    )
}

/// An operand that the encoding does not name: register, read, written.
pub(super) type Implicit = (Register, bool, bool);

/// The implicit register operands of the instructions that have any.
pub(super) fn implicit(mnemonic: Mnemonic) -> &'static [Implicit] {
    match mnemonic {
        Mnemonic::Blendvps | Mnemonic::Blendvpd | Mnemonic::Pblendvb | Mnemonic::Sha256rnds2 => {
            &[(Register::XMM0, true, false)]
        }
        Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64 | Mnemonic::Vpcmpestrm | Mnemonic::Vpcmpestrm64 => {
            &[(Register::XMM0, false, true), (Register::RAX, true, false), (Register::RDX, true, false)]
        }
        Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Vpcmpestri | Mnemonic::Vpcmpestri64 => {
            &[(Register::RAX, true, false), (Register::RDX, true, false), (Register::RCX, false, true)]
        }
        Mnemonic::Pcmpistrm | Mnemonic::Vpcmpistrm => &[(Register::XMM0, false, true)],
        Mnemonic::Pcmpistri | Mnemonic::Vpcmpistri => &[(Register::RCX, false, true)],
        _ => &[],
    }
}

/// How an x87 instruction treats pending exceptions and pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum X87Kind {
    /// Checks for a pending exception first, and records its pointers.
    Operation,
    /// Checks, but records nothing.
    WaitingControl,
    /// Likewise, and loads the control word: FLDCW.
    LoadControl,
    /// Neither.
    Control,
}

/// The kind of an x87 instruction.
pub(super) fn x87_kind(mnemonic: Mnemonic) -> X87Kind {
    match mnemonic {
        Mnemonic::Fninit
        | Mnemonic::Fnclex
        | Mnemonic::Fnstcw
        | Mnemonic::Fnstsw
        | Mnemonic::Fnstenv
        | Mnemonic::Fnsave
        | Mnemonic::Fneni
        | Mnemonic::Fndisi
        | Mnemonic::Fnsetpm => X87Kind::Control,
        Mnemonic::Wait | Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Emms => X87Kind::WaitingControl,
        Mnemonic::Fldcw => X87Kind::LoadControl,
        _ => X87Kind::Operation,
    }
}

/// Whether a legacy SSE instruction may have a 16-byte memory operand anywhere (SDM 2A 2.4.4).
pub(super) fn tolerates_misalignment(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    ) || host_is_amd() && mnemonic_is_sha(mnemonic)
}

/// Whether the host has AMD's choices where the vendors differ in what instructions do that it executes for the guest. They
/// let the SHA instructions have their operand anywhere and check the alignment of wide operands, for example.
pub(super) fn host_is_amd() -> bool {
    static AMD: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| super::call::host_cpuid(0, 0).ecx == u32::from_le_bytes(*b"cAMD"));
    *AMD
}

fn mnemonic_is_sha(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Sha1msg1
            | Mnemonic::Sha1msg2
            | Mnemonic::Sha1nexte
            | Mnemonic::Sha1rnds4
            | Mnemonic::Sha256msg1
            | Mnemonic::Sha256msg2
            | Mnemonic::Sha256rnds2
    )
}

/// Whether a move insists on an aligned memory operand in every encoding, and in AMD's misaligned mode too.
pub(super) fn demands_alignment(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Movaps
            | Mnemonic::Movapd
            | Mnemonic::Movdqa
            | Mnemonic::Movntps
            | Mnemonic::Movntpd
            | Mnemonic::Movntdq
            | Mnemonic::Movntdqa
            | Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovdqa
            | Mnemonic::Vmovdqa32
            | Mnemonic::Vmovdqa64
            | Mnemonic::Vmovntps
            | Mnemonic::Vmovntpd
            | Mnemonic::Vmovntdq
            | Mnemonic::Vmovntdqa
    )
}
