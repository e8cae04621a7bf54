//! Buses and the platform devices of the PC.
//!
//! [`SystemBus`] routes port and memory accesses to devices; everything else here is a device, one folder each.
//! A device locks itself, keeps time by the machine's [`VirtualClock`](ringfence_engine::VirtualClock) and its
//! [`TimerQueue`](ringfence_engine::TimerQueue), drives an [`IrqLine`](ringfence_engine::IrqLine) and can save
//! its state. It knows neither vCPUs nor threads. What ends a run (power off, reset, an exit status) goes to a
//! [`PowerControl`]. Where each device answers is told by [`platform`], which the ACPI tables are built from.

#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod bus;
pub mod debug_exit;
mod device;
pub mod fw_cfg;
pub mod i8042;
pub mod nvme;
pub mod pci;
pub mod pit;
pub mod platform;
pub mod port92;
mod power;
pub mod pvpanic;
mod rate;
pub mod rtc;
pub mod serial;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod virtio;
pub mod watchdog;

pub use bus::{BusError, SystemBus};
pub use device::Device;
pub use power::{PowerControl, PowerEvent};
