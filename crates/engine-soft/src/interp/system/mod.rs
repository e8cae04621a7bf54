//! System instructions: segments, far transfers, control and debug registers, MSRs, I/O, and what belongs to
//! interrupts, time and identification.

pub mod apic_hooks;
mod control;
mod cpuid;
pub mod debug;
pub(crate) mod descriptor;
mod far;
mod flags;
mod hint;
mod io;
mod iret;
pub mod kvm;
mod msr;
mod mtrr;
mod random;
pub(crate) mod segment;
pub(crate) mod syscall;
pub(super) mod task;
#[cfg(test)]
mod tests;
mod time;
mod transaction;

use iced_x86::Instruction;
use ringfence_engine::Activity;

use super::event::TripleFault;
use super::op::Handler;

/// What system instructions keep beside the architectural registers.
#[derive(Debug, PartialEq, Eq)]
pub struct System {
    /// Debug traps are held off until after the next instruction (MOV SS, POP SS).
    pub(super) debug_shadow: bool,
    /// The instruction under way started with RFLAGS.TF set, and nothing has taken its single-step trap away.
    pub(super) stepping: bool,
    /// The instruction under way is the last one that an interrupt shadow covers.
    pub(super) shadow_ends: bool,
    /// A task switch has passed the point of no return.
    pub(super) task_switched: bool,
    /// Debug traps to come after this instruction, as DR6 bits, that no register watches for.
    pub(super) pending_debug: u16,
    /// Set with `Activity::Shutdown`: why.
    pub(super) shutdown: Option<TripleFault>,
    /// The guest may end the interrupt in service by clearing a bit in memory.
    pub(super) pv_eoi: bool,
    /// State of the generator behind RDRAND in counted mode.
    pub(super) random: u64,
}

impl Default for System {
    fn default() -> Self {
        Self {
            debug_shadow: false,
            stepping: false,
            shadow_ends: false,
            task_switched: false,
            pending_debug: 0,
            shutdown: None,
            pv_eoi: false,
            random: random::SEED,
        }
    }
}

impl super::cpu::Cpu {
    /// Shuts the processor down by a triple fault that an instruction has run into.
    pub(crate) fn shut_down(&mut self, fault: TripleFault) {
        self.system.shutdown = Some(fault);
        self.activity = Activity::Shutdown;
        self.leave_block = true;
    }

    /// With `Activity::Shutdown`: the triple fault that an instruction ran into, if it was one.
    pub fn take_shutdown(&mut self) -> Option<TripleFault> {
        self.system.shutdown.take()
    }
}

/// The families, in the order in which they are asked.
const FAMILIES: [fn(&Instruction) -> Option<Handler>; 13] = [
    segment::handler,
    far::handler,
    iret::handler,
    syscall::handler,
    flags::handler,
    control::handler,
    debug::handler,
    msr::handler,
    io::handler,
    time::handler,
    cpuid::handler,
    kvm::handler,
    hint::handler,
];

/// The handler for a system instruction.
pub fn handler(instruction: &Instruction) -> Option<Handler> {
    FAMILIES.iter().find_map(|family| family(instruction))
}
