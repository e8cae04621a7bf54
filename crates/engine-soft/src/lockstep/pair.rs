//! The two machines, and how the same instructions run on both. What came of it is compared in [`verify`].

mod verify;

use std::sync::Arc;

use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::Exception;

use super::LockstepOptions;
use super::compare::Difference;
use super::journal::Journal;
use super::report::Before;
use super::shadow;
use super::world::{OwnWrites, PlayingTap, apply, executing};
use crate::engine::vcpu::{SoftVcpu, Taken};
use crate::interp::cpu::Cpu;
use crate::interp::event::{Source, TripleFault};
use crate::interp::op::RIP;
use crate::interp::run::Interpreter;
use crate::jit::{Jit, Next};
use crate::mmu::track::WrittenPage;
use ringfence_engine::Activity;

/// Runs of the translator without progress after which it is taken to be stuck.
const STUCK: u32 = 1000;

/// The machine that is compared with the interpreter's.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) interpreter: Interpreter,
    pub(super) jit: Jit,
}

/// What both are to execute.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// One instruction with what is to be looked at around it.
    Single,
    /// One translated region; where each of its instructions starts is in `Pair::starts`.
    Region(Next),
    /// So many instructions, or fewer.
    Free { limit: u64, one_block: bool },
}

/// Figures for `-v`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub(super) comparisons: u64,
    pub(super) pages: u64,
    pub(super) full: u64,
    /// Accessed bits taken over.
    pub(super) adopted: u64,
}

/// Why a pair does not go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// A triple fault of the guest's, on both.
    Fault(TripleFault),
    /// They have come apart; the report.
    Apart(Box<str>),
}

/// Both machines.
pub(super) struct Pair {
    /// The interpreter: it has the devices, the interrupts and the timers.
    pub(super) reference: SoftVcpu,
    pub(super) subject: Subject,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) shadow: Arc<GuestMemory>,
    pub(super) journal: Arc<Journal>,
    pub(super) tap: Arc<PlayingTap>,
    /// What the two write past their soft TLBs.
    pub(super) own: [Arc<OwnWrites>; 2],
    pub(super) options: LockstepOptions,
    pub(super) figures: Figures,
    /// Count of instructions at the last comparison of all memory.
    pub(super) compared: u64,
    before: Before,
    /// Where the blocks executed since then started.
    trail: Vec<u64>,
    starts: Vec<u64>,
    pages: Vec<GuestAddress>,
    opened: Vec<WrittenPage>,
    ranges: Vec<(GuestAddress, u64)>,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("subject", &self.subject).finish_non_exhaustive()
    }
}

/// What a [`Pair`] is made from.
pub(super) struct Parts {
    pub(super) reference: SoftVcpu,
    pub(super) subject: Subject,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) shadow: Arc<GuestMemory>,
    pub(super) journal: Arc<Journal>,
    pub(super) tap: Arc<PlayingTap>,
    pub(super) own: [Arc<OwnWrites>; 2],
}

impl Pair {
    pub(super) fn new(parts: Parts, options: LockstepOptions) -> Self {
        let Parts { reference, subject, memory, shadow, journal, tap, own } = parts;
        Self {
            reference,
            subject,
            memory,
            shadow,
            journal,
            tap,
            own,
            options,
            figures: Figures::default(),
            compared: 0,
            before: Before::default(),
            trail: Vec::new(),
            starts: Vec::new(),
            pages: Vec::new(),
            opened: Vec::new(),
            ranges: Vec::new(),
        }
    }

    pub(super) fn expected(&mut self) -> &mut Cpu {
        &mut self.reference.interpreter.cpu
    }

    /// Makes the second memory the same as the first, and forgets what was recorded: before a run after which anybody
    /// may have changed anything.
    pub(super) fn copy_memory(&mut self) {
        shadow::copy(&self.memory, &self.shadow);
        self.journal.clear();
        self.ranges.clear();
        for own in &self.own {
            own.take(&mut self.ranges);
        }
        self.ranges.clear();
    }

