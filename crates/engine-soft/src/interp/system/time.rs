//! The time-stamp counter and its kin (SDM 3B 17.17; 2B RDTSC, RDTSCP, RDPID, RDPMC).

use iced_x86::{Code, Instruction, Mnemonic};
use ringfence_memory::Scalar;
use ringfence_x86::{Cr4, Exception, msr};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};

impl Cpu {
    /// How far the guest's time-stamp counter is ahead of the clock's, modulo 2^64: IA32_TSC_ADJUST, to which writes of
    /// the counter itself add (SDM 3B 17.17.3).
    pub fn tsc_offset(&self) -> u64 {
        self.stored_msr(msr::TSC_ADJUST)
    }

    /// The guest's time-stamp counter.
    pub fn guest_tsc(&self) -> u64 {
        self.sync_clock();
        self.clock.tsc().wrapping_add(self.tsc_offset())
    }
}

fn require_tsc(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4.contains(Cr4::TSD) && cpu.cpl > 0 { Err(Exception::GP0) } else { Ok(()) }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    require_tsc(cpu)?;
    cpu.set_edx_eax(cpu.guest_tsc());
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    rdtsc(cpu, op)?;
    cpu.regs[1] = cpu.stored_msr(msr::TSC_AUX) & 0xffff_ffff;
    Ok(())
}

fn rdpid<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.set_reg(op.dst, T::truncate(cpu.stored_msr(msr::TSC_AUX)));
    Ok(())
}

/// There are no performance counters: every index is out of range.
fn rdpmc(_: &mut Cpu, _: &Op) -> Result<(), Exception> {
    Err(Exception::GP0)
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Rdpid_r32 => rdpid::<u32>,
        Code::Rdpid_r64 => rdpid::<u64>,
        _ => match instruction.mnemonic() {
            Mnemonic::Rdtsc => rdtsc,
            Mnemonic::Rdtscp => rdtscp,
            Mnemonic::Rdpmc => rdpmc,
            _ => return None,
        },
    })
}
