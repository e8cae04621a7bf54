//! Debug registers, single-stepping and breakpoints (SDM 3B chapter 18).
//!
//! A run loop executes whole blocks only while nothing has to be looked at between instructions. When
//! [`Cpu::steps_singly`] says otherwise it executes by [`Interpreter::single_step`].

use iced_x86::{Code, Instruction};
use ringfence_memory::Scalar;
use ringfence_x86::{Cr4, Exception, Rflags};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op};
use crate::interp::run::Interpreter;

/// DR7: any access to a debug register faults.
const GENERAL_DETECT: u64 = 1 << 13;
/// Bits of DR6 that are always one, and those that software and the processor write.
const DR6_ONES: u64 = 0xffff_0ff0;
const DR6_BITS: u64 = 0xe00f;
/// Likewise of DR7.
const DR7_ONES: u64 = 0x400;
const DR7_BITS: u64 = 0xffff_23ff;

/// What a DR7 field watches for (SDM 3B 18.2.4).
mod condition {
    pub(super) const EXECUTION: u64 = 0;
    pub(super) const IO: u64 = 2;
}

impl Cpu {
    /// Whether something has to be looked at before or after every instruction: single-stepping, breakpoints, or an
    /// interrupt shadow that ends after one.
    #[inline(always)]
    pub fn steps_singly(&self) -> bool {
        self.flags.intersects(Rflags::TF | Rflags::RF)
            || self.dr7 & 0xff != 0
            || self.interrupt_shadow
            || self.system.pending_debug != 0
    }

    /// Fields 0 to 3 of DR7 that are enabled with a condition, as DR6 bits.
    fn armed(&self, wanted: u64) -> u16 {
        (0..4)
            .filter(|i| self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 == wanted)
            .fold(0, |bits, i| bits | 1 << i)
    }

    /// Instruction breakpoints at the next instruction, as DR6 bits.
    fn execution_breakpoints(&self) -> u16 {
        if self.dr7 & 0xff == 0 {
            return 0;
        }
        let at = self.fetch_address();
        let armed = self.armed(condition::EXECUTION);
        (0..4).filter(|&i| armed >> i & 1 != 0 && self.dr[i] == at).fold(0, |bits, i| bits | 1 << i)
    }

    /// Notes breakpoints on `size` ports from `port` (SDM 3B 18.2.4; CR4.DE must be set).
    pub(super) fn note_io_breakpoints(&mut self, port: u16, size: u64) {
        if self.dr7 & 0xff == 0 || !self.cr4.contains(Cr4::DE) {
            return;
        }
        let armed = self.armed(condition::IO);
        for i in 0..4 {
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let start = self.dr[i] & !(len - 1);
            let port = u64::from(port);
            if armed >> i & 1 != 0 && start < port + size && port < start + len {
                self.breakpoints_hit |= 1 << i;
            }
        }
    }

    /// What the delivery of a debug exception does to DR6 and DR7 (SDM 3B 18.2.3).
    pub(in crate::interp) fn record_debug(&mut self, causes: u16) {
        self.dr6 = self.dr6 & !0xf | u64::from(causes) & DR6_BITS | DR6_ONES;
        self.dr7 &= !GENERAL_DETECT;
    }

    /// Before an instruction. `Err` is the fault of an instruction breakpoint.
    fn begin_step(&mut self) -> Result<(), Exception> {
        let held = std::mem::take(&mut self.system.debug_shadow);
        let hit = self.execution_breakpoints();
        if hit != 0 && !held && !self.flags.contains(Rflags::RF) {
            return Err(Exception::debug(hit));
        }
        self.flags.remove(Rflags::RF);
        self.system.shadow_ends = std::mem::take(&mut self.interrupt_shadow);
        self.system.stepping = self.flags.contains(Rflags::TF);
        Ok(())
    }

    /// After an instruction that has completed. `Err` is the trap to be taken now.
    fn end_step(&mut self) -> Result<(), Exception> {
        // Interrupts that the shadow held off can be taken now.
        self.leave_block |= self.system.shadow_ends;
        if self.system.debug_shadow {
            // Traps of MOV SS come with the next instruction, its single-step trap not at all.
            return Ok(());
        }
        let mut causes = std::mem::take(&mut self.system.pending_debug);
        causes |= std::mem::take(&mut self.breakpoints_hit) as u16;
        if self.system.stepping {
            causes |= Exception::DEBUG_SINGLE_STEP;
        }
        if causes == 0 { Ok(()) } else { Err(Exception::debug(causes)) }
    }
}

impl Interpreter {
    /// Executes one instruction with everything that is to be looked at around it.
    ///
    /// # Errors
    /// The exception to be delivered at the present RIP: a fault of the instruction, or a debug trap behind it.
    pub fn single_step(&mut self) -> Result<(), Exception> {
        self.cpu.begin_step()?;
        self.step()?;
        self.cpu.end_step()
    }
}

/// Checks common to all accesses to debug registers; gives the number with DR4 and DR5 resolved.
fn check(cpu: &mut Cpu, number: u8) -> Result<usize, Exception> {
    let number = match number {
        4 | 5 if cpu.cr4.contains(Cr4::DE) => return Err(Exception::UD),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(Exception::UD),
    };
    cpu.require_cpl0()?;
    if cpu.dr7 & GENERAL_DETECT != 0 {
        return Err(Exception::debug(Exception::DEBUG_GENERAL_DETECT));
    }
    Ok(usize::from(number))
}

fn read_debug<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let value = match check(cpu, op.src)? {
        6 => cpu.dr6,
        7 => cpu.dr7,
        number => cpu.dr[number & 3],
    };
    cpu.set_reg(op.dst, T::truncate(value));
    Ok(())
}

fn write_debug<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let number = check(cpu, op.dst)?;
    let value = cpu.reg::<T>(op.src).widen();
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::GP0);
    }
    match number {
        6 => cpu.dr6 = value & DR6_BITS | DR6_ONES,
        7 => cpu.dr7 = value & DR7_BITS | DR7_ONES,
        number => cpu.dr[number & 3] = value,
    }
    cpu.update_class();
    cpu.leave_block = true;
    Ok(())
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Mov_r32_dr => read_debug::<u32>,
        Code::Mov_r64_dr => read_debug::<u64>,
        Code::Mov_dr_r32 => write_debug::<u32>,
        Code::Mov_dr_r64 => write_debug::<u64>,
        _ => return None,
    })
}
