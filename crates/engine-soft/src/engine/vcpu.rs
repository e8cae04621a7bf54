//! A vCPU of the software engine: blocks, and between them interrupts, timers and what other threads want.

use std::sync::Arc;
use std::time::Duration;

use ringfence_engine::{
    Activity, ClockMode, CpuState, EngineError, GuestProfile, Kick, TimerQueue, Vcpu, VirtualTime, VmExit,
};
use ringfence_irqchip::{LapicInbox, LocalApic, pending};
use ringfence_x86::Rflags;

use super::sampler::Sampler;
use super::signal::Signal;
use crate::interp::cpu::{Connections, Cpu};
use crate::interp::event::{Source, TripleFault};
use crate::interp::run::Interpreter;
use crate::jit::{Jit, MAX_UNIT};

/// Instructions between two looks at the clock and at what waits: some 60 µs of translated code. Each costs about as much as a
/// thousand instructions, since code is then entered where no region starts.
const BATCH: u64 = 1 << 16;

/// One vCPU.
#[derive(Debug)]
pub(crate) struct SoftVcpu {
    pub(crate) interpreter: Interpreter,
    /// The translator, if the engine has one.
    jit: Option<Jit>,
    /// If a profile was asked for.
    sampler: Option<Sampler>,
    pub(crate) inbox: Arc<LapicInbox>,
    timers: Arc<TimerQueue>,
    pub(crate) signal: Arc<Signal>,
    pub(crate) counters: Counters,
}

/// What the vCPU has seen, for `-v`.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    interrupts: u64,
    pub(crate) exceptions: u64,
    halts: u64,
}

/// Something that a vCPU took, for whoever must do the same on another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// INIT.
    Init,
    /// A start-up IPI, to a page.
    StartUp(u8),
    /// An NMI.
    Nmi,
    /// The offer of KVM's PV EOI was taken back.
    PvEoiEnd,
    /// An interrupt.
    Interrupt(u8),
}

impl SoftVcpu {
    pub(super) fn new(
        connections: Connections,
        apic: LocalApic,
        timers: Arc<TimerQueue>,
        jit: Option<Jit>,
    ) -> Result<Self, EngineError> {
        let signal = Arc::new(Signal::default());
        let inbox = Arc::clone(apic.inbox());
        let bell = Arc::clone(&signal);
        inbox.set_waker(move || bell.ring());
        let bell = Arc::clone(&signal);
        timers.set_waker(move || bell.ring());
        let mut cpu = Cpu::new(connections)?;
        cpu.connect_apic(apic);
        cpu.translated.delivers = jit.is_some();
        let interpreter = Interpreter::new(cpu);
        let sampler = jit.as_ref().is_some_and(Jit::profiles).then(Sampler::new);
        Ok(Self { interpreter, jit, sampler, inbox, timers, signal, counters: Counters::default() })
    }

    fn cpu(&mut self) -> &mut Cpu {
        &mut self.interpreter.cpu
    }

    /// Asks the local APIC, which every vCPU of a machine has.
    pub(crate) fn apic<T: Default>(&mut self, ask: impl FnOnce(&mut LocalApic) -> T) -> T {
        self.interpreter.cpu.apic.as_mut().map(ask).unwrap_or_default()
    }

    /// Runs timers that are due: the devices' and the local APIC's.
    pub(crate) fn run_timers(&mut self) {
        self.cpu().sync_clock();
        let now = self.cpu().clock.now();
        if self.timers.next_deadline() <= now {
            self.timers.run_due(now);
        }
        self.apic(|apic| {
            if apic.next_deadline() <= now {
                apic.run_timer(now);
            }
        });
    }

    /// When a timer is due next.
    fn next_deadline(&mut self) -> VirtualTime {
        let apic = self.interpreter.cpu.apic.as_ref().map_or(VirtualTime::NEVER, LocalApic::next_deadline);
        self.timers.next_deadline().min(apic)
    }

    /// Takes what waits for the CPU, in the order of SDM 3A table 6-2; `told` hears of each before it is done.
    pub(crate) fn take_events(&mut self, told: &mut dyn FnMut(Taken)) -> Result<(), TripleFault> {
        if self.inbox.pending() == 0 {
            return Ok(());
        }
        if self.apic(LocalApic::take_init) {
            told(Taken::Init);
            self.cpu().init();
        }
        let start_up = self.apic(LocalApic::take_sipi);
        if self.cpu().activity == Activity::WaitForSipi {
            if let Some(page) = start_up {
                told(Taken::StartUp(page));
                self.cpu().start_up(page);
            }
            return Ok(());
        }
        if self.cpu().interrupt_shadow {
            return Ok(());
        }
        if !self.cpu().nmi_masked && self.apic(LocalApic::take_nmi) {
            told(Taken::Nmi);
            self.counters.interrupts += 1;
            return self.cpu().interrupt(2, Source::Nmi);
        }
        if !self.cpu().flags.contains(Rflags::IF) {
            return Ok(());
        }
        told(Taken::PvEoiEnd);
        self.cpu().pv_eoi_end();
        let waiting = |apic: &mut LocalApic| apic.pending_interrupt().map(|_| apic.acknowledge());
        let Some(vector) = self.apic(waiting) else { return Ok(()) };
        told(Taken::Interrupt(vector));
        let cpu = &mut self.interpreter.cpu;
        self.counters.interrupts += 1;
        cpu.interrupt(vector, Source::External)?;
        cpu.pv_eoi_begin();
        Ok(())
    }

