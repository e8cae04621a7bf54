//! Which arithmetic flags an instruction reads and writes, and which are still wanted behind it.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// A set of the six arithmetic flags, in the decoder library's bits.
pub(super) type Set = u8;

/// All six.
pub(super) const ALL: Set =
    (RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF)
        as Set;

/// What one instruction does to the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Effect {
    /// Those it looks at.
    pub(super) reads: Set,
    /// Those it may change.
    pub(super) changes: Set,
    /// Those whose old values are gone behind it, whatever the operands are. A flag that the manual calls undefined
    /// is not among them: the processor may well leave it alone.
    pub(super) kills: Set,
}

/// What a natively translated instruction does.
pub(super) fn effect(instruction: &Instruction) -> Effect {
    use Mnemonic as M;
    let set = |bits: u32| bits as Set & ALL;
    if matches!(instruction.mnemonic(), M::Int | M::Syscall | M::Sysretq | M::Sysret | M::Sysenter | M::Iretq)
    {
        // They keep all of them for the other side, or replace all.
        return Effect { reads: ALL, changes: ALL, kills: ALL };
    }
    let reads = set(instruction.rflags_read());
    let changes = set(instruction.rflags_modified());
    let kills = match instruction.mnemonic() {
        // Every processor clears AF here, and the interpreter relies on it as well.
        M::And | M::Or | M::Xor | M::Test => ALL,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
            if may_shift_by_zero(instruction) =>
        {
            0
        }
        // Of none, they compare none.
        M::Scasb | M::Scasw | M::Scasd | M::Scasq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
            if instruction.has_rep_prefix() || instruction.has_repne_prefix() =>
        {
            0
        }
        _ => {
            set(instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set())
                & !set(instruction.rflags_undefined())
        }
    };
    Effect { reads, changes, kills }
}

/// Whether two instructions of the same form can differ in their effect: shifts and rotations by other counts do, and what may be repeated.
pub(super) fn depends_on_operands(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsd
            | M::Cmpsq
    )
}

/// A shift by zero changes no flag (SDM 2B, SAL/SAR/SHL/SHR), and a count in CL may be zero.
fn may_shift_by_zero(instruction: &Instruction) -> bool {
    let last = instruction.op_count() - 1;
    let count = match instruction.op_kind(last) {
        OpKind::Immediate8 => instruction.immediate8(),
        _ => 0,
    };
    let mask =
        if instruction.op0_register().size() == 8 || instruction.memory_size().size() == 8 { 63 } else { 31 };
    count & mask == 0
}

impl Effect {
    /// Those wanted before the instruction, given those wanted behind it.
    pub(super) fn before(self, after: Set) -> Set {
        after & !self.kills | self.reads
    }

    /// Whether the host's flags must hold the guest's when it executes.
    pub(super) fn needs_flags(self, after: Set) -> bool {
        self.reads != 0 || self.changes != 0 && after & !self.kills != 0
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Register};

    use super::*;

    fn shift(count: u32) -> Effect {
        effect(&Instruction::with2(Code::Shl_rm32_imm8, Register::EAX, count).expect("an instruction"))
    }

    #[test]
    fn shift_that_may_do_nothing_kills_no_flag() {
        assert_eq!(shift(32).kills, 0);
        assert_eq!(shift(3).kills, ALL & !(RflagsBits::AF | RflagsBits::OF) as Set);
        let by_cl =
            Instruction::with2(Code::Shl_rm32_CL, Register::EAX, Register::CL).expect("an instruction");
        assert_eq!(effect(&by_cl).kills, 0);
        assert!(effect(&by_cl).needs_flags(ALL));
        assert!(!effect(&by_cl).needs_flags(0));
    }

    #[test]
    fn increment_passes_carry_through() {
        let inc = effect(&Instruction::with1(Code::Inc_rm64, Register::RAX).expect("an instruction"));
        assert_eq!(inc.before(ALL), RflagsBits::CF as Set);
        assert!(inc.needs_flags(RflagsBits::CF as Set));
        assert!(!inc.needs_flags(RflagsBits::ZF as Set));
    }
}
