//! What is translated at once: a run of instructions that leaves its page's bytes in order, past branches not taken.

use iced_x86::Instruction;
use ringfence_memory::GuestAddress;

use super::Options;
use super::flags::{self, Effect, Set};
use super::native::{Host, Kind, kind};
use crate::interp::cpu::Cpu;
use crate::interp::decode::{decode_run, undefined};
use crate::interp::op::{Handler, Op};

/// One instruction of a region.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) instruction: Instruction,
    pub(super) kind: Kind,
    pub(super) effect: Effect,
    /// Flags wanted behind it.
    pub(super) wanted: Set,
    /// Offset of the next instruction in the page; up to 0x1000 where the page ends.
    pub(super) next: u32,
}

/// A decoded region.
#[derive(Debug)]
pub(super) struct Source {
    /// Physical address of its first byte.
    pub(super) address: GuestAddress,
    pub(super) steps: Vec<Step>,
    /// The interpreter's operations, one for each step.
    pub(super) ops: Box<[Op]>,
    /// Length in bytes.
    pub(super) length: u32,
}

impl Source {
    /// Decodes the region that starts at `address`; `None` if its first instruction cannot be decoded within the page.
    ///
    /// With exact flags, every flag counts as looked at wherever the guest could be interrupted: an exception's frame shows
    /// them all. Otherwise flags that the guest's code will overwrite unread may be stale in such a frame.
    pub(super) fn decode(
        cpu: &mut Cpu,
        address: GuestAddress,
        host: &Host,
        options: &Options,
    ) -> Option<Self> {
        let (run, length) = decode_run(cpu, address, options.region);
        if run.is_empty() {
            return None;
        }
        let mut next = address.page_offset() as u32;
        let mut steps = Vec::with_capacity(run.len());
        let mut ops = Vec::with_capacity(run.len());
        for (instruction, op) in run {
            next += u32::from(op.length);
            // Nothing is native that the interpreter does not know.
            let known = !std::ptr::fn_addr_eq(op.handler, undefined as Handler);
            let kind = instruction.filter(|_| known).map_or(Kind::Interpreted, |i| kind(&i, host));
            let instruction = instruction.unwrap_or_default();
            let mut effect = match kind {
                // Whatever it is, it finds the flags in the vCPU and leaves them there.
                Kind::Interpreted => Effect { reads: flags::ALL, changes: flags::ALL, kills: flags::ALL },
                _ => flags::effect(&instruction),
            };
            if options.exact_flags && may_fault(&instruction, kind) {
                effect.reads = flags::ALL;
            }
            steps.push(Step { instruction, kind, effect, wanted: flags::ALL, next });
            ops.push(op);
        }
        let mut wanted = flags::ALL;
        for step in steps.iter_mut().rev() {
            if step.kind == Kind::Branch {
                // The other way out wants them all.
                wanted = flags::ALL;
            }
            step.wanted = wanted;
            wanted = step.effect.before(wanted);
        }
        Some(Self { address, steps, ops: ops.into(), length })
    }
}

fn may_fault(instruction: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Same => (0..instruction.op_count()).any(|i| instruction.op_kind(i) == iced_x86::OpKind::Memory),
        Kind::Address | Kind::Nothing | Kind::Jump | Kind::Branch => false,
        _ => true,
    }
}
