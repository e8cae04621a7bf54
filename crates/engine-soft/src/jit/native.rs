//! Which instructions are translated, and how.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use super::plain::{is_plain, operands_fit};
use crate::interp::found::{counts_in_cx, is_counted};
use crate::vector::pass::{Elements, Level, Passed, moves_elements, passes, stores_masked_bytes};

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The same instruction with operands put in place.
    Same,
    /// As [`Kind::Same`], after a look at whether DIV would fault.
    Divide,
    /// As [`Kind::Same`], after a look at whether IDIV would fault.
    DivideSigned,
    /// A vector, x87 or MMX instruction as it is, with operands in general-purpose registers and memory put in place.
    Vector,
    /// A gather.
    Gather,
    /// A scatter.
    Scatter,
    /// A vector or MMX register's bytes to where RDI points, those that another selects.
    MaskedBytes,
    /// FLDCW, after a look at whether exceptions stay masked.
    LoadControl,
    /// LDMXCSR, after a look at reserved bits.
    LoadMxcsr,
    /// LEA.
    Address,
    /// PUSH of a register or constant.
    Push,
    /// PUSH of an operand in memory.
    PushMemory,
    /// PUSHFQ, or PUSHFD in 32-bit code.
    PushFlags,
    /// POPFQ, or POPFD in 32-bit code.
    PopFlags,
    /// CLI.
    ClearInterrupts,
    /// STI.
    SetInterrupts,
    /// CLAC.
    ClearAc,
    /// STAC.
    SetAc,
    /// SWAPGS.
    SwapGs,
    /// SYSCALL.
    SystemCall,
    /// SYSRET to 64-bit code.
    SystemReturn,
    /// SYSENTER.
    SystemEnter,
    /// SYSRET to 32-bit code.
    SystemReturnNarrow,
    /// INT n.
    SoftwareInterrupt,
    /// IRETQ.
    InterruptReturn,
    /// BT, BTS, BTR and BTC of a bit string in memory.
    BitString,
    /// POP of a register.
    Pop,
    /// POP to memory.
    PopMemory,
    /// STOS.
    StoreString,
    /// MOVS.
    MoveString,
    /// LODS.
    LoadString,
    /// SCAS.
    ScanString,
    /// CMPS.
    CompareString,
    /// CLD.
    ClearDirection,
    /// STD.
    SetDirection,
    /// XLAT.
    TranslateByte,
    /// A segment's selector to memory or a register.
    Selector,
    /// A control register to a register.
    ReadControl,
    /// RDTSC and RDTSCP.
    ReadTime,
    /// RDFSBASE and RDGSBASE.
    ReadBase,
    /// WRFSBASE and WRGSBASE of 64 bits.
    WriteBase,
    /// LEAVE.
    Leave,
    /// ENTER.
    Enter,
    /// PUSH of 16 bits, of a register or constant.
    PushWord,
    /// POP of 16 bits to a register.
    PopWord,
    /// RDPID.
    ReadProcessor,
    /// CLFLUSH, CLFLUSHOPT and CLWB.
    FlushLine,
    /// Nothing to do.
    Nothing,
    /// Relative JMP.
    Jump,
    /// Jcc, LOOP, LOOPE, LOOPNE, JECXZ and JRCXZ.
    Branch,
    /// Relative CALL.
    Call,
    /// JMP to an address from a register or memory.
    JumpIndirect,
    /// CALL of such.
    CallIndirect,
    /// RET.
    Return,
    /// By the interpreter's handler.
    Interpreted,
}

impl Kind {
    /// Whether it is a string instruction, which may be repeated.
    pub(super) fn is_string(self) -> bool {
        matches!(
            self,
            Self::StoreString | Self::MoveString | Self::LoadString | Self::ScanString | Self::CompareString
        )
    }

    /// Whether it is a branch or call to an address that the instruction names.
    #[inline(always)]
    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::Branch | Self::Jump | Self::Call)
    }
}

/// What the host's processor can execute of what is not in every 64-bit processor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    bmi1: bool,
    bmi2: bool,
    adx: bool,
    movbe: bool,
    lzcnt: bool,
    popcnt: bool,
    crc32: bool,
    avx2: bool,
    avx512vl: bool,
    /// LAHF and SAHF in 64-bit mode, without which flags could not be kept.
    pub(super) lahf: bool,
}

