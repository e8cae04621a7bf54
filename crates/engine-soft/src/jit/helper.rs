//! The one function that translated code calls: it runs an instruction's handler.

use ringfence_x86::Rflags;

use super::stubs::reason;
use crate::interp::cpu::{CodeSize, Cpu};
use crate::interp::op::{Op, RIP};

/// What the function must know of an instruction besides its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Offset in the page of the instruction behind it, up to 0x1fff.
    pub(super) next: u32,
    /// Instructions of the region behind it.
    pub(super) behind: u32,
    /// The region ends with it: it may have gone anywhere and changed any mode.
    pub(super) ends: bool,
}

impl Mark {
    /// As a number for a register.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.next | self.behind << 16 | u32::from(self.ends) << 31)
    }

    fn unpack(value: u64) -> Self {
        let value = value as u32;
        Self { next: value & 0xffff, behind: value >> 16 & 0x7fff, ends: value >> 31 != 0 }
    }
}

/// Runs an operation's handler with the guest's registers in the vCPU and says whether translated code goes on.
/// A panic in a handler ends the process: it cannot unwind through translated code.
///
/// # Safety
/// Called from translated code only: `cpu` is the vCPU that was entered and not otherwise borrowed, `op` one of the
/// operations that its regions own.
pub(super) unsafe extern "sysv64" fn interpret(cpu: *mut Cpu, op: *const Op, mark: u64) -> u64 {
    // SAFETY: the caller's promise.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    let mark = Mark::unpack(mark);
    let next = cpu.translated.page.wrapping_add(u64::from(mark.next));
    cpu.regs[RIP] = next;
    cpu.translated.interpreted += 1;
    let after = cpu.translated.budget + i64::from(mark.behind);
    cpu.retired = cpu.translated.end.wrapping_sub(after as u64).wrapping_sub(1);
    if let Err(exception) = (op.handler)(cpu, op) {
        cpu.regs[RIP] = next.wrapping_sub(u64::from(op.length));
        cpu.translated.budget = after + 1;
        cpu.translated.exception = Some(exception);
        return reason::FAULT;
    }
    if cpu.leave_block || mark.ends && must_leave(cpu) {
        cpu.translated.budget = after;
        return reason::LEAVE;
    }
    reason::CONTINUE
}

/// Whether an instruction that may change anything did change what jump targets or the run loop depend on.
fn must_leave(cpu: &Cpu) -> bool {
    cpu.code_size != CodeSize::Bits64
        || cpu.translated.context != cpu.jump_context()
        || cpu.flags.intersects(Rflags::TF | Rflags::RF)
        || cpu.interrupt_shadow
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_round_trips() {
        for mark in [Mark { next: 0x100e, behind: 63, ends: false }, Mark { next: 0, behind: 0, ends: true }]
        {
            assert_eq!(Mark::unpack(mark.pack()), mark);
        }
    }
}
