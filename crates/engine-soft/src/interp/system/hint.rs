//! Instructions that only order, hint or reserve: no-operations here, apart from the faults that they can raise; and
//! RDRAND and RDSEED.

use iced_x86::{Code, Instruction, Mnemonic};
use ringfence_memory::Scalar;
use ringfence_x86::{Exception, Rflags};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::status::Status;

fn nothing(_: &mut Cpu, _: &Op) -> Result<(), Exception> {
    Ok(())
}

/// Loads and stores of other vCPUs may be seen in any order that the host allows, which MFENCE ends.
fn fence(_: &mut Cpu, _: &Op) -> Result<(), Exception> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH and its kin fault as a load of one byte does (SDM 2A, CLFLUSH).
fn flush_line(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let linear = cpu.linear(op.segment, cpu.effective_address(op), 1, false)?;
    cpu.probe(op.segment, linear, 1, false)
}

fn serialize(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.leave_block = true;
    Ok(())
}

fn random<T: Scalar>(cpu: &mut Cpu, op: &Op, value: Option<u64>) -> Result<(), Exception> {
    cpu.set_reg(op.dst, T::truncate(value.unwrap_or(0)));
    let carry = if value.is_some() { Rflags::CF } else { Rflags::empty() };
    cpu.status = Status::from_rflags(carry.bits());
    Ok(())
}

fn rdrand<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.random_number();
    random::<T>(cpu, op, value)
}

fn rdseed<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = cpu.random_seed();
    random::<T>(cpu, op, value)
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match instruction.code() {
        Code::Rdrand_r16 => rdrand::<u16>,
        Code::Rdrand_r32 => rdrand::<u32>,
        Code::Rdrand_r64 => rdrand::<u64>,
        Code::Rdseed_r16 => rdseed::<u16>,
        Code::Rdseed_r32 => rdseed::<u32>,
        Code::Rdseed_r64 => rdseed::<u64>,
        _ => match instruction.mnemonic() {
            M::Nop
            | M::Pause
            | M::Reservednop
            | M::Endbr32
            | M::Endbr64
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote
            // Without shadow stacks these are no-operations too (SDM 2B, RDSSPD).
            | M::Rdsspd
            | M::Rdsspq => nothing,
            M::Lfence | M::Mfence | M::Sfence => fence,
            M::Clflush | M::Clflushopt | M::Clwb => flush_line,
            M::Serialize => serialize,
            _ => return None,
        },
    })
}