impl Host {
    /// Asks the processor.
    pub(super) fn detect() -> Self {
        Self {
            bmi1: is_x86_feature_detected!("bmi1"),
            bmi2: is_x86_feature_detected!("bmi2"),
            adx: is_x86_feature_detected!("adx"),
            movbe: is_x86_feature_detected!("movbe"),
            lzcnt: is_x86_feature_detected!("lzcnt"),
            popcnt: is_x86_feature_detected!("popcnt"),
            crc32: is_x86_feature_detected!("sse4.2"),
            avx2: is_x86_feature_detected!("avx2"),
            avx512vl: is_x86_feature_detected!("avx512vl"),
            // CPUID 8000_0001h:ECX bit 0 (APM 3 E.4.2).
            lahf: std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 != 0,
        }
    }

    /// Whether it has what gathers and scatters become, for those that want registers of `level`.
    fn moves_elements(&self, level: Option<Level>) -> bool {
        let vectors = if level == Some(Level::Avx512) { self.avx512vl } else { self.avx2 };
        vectors && self.bmi1
    }

    fn can(&self, mnemonic: Mnemonic) -> bool {
        use Mnemonic as M;
        match mnemonic {
            M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Tzcnt => self.bmi1,
            M::Bzhi | M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => self.bmi2,
            M::Adcx | M::Adox => self.adx,
            M::Movbe => self.movbe,
            M::Lzcnt => self.lzcnt,
            M::Popcnt => self.popcnt,
            M::Crc32 => self.crc32,
            _ => true,
        }
    }
}

/// How to translate an instruction of 64-bit code, or of 32-bit code in the terms of 64-bit code; for [`Kind::Vector`],
/// [`Kind::LoadControl`], [`Kind::LoadMxcsr`], [`Kind::Gather`], [`Kind::Scatter`] and [`Kind::MaskedBytes`], what it demands. It is the same for all of the same
/// form (see [`super::facts`]).
pub(super) fn kind(instruction: &Instruction, host: &Host) -> (Kind, Option<Passed>) {
    match (integer(instruction, host), passes(instruction)) {
        (Kind::Interpreted, Some(passed)) if instruction.mnemonic() == Mnemonic::Fldcw => {
            (Kind::LoadControl, Some(passed))
        }
        (Kind::Interpreted, Some(passed))
            if matches!(instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) =>
        {
            (Kind::LoadMxcsr, Some(passed))
        }
        (Kind::Interpreted, Some(passed)) => (Kind::Vector, Some(passed)),
        (Kind::Interpreted, None) => match moves_elements(instruction) {
            Some((elements, passed)) if host.moves_elements(passed.units.level) => {
                (if elements == Elements::Gathered { Kind::Gather } else { Kind::Scatter }, Some(passed))
            }
            Some(_) => (Kind::Interpreted, None),
            None => match stores_masked_bytes(instruction) {
                Some(passed) => (Kind::MaskedBytes, Some(passed)),
                None => (Kind::Interpreted, None),
            },
        },
        (kind, _) => (kind, None),
    }
}

