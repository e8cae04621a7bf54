//! Engine, virtual machine, virtual CPU.

use std::sync::Arc;

use ringfence_memory::GuestMemory;
use ringfence_x86::cpuid::CpuidTable;

use crate::{
    Bus, CpuState, EngineError, GuestProfile, InterruptSink, Placement, SavedState, StateError, TimerQueue,
    VirtualClock,
};

/// A way to execute guest code.
pub trait Engine: Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// Makes a virtual machine without CPUs.
    ///
    /// # Errors
    /// [`EngineError`] if the engine or the host cannot offer what `config` asks.
    fn create_vm(&self, config: VmConfig) -> Result<Box<dyn Vm>, EngineError>;
}

/// What a virtual machine is made from.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Its physical memory.
    pub memory: Arc<GuestMemory>,
    /// Its clock.
    pub clock: Arc<VirtualClock>,
    /// The timers of its devices, which software engines run.
    pub timers: Arc<TimerQueue>,
    /// What CPUID says, the same on every vCPU but for the APIC id.
    pub cpuid: Arc<CpuidTable>,
    /// How many vCPUs there will be, from 1.
    pub cpus: u32,
}

/// A virtual machine of an engine: its vCPUs and its interrupt controllers.
pub trait Vm: Send + Sync {
    /// Makes vCPU number `index` (which is also its APIC id), in reset state; number 0 is the bootstrap
    /// processor, the others wait for a start-up IPI. Its port and memory-mapped accesses go to `bus`.
    ///
    /// # Errors
    /// [`EngineError`] if the host refuses, or the index is out of range or taken.
    fn create_vcpu(&self, index: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Where devices send interrupts.
    fn interrupts(&self) -> Arc<dyn InterruptSink>;
    /// The controllers that answer on the bus (8259 pair, I/O APIC), if they are not the host's business.
    fn placements(&self) -> Vec<Placement>;
    /// Resets the interrupt controllers, as the machine's reset line does.
    fn reset(&self);
    /// State of the interrupt controllers, one section each.
    fn save(&self) -> Vec<SavedState>;
    /// Loads sections from [`Vm::save`].
    ///
    /// # Errors
    /// [`StateError`] if one does not fit.
    fn restore(&self, state: &[SavedState]) -> Result<(), StateError>;
}

/// A virtual CPU. Used by one thread at a time.
pub trait Vcpu: Send {
    /// Runs until there is something to say. A halted vCPU sleeps in here.
    fn run(&mut self) -> VmExit;
    /// What other threads use to interrupt [`Vcpu::run`].
    fn kick(&self) -> Arc<dyn Kick>;
    /// The architectural state.
    fn state(&self) -> CpuState;
    /// Loads an architectural state.
    ///
    /// # Errors
    /// [`EngineError::BadState`] if no processor of this model can be in it.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// Back to the state after power-on (SDM 3A table 9-1).
    fn reset(&mut self);
    /// Instructions retired since power-on; 0 where the engine cannot tell.
    fn instructions(&self) -> u64;
    /// Named counters for `-v`, in the order to be printed.
    fn counters(&self) -> Vec<(&'static str, u64)>;
    /// Where the guest's instructions were, if the engine was made to find out.
    fn profile(&self) -> Option<GuestProfile> {
        None
    }
}

/// Makes a running vCPU return [`VmExit::Kicked`].
pub trait Kick: Send + Sync {
    /// The vCPU returns soon; if it is not running, its next run returns at once.
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// Somebody called [`Kick::kick`].
    Kicked,
    /// Halted with interrupts disabled: only an NMI, INIT or reset can wake it.
    HaltedForGood,
    /// A triple fault. The string says what led to it.
    Shutdown(String),
    /// The engine met something it cannot continue from. A bug or a limit of ours, never the guest's doing.
    Internal(String),
}