    /// Executes until somebody rings, a timer may be due, or an interrupt can be taken.
    fn execute(&mut self) -> Result<(), TripleFault> {
        let mut batch = self.batch();
        if let Some(sampler) = &self.sampler {
            batch = batch.min(sampler.left(&self.interpreter.cpu));
        }
        let end = self.cpu().retired + batch;
        // Translated code stops a little before the end. Where the end means nothing, the rest is not interpreted.
        let exact =
            self.jit.is_none() || self.sampler.is_some() || self.cpu().clock.mode() == ClockMode::Counted;
        let enough = if exact { 1 } else { MAX_UNIT };
        while !self.signal.rung() {
            let cpu = &mut self.interpreter.cpu;
            let left = end.saturating_sub(cpu.retired);
            if left < enough {
                break;
            }
            let single = cpu.steps_singly();
            let result = if single {
                self.interpreter.single_step()
            } else if let Some(jit) = &mut self.jit {
                jit.run(&mut self.interpreter, left)
            } else {
                self.interpreter.run_block(usize::try_from(left).unwrap_or(usize::MAX))
            };
            let cpu = &mut self.interpreter.cpu;
            if let Err(exception) = result {
                self.counters.exceptions += 1;
                cpu.raise(exception)?;
            }
            // An interrupt shadow ends after a single step, whatever the instruction was.
            let look = cpu.leave_block || single;
            if look && (cpu.activity != Activity::Active || self.inbox.pending() != 0) {
                break;
            }
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.look(&self.interpreter.cpu);
        }
        Ok(())
    }

    /// How many instructions may run before timers must be looked at: in counted mode exactly up to the next deadline.
    pub(crate) fn batch(&mut self) -> u64 {
        if self.cpu().clock.mode() == ClockMode::Host {
            return BATCH;
        }
        let deadline = self.next_deadline();
        deadline.since(self.interpreter.cpu.clock.now()).clamp(1, BATCH)
    }

    /// Sleeps in HLT, or waiting for a start-up IPI, until something may have happened. In counted mode the idle time
    /// is skipped instead.
    pub(crate) fn idle(&mut self) {
        self.counters.halts += 1;
        let deadline = self.next_deadline();
        let now = self.cpu().clock.now();
        if deadline == VirtualTime::NEVER {
            self.signal.sleep(None);
        } else if self.cpu().clock.mode() == ClockMode::Counted {
            self.cpu().skip_to(deadline);
        } else if deadline > now {
            self.signal.sleep(Some(Duration::from_nanos(deadline.since(now))));
        }
    }

    /// Nothing waits, and nothing will come, that RFLAGS.IF does not hold off.
    pub(crate) fn nothing_unmaskable(&self) -> bool {
        self.inbox.pending() & !pending::INTERRUPT == 0 && !self.timers.holds_vital()
    }

    /// The loop behind [`Vcpu::run`].
    fn run_until_exit(&mut self) -> Result<VmExit, TripleFault> {
        loop {
            self.signal.answer();
            if self.signal.take_kick() {
                return Ok(VmExit::Kicked);
            }
            self.run_timers();
            self.take_events(&mut |_| ())?;
            let activity = self.interpreter.cpu.activity;
            match activity {
                Activity::Active => self.execute()?,
                Activity::Halted
                    if !self.interpreter.cpu.flags.contains(Rflags::IF) && self.nothing_unmaskable() =>
                {
                    return Ok(VmExit::HaltedForGood);
                }
                Activity::Halted | Activity::WaitForSipi => self.idle(),
                Activity::Shutdown => {
                    let before = || VmExit::Shutdown("the CPU had shut down before".to_owned());
                    return self.cpu().take_shutdown().map_or_else(|| Ok(before()), Err);
                }
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> VmExit {
        self.apic(LocalApic::unpark);
        let exit = self.run_until_exit().unwrap_or_else(|fault| {
            self.cpu().activity = Activity::Shutdown;
            VmExit::Shutdown(fault.to_string())
        });
        self.apic(|apic| apic.park());
        // The x87 state may be in this thread's registers; the next run may be on another thread.
        self.cpu().vector.unit.park();
        exit
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.signal) as _
    }

    fn state(&self) -> CpuState {
        self.interpreter.cpu.save_state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu().load_state(state)
    }

    fn reset(&mut self) {
        self.cpu().reset();
        self.interpreter.blocks.clear();
        if let Some(jit) = &mut self.jit {
            jit.clear();
        }
    }

    fn instructions(&self) -> u64 {
        self.interpreter.cpu.retired
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Interpreter { cpu, blocks } = &self.interpreter;
        let mut counters = vec![
            ("instructions", cpu.retired),
            ("blocks decoded", blocks.decoded),
            ("blocks invalidated", blocks.invalidated),
            ("interrupts", self.counters.interrupts),
            ("exceptions", self.counters.exceptions + cpu.translated.delivered),
            ("halts", self.counters.halts),
            ("soft TLB flushes", cpu.tlb.counters.flushes),
            ("soft TLB page flushes", cpu.tlb.counters.page_flushes),
            ("soft TLB address spaces kept", cpu.tlb.counters.kept),
            ("soft TLB code generations", u64::from(cpu.tlb.generations_made())),
            ("soft TLB fills", cpu.tlb.counters.fills),
            ("soft TLB fetch fills", cpu.tlb.counters.fetch_fills),
        ];
        if let Some(jit) = &self.jit {
            counters.extend(jit.counters(cpu));
        }
        counters
    }

    fn profile(&self) -> Option<GuestProfile> {
        let cpu = &self.interpreter.cpu;
        self.sampler.as_ref().map(|sampler| sampler.profile(cpu, crate::jit::handed(cpu)))
    }
}