    /// Brings the second machine up to what has happened to the first between instructions: time that was skipped,
    /// memory that devices wrote, where the local APIC is.
    fn begin(&mut self) {
        self.catch_up();
        let cpu = &self.reference.interpreter.cpu;
        if let Some(apic) = &cpu.apic {
            self.tap.set_base((apic.apic_base(), apic.mmio_base()));
        }
        if self.shadow.a20_mask() != self.memory.a20_mask() {
            self.shadow.set_a20(self.memory.a20_mask() == u64::MAX);
            // The first machine did so at its OUT; the second's bus only plays back, and moves no gate.
            self.subject.interpreter.cpu.tlb.flush();
        }
        let now = cpu.clock.now();
        self.before = Before { regs: cpu.regs, rflags: cpu.rflags(), retired: cpu.retired };
        self.trail.clear();
        self.subject.interpreter.cpu.skip_to(now);
    }

    /// Applies what devices have done since the last turn, so that memory can be compared.
    fn catch_up(&mut self) {
        apply(&self.shadow, self.journal.leading_transfers());
    }

    /// Executes a little on both and compares, at most `left` instructions. True if the interpreter did a single step.
    pub(super) fn turn(&mut self, left: u64) -> Result<bool, Stop> {
        self.begin();
        let plan = executing(true, || self.plan(left));
        let expected = executing(true, || self.run_reference(plan));
        self.expected().vector.unit.park();
        self.open_pages();
        let found = executing(true, || self.run_subject(plan, expected));
        self.subject.interpreter.cpu.vector.unit.park();
        let mut apart = Vec::new();
        if expected != found {
            apart.push(Difference::new("outcome", outcome(expected), outcome(found)));
        }
        self.compare("in the code below", apart)?;
        if let Err(exception) = expected {
            self.reference.counters.exceptions += 1;
            self.deliver(&format!("in the delivery of {exception}"), |cpu| cpu.raise(exception))?;
        }
        Ok(matches!(plan, Plan::Single))
    }

    /// Has both CPUs do the same, and compares.
    fn deliver(
        &mut self,
        event: &str,
        act: impl Fn(&mut Cpu) -> Result<(), TripleFault>,
    ) -> Result<(), Stop> {
        let expected = executing(true, || act(&mut self.reference.interpreter.cpu));
        let found = executing(true, || act(&mut self.subject.interpreter.cpu));
        self.settle(event, expected, found)
    }

    fn settle(
        &mut self,
        event: &str,
        expected: Result<(), TripleFault>,
        found: Result<(), TripleFault>,
    ) -> Result<(), Stop> {
        self.expected().vector.unit.park();
        self.subject.interpreter.cpu.vector.unit.park();
        let mut apart = Vec::new();
        if expected != found {
            let text = |result: &Result<(), TripleFault>| match result {
                Ok(()) => "delivered".to_owned(),
                Err(fault) => fault.to_string(),
            };
            apart.push(Difference::new("delivery", text(&expected), text(&found)));
        }
        self.compare(event, apart)?;
        expected.map_err(Stop::Fault)
    }

    /// Takes interrupts that wait, on both, and compares if there were any.
    pub(super) fn take_events(&mut self) -> Result<(), Stop> {
        if self.reference.inbox.pending() == 0 {
            return Ok(());
        }
        self.begin();
        let mut taken = Vec::new();
        let expected = executing(true, || self.reference.take_events(&mut |what| taken.push(what)));
        if taken.is_empty() && expected.is_ok() {
            return Ok(());
        }
        let cpu = &mut self.subject.interpreter.cpu;
        let found = executing(true, || taken.iter().try_for_each(|what| repeat(cpu, *what)));
        self.settle(&format!("taking {taken:x?}"), expected, found)
    }

