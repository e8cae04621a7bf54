//! Changes that happen as a whole or not at all.

use ringfence_x86::segment::Segment;
use ringfence_x86::{Exception, Gpr, Rflags};

use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;

const RSP: usize = Gpr::Rsp as usize;

/// What a transfer of control changes, apart from memory.
struct Saved {
    rip: u64,
    rsp: u64,
    flags: Rflags,
    segments: [Segment; 6],
    cpl: u8,
}

impl Cpu {
    /// Does `change`, and takes back what it did to the program's registers if it fails. Pushes that it made stay
    /// below the stack pointer, as on hardware.
    ///
    /// A task switch cannot be taken back once the new task's state is loaded: its faults belong to the new task
    /// (SDM 3A 7.3). [`super::System::task_switched`] is set then.
    ///
    /// # Errors
    /// That of `change`.
    pub(in crate::interp) fn transact<T>(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<T, Exception>,
    ) -> Result<T, Exception> {
        let saved = Saved {
            rip: self.regs[RIP],
            rsp: self.regs[RSP],
            flags: self.flags,
            segments: self.segments,
            cpl: self.cpl,
        };
        let result = change(self);
        if result.is_err() && !self.system.task_switched {
            self.regs[RIP] = saved.rip;
            self.regs[RSP] = saved.rsp;
            self.flags = saved.flags;
            self.segments = saved.segments;
            self.cpl = saved.cpl;
            self.update_mode();
        }
        result
    }
}
