//! The vCPU of lock-step: the interpreter's outer loop, with every step done twice.

use std::sync::Arc;

use ringfence_engine::{Activity, CpuState, EngineError, Kick, Vcpu, VmExit};
use ringfence_irqchip::LocalApic;
use ringfence_x86::Rflags;

use super::pair::{Pair, Stop};

/// One vCPU, twice.
#[derive(Debug)]
pub(super) struct LockstepVcpu {
    pub(super) pair: Pair,
    /// The memories may differ, since others can have changed the first one.
    stale: bool,
    /// The report with which the two came apart; there is no going on from there.
    apart: Option<Box<str>>,
}

impl LockstepVcpu {
    pub(super) fn new(pair: Pair) -> Self {
        Self { pair, stale: true, apart: None }
    }

    /// Executes until somebody rings, a timer may be due, or an interrupt can be taken.
    fn execute(&mut self) -> Result<(), Stop> {
        let pair = &mut self.pair;
        let end = pair.expected().retired + pair.reference.batch();
        while !pair.reference.signal.rung() {
            let left = end.saturating_sub(pair.expected().retired);
            if left == 0 {
                break;
            }
            let single = pair.turn(left)?;
            let cpu = &pair.reference.interpreter.cpu;
            let look = cpu.leave_block || single;
            if look && (cpu.activity != Activity::Active || pair.reference.inbox.pending() != 0) {
                break;
            }
        }
        Ok(())
    }

    fn run_until_exit(&mut self) -> Result<VmExit, Stop> {
        loop {
            let reference = &mut self.pair.reference;
            reference.signal.answer();
            if reference.signal.take_kick() {
                return Ok(VmExit::Kicked);
            }
            reference.run_timers();
            self.pair.take_events()?;
            let reference = &mut self.pair.reference;
            let deaf = !reference.interpreter.cpu.flags.contains(Rflags::IF);
            match reference.interpreter.cpu.activity {
                Activity::Active => self.execute()?,
                Activity::Halted if deaf && reference.nothing_unmaskable() => {
                    return Ok(VmExit::HaltedForGood);
                }
                Activity::Halted | Activity::WaitForSipi => reference.idle(),
                Activity::Shutdown => {
                    let before = || VmExit::Shutdown("the CPU had shut down before".to_owned());
                    let fault = reference.interpreter.cpu.take_shutdown();
                    return fault.map_or_else(|| Ok(before()), |f| Err(Stop::Fault(f)));
                }
            }
        }
    }

    /// Compares all memory at the end of a run.
    fn conclude(&mut self) -> Result<(), Stop> {
        let done = self.pair.compared == self.pair.expected().retired;
        if done { Ok(()) } else { self.pair.compare_all() }
    }
}

impl Vcpu for LockstepVcpu {
    fn run(&mut self) -> VmExit {
        if let Some(report) = &self.apart {
            return VmExit::Internal(report.to_string());
        }
        if std::mem::take(&mut self.stale) {
            self.pair.copy_memory();
        }
        self.pair.reference.apic(LocalApic::unpark);
        let outcome = self.run_until_exit();
        let exit = match outcome.and_then(|exit| self.conclude().map(|()| exit)) {
            Ok(exit) => exit,
            Err(Stop::Fault(fault)) => {
                self.pair.expected().activity = Activity::Shutdown;
                self.pair.subject.interpreter.cpu.activity = Activity::Shutdown;
                VmExit::Shutdown(fault.to_string())
            }
            Err(Stop::Apart(report)) => {
                let text = report.to_string();
                self.apart = Some(report);
                VmExit::Internal(text)
            }
        };
        self.pair.reference.apic(|apic| apic.park());
        exit
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.pair.reference.kick()
    }

    fn state(&self) -> CpuState {
        self.pair.reference.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        // Loading a state reads memory (page-directory pointers).
        self.pair.copy_memory();
        self.stale = true;
        self.pair.reference.set_state(state)?;
        self.pair.subject.interpreter.cpu.load_state(state)
    }

    fn reset(&mut self) {
        self.stale = true;
        self.apart = None;
        self.pair.reference.reset();
        let subject = &mut self.pair.subject;
        subject.interpreter.cpu.reset();
        subject.interpreter.blocks.clear();
        subject.jit.clear();
    }

    fn instructions(&self) -> u64 {
        self.pair.reference.instructions()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let figures = &self.pair.figures;
        let mut counters = self.pair.reference.counters();
        counters.extend(self.pair.subject.jit.counters(&self.pair.subject.interpreter.cpu));
        counters.extend([
            ("comparisons of the two", figures.comparisons),
            ("written pages compared", figures.pages),
            ("comparisons of all memory", figures.full),
            ("accessed bits that differed, taken over", figures.adopted),
        ]);
        counters
    }
}