    /// What to execute next.
    fn plan(&mut self, left: u64) -> Plan {
        if self.expected().steps_singly() {
            return Plan::Single;
        }
        if let Some(limit) = self.options.batch {
            return Plan::Free { limit: left.min(limit.max(1)), one_block: false };
        }
        let free = Plan::Free { limit: left, one_block: true };
        let Subject { interpreter, jit } = &mut self.subject;
        // A fault of the fetch will come up again where it belongs.
        let Ok(Some(upcoming)) = jit.upcoming(&mut interpreter.cpu) else { return free };
        let next = upcoming.next();
        if next.count > left {
            return Plan::Free { limit: left, one_block: false };
        }
        let mut at = interpreter.cpu.regs[RIP];
        self.starts.clear();
        for length in upcoming.lengths() {
            self.starts.push(at);
            at = at.wrapping_add(u64::from(length));
        }
        Plan::Region(next)
    }

    /// The interpreter's part. Where it leaves the region's row of instructions it stops, as the translator's code does.
    fn run_reference(&mut self, plan: Plan) -> Result<(), Exception> {
        let interpreter = &mut self.reference.interpreter;
        let (limit, one_block, region) = match plan {
            Plan::Single => {
                self.trail.push(interpreter.cpu.fetch_address());
                return interpreter.single_step();
            }
            Plan::Region(next) => (next.count, false, true),
            Plan::Free { limit, one_block } => (limit, one_block, false),
        };
        loop {
            self.trail.push(interpreter.cpu.fetch_address());
            let done = interpreter.cpu.retired - self.before.retired;
            interpreter.run_block(usize::try_from(limit - done).unwrap_or(usize::MAX))?;
            let cpu = &interpreter.cpu;
            let done = cpu.retired - self.before.retired;
            // A store to code makes the interpreter leave where the translator need not, and the other way round.
            let left = cpu.leave_block && !cpu.stale.any();
            let astray = region && self.starts.get(done as usize).is_none_or(|&at| at != cpu.regs[RIP]);
            if done >= limit || one_block || left || astray || cpu.activity != Activity::Active {
                return Ok(());
            }
        }
    }

    /// The translator's part: as many instructions as the interpreter has done, and the exception behind them.
    fn run_subject(&mut self, plan: Plan, expected: Result<(), Exception>) -> Result<(), Exception> {
        let target = self.reference.interpreter.cpu.retired;
        let Subject { interpreter, jit } = &mut self.subject;
        match plan {
            Plan::Single => return interpreter.single_step(),
            Plan::Region(next) => jit.run_region(interpreter, next)?,
            Plan::Free { .. } => {}
        }
        let mut idle = 0;
        while interpreter.cpu.retired < target && idle < STUCK {
            let before = interpreter.cpu.retired;
            jit.run(interpreter, target - before)?;
            idle = if interpreter.cpu.retired == before { idle + 1 } else { 0 };
        }
        if expected.is_err() && interpreter.cpu.retired == target { jit.run(interpreter, 1) } else { Ok(()) }
    }

    /// Lets the translator's stores to pages that the interpreter has just written go the fast way from the first on.
    fn open_pages(&mut self) {
        self.opened.clear();
        if let Some(tracker) = &self.reference.interpreter.cpu.tracker {
            self.opened.extend_from_slice(tracker.pages());
        }
        for &page in &self.opened {
            self.subject.interpreter.cpu.open_for_writing(page);
        }
    }
}

fn outcome(result: Result<(), Exception>) -> String {
    result.map_or_else(|exception| exception.to_string(), |()| "no exception".to_owned())
}

/// What the interpreter's vCPU took, taken by the translator's.
fn repeat(cpu: &mut Cpu, what: Taken) -> Result<(), TripleFault> {
    match what {
        Taken::Init => cpu.init(),
        Taken::StartUp(page) => cpu.start_up(page),
        Taken::Nmi => return cpu.interrupt(2, Source::Nmi),
        Taken::PvEoiEnd => cpu.pv_eoi_end(),
        Taken::Interrupt(vector) => {
            cpu.interrupt(vector, Source::External)?;
            cpu.pv_eoi_begin();
        }
    }
    Ok(())
}
