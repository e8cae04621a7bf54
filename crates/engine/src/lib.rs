//! The engine seam.
//!
//! An *engine* executes guest code: the software engine translates or interprets it, KVM hands it to the
//! host's virtualization. Whichever it is, the machine sees three small traits: [`Engine`] makes a [`Vm`],
//! which makes a [`Vcpu`] per virtual CPU. A vCPU runs until it has something to say ([`VmExit`]); port and
//! memory-mapped accesses go straight to the [`Bus`] it was made with. [`CpuState`] is the architecture's own
//! state, which one engine can save and another load.
//!
//! What devices and engines share lives here too: the guest's clock ([`VirtualClock`]), its timers
//! ([`TimerQueue`]), interrupt wires ([`IrqLine`]) and the envelope of saved state ([`SavedState`]).

#![deny(unsafe_code)]

mod bus;
mod clock;
mod error;
mod irq;
mod profile;
mod saved;
mod state;
mod timer;
mod traits;

pub use bus::{AddressSpace, Bus, BusDevice, Placement};
pub use clock::{ClockMode, HostLine, VirtualClock, VirtualTime};
pub use error::EngineError;
pub use irq::{InterruptSink, IrqLine};
pub use profile::{GuestProfile, Place};
pub use saved::{SavedState, StateError, Stateful};
pub use state::{Activity, CpuState, VectorState, X87State};
pub use timer::{Timer, TimerQueue};
pub use traits::{Engine, Kick, Vcpu, Vm, VmConfig, VmExit};
