//! Saving and loading a whole machine: every part in a named section.

use std::collections::BTreeMap;

use ringfence_engine::{CpuState, SavedState, StateError, VirtualTime};
use serde::{Deserialize, Serialize};

use crate::error::MachineError;
use crate::machine::Machine;
use crate::vcpu::{NoAnswer, VcpuThread};

/// Version of the sections that the machine itself writes.
const VERSION: u32 = 1;

/// The section `clock`.
#[derive(Serialize, Deserialize)]
struct ClockState {
    /// Nanoseconds of guest time.
    now: u64,
    /// The TSC's frequency in kHz.
    tsc_khz: u32,
}

fn cpu_section(index: usize) -> String {
    format!("cpu.{index}")
}

impl Machine {
    /// Stops the vCPUs and describes every part but the memory's contents. The machine stays stopped.
    ///
    /// # Errors
    /// [`MachineError::VcpuLost`].
    pub fn save(&self) -> Result<Vec<SavedState>, MachineError> {
        self.pause_vcpus()?;
        self.devices.all().for_each(|device| device.quiesce());
        let clock = ClockState { now: self.clock.now().0, tsc_khz: self.clock.tsc_khz() };
        let mut sections = vec![SavedState::pack("clock", VERSION, &clock)];
        let states = self.each_vcpu(VcpuThread::state)?;
        let cpus = states.iter().enumerate();
        sections.extend(cpus.map(|(index, state)| SavedState::pack(&cpu_section(index), VERSION, state)));
        sections.extend(self.vm.save());
        sections.extend(self.devices.all().map(|device| device.save()));
        Ok(sections)
    }

    /// Loads what [`Machine::save`] described into a machine of the same description that has not run yet.
    ///
    /// # Errors
    /// [`MachineError::State`] or [`MachineError::Engine`] if a section is missing or does not fit; the machine is
    /// not usable then.
    pub fn restore(&self, sections: &[SavedState]) -> Result<(), MachineError> {
        self.pause_vcpus()?;
        let by_name: BTreeMap<&str, &SavedState> = sections.iter().map(|s| (s.name.as_str(), s)).collect();
        let section = |name: &str| {
            let missing =
                || StateError::Invalid { name: name.to_owned(), what: "the section is missing".to_owned() };
            by_name.get(name).copied().ok_or_else(missing)
        };
        let clock: ClockState = section("clock")?.unpack("clock", VERSION)?;
        self.clock.set(VirtualTime(clock.now));
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let name = cpu_section(index);
            let state: CpuState = section(&name)?.unpack(&name, VERSION)?;
            vcpu.reset(Some(state)).map_err(|NoAnswer| MachineError::VcpuLost(index as u32))??;
        }
        self.vm.restore(sections)?;
        for device in self.devices.all() {
            // Every device names its section; its own state now tells which.
            device.restore(section(&device.save().name)?)?;
        }
        Ok(())
    }
}
