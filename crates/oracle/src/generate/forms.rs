//! Which instruction forms a case can be made of.

use std::arch::x86_64::__cpuid_count;

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Mnemonic, OpCodeInfo, OpCodeOperandKind};

use crate::case::Mode;

/// An instruction form in a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// The mode.
    pub mode: Mode,
    /// The decoder's name of it.
    pub code: Code,
}

/// Instructions whose result is not the same on every run or host, or that are not the processor's alone.
const ELSEWHERE: [Mnemonic; 47] = [
    // The system's.
    Mnemonic::Syscall,
    Mnemonic::Sysenter,
    Mnemonic::Sysret,
    Mnemonic::Sysexit,
    Mnemonic::Sysretq,
    Mnemonic::Sysexitq,
    Mnemonic::Int,
    Mnemonic::Int1,
    Mnemonic::Iret,
    Mnemonic::Iretd,
    Mnemonic::Iretq,
    Mnemonic::Vmcall,
    Mnemonic::Vmmcall,
    Mnemonic::Vmfunc,
    Mnemonic::Rsm,
    Mnemonic::Getsec,
    // Emulated by the system where user-mode instruction prevention is on.
    Mnemonic::Sgdt,
    Mnemonic::Sidt,
    Mnemonic::Sldt,
    Mnemonic::Smsw,
    Mnemonic::Str,
    // Of this host and this moment.
    Mnemonic::Cpuid,
    Mnemonic::Rdtsc,
    Mnemonic::Rdtscp,
    Mnemonic::Rdpmc,
    Mnemonic::Rdpid,
    Mnemonic::Rdpru,
    Mnemonic::Rdrand,
    Mnemonic::Rdseed,
    Mnemonic::Xgetbv,
    // Waiting.
    Mnemonic::Monitor,
    Mnemonic::Monitorx,
    Mnemonic::Mwait,
    Mnemonic::Mwaitx,
    // What they write depends on what the processor believes to be unused.
    Mnemonic::Xsave,
    Mnemonic::Xsave64,
    Mnemonic::Xsavec,
    Mnemonic::Xsavec64,
    Mnemonic::Xsaveopt,
    Mnemonic::Xsaveopt64,
    Mnemonic::Xsaves,
    Mnemonic::Xsaves64,
    Mnemonic::Xrstor,
    Mnemonic::Xrstor64,
    Mnemonic::Xrstors,
    Mnemonic::Xrstors64,
    Mnemonic::Xsetbv,
];

/// Whether a native process can execute `code` in `mode` and always get the same result, features apart.
pub fn is_suitable(code: Code, mode: Mode) -> bool {
    let info = code.op_code();
    let in_mode = info.is_available_in_mode(mode.bits())
        && if mode == Mode::Bits64 { info.long_mode() } else { info.compatibility_mode() };
    let far = matches!(
        code.flow_control(),
        FlowControl::IndirectBranch
            | FlowControl::IndirectCall
            | FlowControl::UnconditionalBranch
            | FlowControl::Call
            | FlowControl::Return
    ) && is_far(code, info);
    in_mode
        && info.is_instruction()
        && !info.fwait()
        && info.cpl3()
        && !info.must_be_cpl0()
        && !info.is_privileged()
        && !info.is_input_output()
        && info.decoder_option() == 0
        // What 66 does to a near branch in 64-bit mode is the maker's choice.
        && !(mode == Mode::Bits64 && info.operand_size() == 16 && code.flow_control() != FlowControl::Next)
        // Without ModRM byte on some processors; see UD1.
        && code != Code::Ud0
        // Reads 16 bits of memory or 32.
        && code != Code::Movsxd_r16_rm16
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
        && !far
        && !ELSEWHERE.contains(&code.mnemonic())
}

fn is_far(code: Code, info: &OpCodeInfo) -> bool {
    code.mnemonic() == Mnemonic::Retf
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
        || matches!(info.op0_kind(), OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2)
}

/// Every form that is suitable in `mode` and that the host has.
pub fn runnable(mode: Mode, fsgsbase: bool) -> Vec<Form> {
    let available = |code: &Code| {
        code.cpuid_features()
            .iter()
            .all(|&feature| if feature == CpuidFeature::FSGSBASE { fsgsbase } else { host_has(feature) })
    };
    Code::values()
        .filter(|&code| is_suitable(code, mode))
        .filter(available)
        .map(|code| Form { mode, code })
        .collect()
}

/// Whether the host has every feature that `code` belongs to.
pub(crate) fn is_offered(code: Code, fsgsbase: bool) -> bool {
    code.cpuid_features()
        .iter()
        .all(|&feature| if feature == CpuidFeature::FSGSBASE { fsgsbase } else { host_has(feature) })
}

/// Whether the host CPU and its system offer `feature`. Only what this project knows to execute natively is listed.
fn host_has(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    let extended_ecx = |bit: u32| __cpuid_count(0x8000_0001, 0).ecx & 1 << bit != 0;
    let leaf7_ebx = |bit: u32| __cpuid_count(7, 0).ebx & 1 << bit != 0;
    macro_rules! detected {
        ($name:tt) => {
            std::arch::is_x86_feature_detected!($name)
        };
    }
    match feature {
        // What every x86-64 processor has.
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CPUID => true,
        F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::FXSR | F::CMOV | F::CX8 => true,
        F::CLFSH | F::MULTIBYTENOP | F::PAUSE => true,
        F::SSE3 => detected!("sse3"),
        F::SSSE3 => detected!("ssse3"),
        F::SSE4_1 => detected!("sse4.1"),
        F::SSE4_2 => detected!("sse4.2"),
        F::SSE4A => detected!("sse4a"),
        F::POPCNT => detected!("popcnt"),
        F::LZCNT => detected!("lzcnt"),
        F::BMI1 => detected!("bmi1"),
        F::BMI2 => detected!("bmi2"),
        F::ADX => detected!("adx"),
        F::MOVBE => detected!("movbe"),
        F::CMPXCHG16B => detected!("cmpxchg16b"),
        F::AES => detected!("aes"),
        F::PCLMULQDQ => detected!("pclmulqdq"),
        F::SHA => detected!("sha"),
        F::GFNI => detected!("gfni"),
        F::VAES => detected!("vaes"),
        F::VPCLMULQDQ => detected!("vpclmulqdq"),
        F::AVX => detected!("avx"),
        F::AVX2 => detected!("avx2"),
        F::FMA => detected!("fma"),
        F::F16C => detected!("f16c"),
        F::AVX512F => detected!("avx512f"),
        F::AVX512VL => detected!("avx512vl"),
        F::AVX512BW => detected!("avx512bw"),
        F::AVX512DQ => detected!("avx512dq"),
        F::AVX512CD => detected!("avx512cd"),
        F::AVX512_BF16 => detected!("avx512bf16"),
        F::AVX512_BITALG => detected!("avx512bitalg"),
        F::AVX512_IFMA => detected!("avx512ifma"),
        F::AVX512_VBMI => detected!("avx512vbmi"),
        F::AVX512_VBMI2 => detected!("avx512vbmi2"),
        F::AVX512_VNNI => detected!("avx512vnni"),
        F::AVX512_VPOPCNTDQ => detected!("avx512vpopcntdq"),
        F::AVX_VNNI => detected!("avxvnni"),
        F::PREFETCHW => extended_ecx(8),
        F::CLFLUSHOPT => leaf7_ebx(23),
        F::CLWB => leaf7_ebx(24),
        _ => false,
    }
}
