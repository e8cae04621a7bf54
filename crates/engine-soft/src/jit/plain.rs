//! Integer instructions that are executed as they are, their operands put in place.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// Whether an instruction is executed as it is, where the host has it.
pub(super) fn is_plain(instruction: &Instruction) -> bool {
    same(instruction) && operands_fit(instruction)
}

/// Whether it does the same wherever its operands are: it touches general-purpose registers, arithmetic flags and at most
/// one operand in memory, and raises nothing but what the access raises.
fn same(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let register_bits = |i| instruction.op_kind(i) == OpKind::Register;
    match instruction.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Xchg | M::Movbe | M::Movnti => true,
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Xadd => true,
        M::Lfence | M::Mfence | M::Sfence => true,
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => true,
        M::Inc | M::Dec | M::Neg | M::Not | M::Imul | M::Mul => true,
        // The interpreter rotates by CL always, which leaves another OF (undefined for counts but 1) than a constant.
        M::Rcl | M::Rcr => instruction.op1_kind() == OpKind::Register || rotates_by_one(instruction.code()),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Shld | M::Shrd => true,
        // A bit number in a register reaches beyond the operand in memory.
        M::Bt | M::Bts | M::Btr | M::Btc => register_bits(0) || !register_bits(1),
        M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt | M::Crc32 => true,
        // Of 16 bits it is undefined; processors give zero, and so does the interpreter.
        M::Bswap => true,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => true,
        M::Lahf | M::Sahf | M::Cmc | M::Clc | M::Stc => true,
        M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx => true,
        M::Sarx | M::Shlx | M::Shrx | M::Adcx | M::Adox => true,
        _ => instruction.is_jcc_short_or_near() || is_conditional(instruction.mnemonic()),
    }
}

/// RCL and RCR in the forms without a count.
fn rotates_by_one(code: Code) -> bool {
    matches!(
        code,
        Code::Rcl_rm8_1
            | Code::Rcl_rm16_1
            | Code::Rcl_rm32_1
            | Code::Rcl_rm64_1
            | Code::Rcr_rm8_1
            | Code::Rcr_rm16_1
            | Code::Rcr_rm32_1
            | Code::Rcr_rm64_1
    )
}

/// SETcc and CMOVcc.
fn is_conditional(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
            | M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

/// General-purpose registers, constants, and memory of 1 to 16 bytes.
pub(super) fn operands_fit(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).all(|i| match instruction.op_kind(i) {
        OpKind::Register => instruction.op_register(i).is_gpr(),
        OpKind::Memory => {
            matches!(instruction.memory_size().size(), 1 | 2 | 4 | 8 | 16)
                && !instruction.memory_index().is_vector_register()
        }
        OpKind::FarBranch16 | OpKind::FarBranch32 => false,
        _ => true,
    })
}
