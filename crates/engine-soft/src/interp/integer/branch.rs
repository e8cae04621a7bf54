//! Near branches: JMP, Jcc, CALL, RET, LOOP, JCXZ.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Exception, Gpr, SegmentRegister};

use super::operand::{Memory, Place, Register};
use crate::hostop::Int;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, RIP};

const RCX: usize = Gpr::Rcx as usize;

impl Cpu {
    /// Goes to `target` in the same code segment.
    ///
    /// # Errors
    /// #GP(0) if the target is outside the segment, or not canonical.
    #[inline(always)]
    pub fn jump(&mut self, target: u64) -> Result<(), Exception> {
        let valid = if self.is_64bit() {
            is_canonical(target)
        } else {
            target <= u64::from(self.segment(SegmentRegister::Cs).limit)
        };
        if !valid {
            return Err(Exception::GP0);
        }
        self.regs[RIP] = target;
        Ok(())
    }
}

/// The target of a relative branch, cut to the operand size.
#[inline(always)]
fn relative<T: Int>(cpu: &Cpu, op: &Op) -> u64 {
    T::truncate(cpu.regs[RIP].wrapping_add(op.immediate)).widen()
}

fn jmp_relative<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.jump(relative::<T>(cpu, op))
}

fn jcc<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    if cpu.status.condition(op.condition) { cpu.jump(relative::<T>(cpu, op)) } else { Ok(()) }
}

fn jmp_indirect<T: Int, S: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let target = S::read::<T>(cpu, op)?.widen();
    cpu.jump(target)
}

/// Pushes the return address and goes to `target`; nothing has changed if either faults.
#[inline(always)]
fn call<T: Int>(cpu: &mut Cpu, target: u64) -> Result<(), Exception> {
    let back = cpu.regs[RIP];
    if let Err(fault) = cpu.jump(target) {
        // Processors look at the stack first.
        cpu.probe_push(T::SIZE as u64)?;
        return Err(fault);
    }
    cpu.push(T::truncate(back))
}

fn call_relative<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    call::<T>(cpu, relative::<T>(cpu, op))
}

fn call_indirect<T: Int, S: Place>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let target = S::read::<T>(cpu, op)?.widen();
    call::<T>(cpu, target)
}

fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let target = cpu.peek::<T>(0)?.widen();
    cpu.jump(target)?;
    let released = T::SIZE as u64 + op.immediate;
    cpu.set_stack_pointer(cpu.stack_pointer().wrapping_add(released));
    Ok(())
}

/// The counter of LOOP and JCXZ is as wide as the address size.
#[inline(always)]
fn count<A: Int>(cpu: &Cpu) -> u64 {
    A::truncate(cpu.regs[RCX]).widen()
}

fn jcxz<A: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    if count::<A>(cpu) == 0 { cpu.jump(relative::<T>(cpu, op)) } else { Ok(()) }
}

/// LOOP, LOOPE, LOOPNE: `WANTED` is 2, or the value that ZF must have.
fn loop_<A: Int, T: Int, const WANTED: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let left = A::truncate(cpu.regs[RCX].wrapping_sub(1));
    let taken = left.widen() != 0 && (WANTED == 2 || cpu.status.zf() == (WANTED == 1));
    if taken {
        cpu.jump(relative::<T>(cpu, op))?;
    }
    cpu.set_reg(RCX as u8, left);
    Ok(())
}

macro_rules! branch_size {
    ($instruction:expr, $function:ident) => {
        match $instruction.op0_kind() {
            OpKind::NearBranch16 => Some($function::<u16> as Handler),
            OpKind::NearBranch32 => Some($function::<u32> as Handler),
            OpKind::NearBranch64 => Some($function::<u64> as Handler),
            _ => None,
        }
    };
}

macro_rules! indirect {
    ($instruction:expr, $function:ident) => {
        match ($instruction.code(), $instruction.op0_kind()) {
            (Code::Jmp_rm16 | Code::Call_rm16, OpKind::Register) => {
                Some($function::<u16, Register> as Handler)
            }
            (Code::Jmp_rm16 | Code::Call_rm16, _) => Some($function::<u16, Memory> as Handler),
            (Code::Jmp_rm32 | Code::Call_rm32, OpKind::Register) => {
                Some($function::<u32, Register> as Handler)
            }
            (Code::Jmp_rm32 | Code::Call_rm32, _) => Some($function::<u32, Memory> as Handler),
            (Code::Jmp_rm64 | Code::Call_rm64, OpKind::Register) => {
                Some($function::<u64, Register> as Handler)
            }
            (Code::Jmp_rm64 | Code::Call_rm64, _) => Some($function::<u64, Memory> as Handler),
            _ => None,
        }
    };
}

/// Counter width and target width of a LOOP or JCXZ form.
macro_rules! counted {
    ($code:expr, $function:ident $(, $wanted:literal)?) => {{
        use Code as C;
        match $code {
            C::Jcxz_rel8_16 | C::Loop_rel8_16_CX | C::Loope_rel8_16_CX | C::Loopne_rel8_16_CX =>
                Some($function::<u16, u16 $(, $wanted)?> as Handler),
            C::Jcxz_rel8_32 | C::Loop_rel8_32_CX | C::Loope_rel8_32_CX | C::Loopne_rel8_32_CX =>
                Some($function::<u16, u32 $(, $wanted)?> as Handler),
            C::Jecxz_rel8_16 | C::Loop_rel8_16_ECX | C::Loope_rel8_16_ECX | C::Loopne_rel8_16_ECX =>
                Some($function::<u32, u16 $(, $wanted)?> as Handler),
            C::Jecxz_rel8_32 | C::Loop_rel8_32_ECX | C::Loope_rel8_32_ECX | C::Loopne_rel8_32_ECX =>
                Some($function::<u32, u32 $(, $wanted)?> as Handler),
            C::Jecxz_rel8_64 | C::Loop_rel8_64_ECX | C::Loope_rel8_64_ECX | C::Loopne_rel8_64_ECX =>
                Some($function::<u32, u64 $(, $wanted)?> as Handler),
            C::Jrcxz_rel8_16 | C::Loop_rel8_16_RCX | C::Loope_rel8_16_RCX | C::Loopne_rel8_16_RCX =>
                Some($function::<u64, u16 $(, $wanted)?> as Handler),
            C::Jrcxz_rel8_64 | C::Loop_rel8_64_RCX | C::Loope_rel8_64_RCX | C::Loopne_rel8_64_RCX =>
                Some($function::<u64, u64 $(, $wanted)?> as Handler),
            _ => None,
        }
    }};
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let code = instruction.code();
    match instruction.mnemonic() {
        Mnemonic::Jmp => {
            indirect!(instruction, jmp_indirect).or_else(|| branch_size!(instruction, jmp_relative))
        }
        Mnemonic::Call => {
            indirect!(instruction, call_indirect).or_else(|| branch_size!(instruction, call_relative))
        }
        Mnemonic::Ret => match code {
            Code::Retnw | Code::Retnw_imm16 => Some(ret::<u16>),
            Code::Retnd | Code::Retnd_imm16 => Some(ret::<u32>),
            Code::Retnq | Code::Retnq_imm16 => Some(ret::<u64>),
            _ => None,
        },
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => counted!(code, jcxz),
        Mnemonic::Loop => counted!(code, loop_, 2),
        Mnemonic::Loope => counted!(code, loop_, 1),
        Mnemonic::Loopne => counted!(code, loop_, 0),
        _ if instruction.is_jcc_short_or_near() => branch_size!(instruction, jcc),
        _ => None,
    }
}
