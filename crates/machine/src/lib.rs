//! A PC assembled from a description.
//!
//! [`MachineSpec`] is the description, [`Machine`] what is made from it: memory laid out by [`memory_map`], an
//! engine with its vCPUs on threads of their own, devices on a bus, and a kernel loaded. [`Machine::run`] lets it
//! run on the caller's thread's behalf and returns the [`Outcome`]; [`MachineHandle`] reaches it meanwhile from any
//! other thread. Nothing here ends the process.

#![forbid(unsafe_code)]

mod build;
pub mod console;
mod control;
mod cpu_model;
mod crash;
mod devices;
mod disks;
mod engine_choice;
mod error;
mod host;
mod load;
mod machine;
pub mod memory_map;
mod nets;
mod ports;
mod save;
mod shares;
mod size;
mod spec;
mod usage;
mod vcpu;
mod vsock;
mod walk;
mod watchdog;

pub use control::{MachineHandle, StopReason};
pub use cpu_model::{CpuModel, UnknownCpuModel};
pub use crash::CrashReport;
pub use devices::SerialOutputs;
pub use engine_choice::{EngineChoice, NotOffered, Selection, UnknownEngine};
pub use error::{AttachError, MachineError};
pub use host::HostMemory;
pub use machine::{Machine, Notice, Outcome};
pub use ports::{PortError, PortSpec, PortSpecError, PortTarget};
pub use ringfence_devices::serial::SerialOutput;
pub use ringfence_disk::{DiskFormat, DiskSpec, SpecError as DiskSpecError};
pub use ringfence_engine::{ClockMode, GuestProfile, Place};
pub use ringfence_net::{
    NetSpec, NetSpecError, SUBCOMMAND as NET_SUBCOMMAND, helper_main as net_helper_main,
};
pub use ringfence_share::{
    SUBCOMMAND as SHARE_SUBCOMMAND, ShareSpec, ShareSpecError, helper_main as share_helper_main,
};
pub use ringfence_vsock::{
    SUBCOMMAND as VSOCK_SUBCOMMAND, VsockSpec, VsockSpecError, helper_main as vsock_helper_main,
};
pub use size::{ByteSize, SizeError};
pub use spec::{BootSpec, ConsoleDevice, Initrd, MachineSpec, SpecError};
pub use usage::MemoryUse;
pub use vcpu::VcpuStatistics;
pub use watchdog::{UnknownAction, WatchdogAction};
