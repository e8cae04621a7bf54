//! Lock-step: interpreter and translator run the same guest on separate memory, and the first difference stops them.
//!
//! There are two machines of one CPU each. The interpreter's has the memory that devices know, the bus, the interrupt
//! controllers and the timers; it goes first. The translator's has a memory of its own and no devices: it follows, over
//! the same number of instructions. Time is counted, so both see the same.
//!
//! * What the interpreter's CPU asks of devices and of its local APIC is recorded and played back to the translator's,
//!   which must ask for the same ([`journal`], [`world`]). What devices write to memory is played back behind the access
//!   that made them do it.
//! * Interrupts and exceptions are delivered to both, at the same count of instructions ([`pair`]).
//! * After every turn all registers are compared ([`compare`]) and all memory that either side has written. Which
//!   that is, is known exactly: soft TLBs hold write entries only for pages written in the same turn
//!   ([`crate::mmu::track`]). Entries for pages that the interpreter has just written are given to the translator's CPU
//!   beforehand, so that its stores take the same way as in an ordinary run.
//! * All of memory is compared now and then, and at the end ([`shadow`]): belt and braces.
//!
//! A turn is one translated region, left to Rust at its end; or, with [`LockstepOptions::batch`], up to so many
//! instructions, in which regions lead to one another as they always do.
//!
//! What the guest has not looked at can differ without being wrong: so the translator keeps all arithmetic flags exact
//! ([`crate::jit::Options::exact_flags`]).

mod compare;
mod journal;
mod pair;
mod report;
mod shadow;
#[cfg(test)]
mod tests;
mod vcpu;
mod world;

use std::sync::{Arc, Mutex};

use ringfence_engine::{
    Bus, ClockMode, Engine, EngineError, InterruptSink, Placement, SavedState, StateError, Vcpu,
    VirtualClock, Vm, VmConfig,
};
use ringfence_memory::GuestMemory;

use crate::code::CodeMap;
use crate::engine::SoftVm;
use crate::interp::cpu::{Connections, Cpu};
use crate::interp::run::Interpreter;
use crate::jit::{Jit, Options};
use journal::Journal;
use pair::{Pair, Parts, Subject};
use world::{Listener, OwnWrites, PlayingBus, PlayingTap, Recorder, RecordingBus, RecordingTap};

const NAME: &str = "lockstep";

/// How often to compare what.
#[derive(Clone, Copy, Debug)]
pub struct LockstepOptions {
    /// Instructions between two comparisons, at most; `None`: one translated region.
    pub batch: Option<u64>,
    /// Instructions between two comparisons of all memory.
    pub full: u64,
    /// What the translator may do. Its flags are exact whatever this says.
    pub jit: Options,
}

impl Default for LockstepOptions {
    fn default() -> Self {
        // Every block is translated when it is first met, so that all of them are compared.
        Self { batch: None, full: 1 << 28, jit: Options { threshold: 1, ..Options::default() } }
    }
}

/// Interpreter and translator side by side.
#[derive(Clone, Copy, Debug, Default)]
pub struct LockstepEngine {
    /// How often to compare what.
    pub options: LockstepOptions,
}

impl Engine for LockstepEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn create_vm(&self, config: VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        if config.clock.mode() != ClockMode::Counted {
            let what = "time of the host's; it needs time that follows the count of instructions".to_owned();
            return Err(EngineError::Unsupported { engine: NAME, what });
        }
        Ok(Box::new(LockstepVm::new(config, self.options)?))
    }
}

/// A virtual machine of lock-step: the interpreter's, and the memory of the other.
#[derive(Debug)]
pub(crate) struct LockstepVm {
    vm: SoftVm,
    shadow: Arc<GuestMemory>,
    options: LockstepOptions,
}

impl LockstepVm {
    fn new(config: VmConfig, options: LockstepOptions) -> Result<Self, EngineError> {
        let shadow = shadow::like(&config.memory).map_err(|error| EngineError::Host {
            what: "a second memory for the guest",
            source: std::io::Error::other(error),
        })?;
        Ok(Self { vm: SoftVm::new(config, NAME, None)?, shadow: Arc::new(shadow), options })
    }

    /// The two machines of vCPU `index`.
    fn pair(&self, index: u32, bus: Arc<dyn Bus>) -> Result<Pair, EngineError> {
        let journal = Arc::new(Journal::default());
        let own = [(); 2].map(|()| Arc::new(OwnWrites::default()));
        let config = self.vm.config();
        config.memory.set_write_observer(Arc::new(Recorder {
            memory: Arc::downgrade(&config.memory),
            journal: Arc::clone(&journal),
            own: Arc::clone(&own[0]),
        }));
        self.shadow.set_write_observer(Arc::new(Listener(Arc::clone(&own[1]))));

        let recording = RecordingBus { inner: bus, journal: Arc::clone(&journal) };
        let mut reference = self.vm.vcpu(index, Arc::new(recording))?;
        reference.interpreter.cpu.apic_tap = Some(Arc::new(RecordingTap(Arc::clone(&journal))));
        reference.interpreter.cpu.track_writes();

        let tap = Arc::new(PlayingTap { journal: Arc::clone(&journal), base: Mutex::new((0, None)) });
        let code = CodeMap::new(Arc::clone(&self.shadow));
        let mut cpu = Cpu::new(Connections {
            memory: Arc::clone(&self.shadow),
            bus: Arc::new(PlayingBus { journal: Arc::clone(&journal), memory: Arc::clone(&self.shadow) }),
            clock: Arc::new(VirtualClock::new(ClockMode::Counted, config.clock.tsc_khz())),
            code: Arc::clone(&code),
            cpuid: Arc::clone(&config.cpuid),
        })?;
        cpu.apic_tap = Some(Arc::clone(&tap) as _);
        cpu.track_writes();
        let jit = Options { exact_flags: true, ..self.options.jit };
        let mut jit = Jit::new(jit, &code)
            .map_err(|error| EngineError::Unsupported { engine: NAME, what: error.to_string() })?;
        jit.set_chaining(self.options.batch.is_some());

        let parts = Parts {
            reference,
            subject: Subject { interpreter: Interpreter::new(cpu), jit },
            memory: Arc::clone(&config.memory),
            shadow: Arc::clone(&self.shadow),
            journal,
            tap,
            own,
        };
        Ok(Pair::new(parts, self.options))
    }
}

impl Vm for LockstepVm {
    fn create_vcpu(&self, index: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(vcpu::LockstepVcpu::new(self.pair(index, bus)?)))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        self.vm.interrupts()
    }

    fn placements(&self) -> Vec<Placement> {
        self.vm.placements()
    }

    fn reset(&self) {
        self.vm.reset();
    }

    fn save(&self) -> Vec<SavedState> {
        self.vm.save()
    }

    fn restore(&self, state: &[SavedState]) -> Result<(), StateError> {
        self.vm.restore(state)
    }
}