fn integer(instruction: &Instruction, host: &Host) -> Kind {
    use Mnemonic as M;
    if !matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Kind::Interpreted;
    }
    match instruction.mnemonic() {
        M::Lea => Kind::Address,
        M::Push => push(instruction),
        M::Pop => match instruction.code() {
            Code::Pop_r64 | Code::Pop_rm64 | Code::Pop_r32 | Code::Pop_rm32
                if instruction.op0_kind() == OpKind::Register => Kind::Pop,
            Code::Pop_rm64 | Code::Pop_rm32 => Kind::PopMemory,
            Code::Pop_r16 | Code::Pop_rm16
                if instruction.op0_kind() == OpKind::Register => Kind::PopWord,
            _ => Kind::Interpreted,
        },
        M::Pushfq | M::Pushfd => Kind::PushFlags,
        M::Popfq | M::Popfd => Kind::PopFlags,
        M::Cli => Kind::ClearInterrupts,
        M::Sti => Kind::SetInterrupts,
        M::Clac => Kind::ClearAc,
        M::Stac => Kind::SetAc,
        M::Swapgs => Kind::SwapGs,
        M::Syscall => Kind::SystemCall,
        M::Sysretq => Kind::SystemReturn,
        M::Sysenter => Kind::SystemEnter,
        M::Sysret => Kind::SystemReturnNarrow,
        M::Int => Kind::SoftwareInterrupt,
        M::Iretq => Kind::InterruptReturn,
        M::Cld => Kind::ClearDirection,
        M::Std => Kind::SetDirection,
        M::Xlatb => Kind::TranslateByte,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::StoreString,
        M::Movsb | M::Movsw | M::Movsq => Kind::MoveString,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Kind::LoadString,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => Kind::ScanString,
        M::Cmpsb | M::Cmpsw | M::Cmpsq => Kind::CompareString,
        M::Movsd if instruction.is_string_instruction() => Kind::MoveString,
        M::Cmpsd if instruction.is_string_instruction() => Kind::CompareString,
        M::Mov
            if instruction.op1_kind() == OpKind::Register
                && instruction.op1_register().is_segment_register() =>
        {
            Kind::Selector
        }
        M::Mov if instruction.code() == Code::Mov_r64_cr => Kind::ReadControl,
        M::Rdtsc | M::Rdtscp => Kind::ReadTime,
        M::Rdpid => Kind::ReadProcessor,
        M::Clflush | M::Clflushopt | M::Clwb => Kind::FlushLine,
        M::Rdfsbase | M::Rdgsbase => Kind::ReadBase,
        M::Wrfsbase | M::Wrgsbase if instruction.op0_register().size() == 8 => Kind::WriteBase,
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register
                && instruction.op1_register().size() > 2 =>
        {
            Kind::BitString
        }
        M::Leave if matches!(instruction.code(), Code::Leaveq | Code::Leaved) => Kind::Leave,
        M::Enter if matches!(instruction.code(), Code::Enterq_imm16_imm8 | Code::Enterd_imm16_imm8) => {
            Kind::Enter
        }
        M::Nop
        | M::Pause
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote
        | M::Reservednop
        // Without shadow stacks these are nothing either (SDM 2B, RDSSPD).
        | M::Rdsspd
        | M::Rdsspq
        // Stores into code are found as they are done, so nothing waits for it.
        | M::Serialize => Kind::Nothing,
        M::Call | M::Jmp => transfer(instruction),
        M::Ret => match instruction.code() {
            Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16 => Kind::Return,
            _ => Kind::Interpreted,
        },
        M::Div if operands_fit(instruction) => Kind::Divide,
        M::Idiv if operands_fit(instruction) => Kind::DivideSigned,
        _ if is_counted(instruction) => match instruction.op0_kind() {
            OpKind::NearBranch64 => Kind::Branch,
            OpKind::NearBranch32 if !counts_in_cx(instruction) => Kind::Branch,
            _ => Kind::Interpreted,
        },
        _ if instruction.is_jcc_short_or_near() => match instruction.op0_kind() {
            OpKind::NearBranch64 | OpKind::NearBranch32 => Kind::Branch,
            _ => Kind::Interpreted,
        },
        mnemonic if host.can(mnemonic) && is_plain(instruction) => Kind::Same,
        _ => Kind::Interpreted,
    }
}

fn push(instruction: &Instruction) -> Kind {
    match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 | Code::Push_r32 | Code::Push_rm32
            if instruction.op0_kind() == OpKind::Register =>
        {
            Kind::Push
        }
        Code::Push_rm64 | Code::Push_rm32 => Kind::PushMemory,
        Code::Pushq_imm32 | Code::Pushq_imm8 | Code::Pushd_imm32 | Code::Pushd_imm8 => Kind::Push,
        Code::Push_r16 | Code::Push_rm16 if instruction.op0_kind() == OpKind::Register => Kind::PushWord,
        Code::Push_imm16 | Code::Pushw_imm8 => Kind::PushWord,
        _ => Kind::Interpreted,
    }
}

fn transfer(instruction: &Instruction) -> Kind {
    match (instruction.code(), instruction.op0_kind()) {
        (Code::Call_rm64 | Code::Call_rm32, _) => Kind::CallIndirect,
        (Code::Jmp_rm64 | Code::Jmp_rm32, _) => Kind::JumpIndirect,
        (Code::Call_rel32_64 | Code::Call_rel32_32, _) => Kind::Call,
        (Code::Jmp_rel32_64 | Code::Jmp_rel8_64 | Code::Jmp_rel32_32 | Code::Jmp_rel8_32, _) => Kind::Jump,
        _ => Kind::Interpreted,
    }
}
