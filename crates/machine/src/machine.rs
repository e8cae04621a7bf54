//! The machine: its run state, and what it does with what vCPUs, devices and the outside tell it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ringfence_boot::BootPlan;
use ringfence_devices::PowerEvent;
use ringfence_engine::{VirtualClock, Vm, VmExit};
use ringfence_helper::Helper;
use ringfence_memory::GuestMemory;

use crate::console::ConsoleInput;
use crate::control::{Event, MachineHandle, PowerSwitch, StopReason};
use crate::crash::CrashReport;
use crate::devices::{Devices, SerialOutputs};
use crate::engine_choice::Selection;
use crate::error::MachineError;
use crate::ports::Files;
use crate::spec::MachineSpec;
use crate::usage::{self, MemoryUse};
use crate::vcpu::{NoAnswer, VcpuReport, VcpuStatistics, VcpuThread};
use crate::watchdog::WatchdogAction;
use crate::{build, load};

/// How a machine's run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest switched it off.
    PoweredOff,
    /// The guest reset it, and the description says not to boot again.
    Reset,
    /// The guest's kernel panicked, and said so.
    Panicked,
    /// The guest neglected its watchdog, and that is to end the machine.
    Neglected,
    /// The guest wrote to the debug-exit port; this is the exit status it asked for.
    DebugExit(u8),
    /// The guest crashed: a triple fault.
    Crashed(Box<CrashReport>),
    /// The engine cannot go on: a bug or a limit of ours.
    EngineFailed(Box<CrashReport>),
    /// The time that [`Machine::run`] was given is over.
    TimedOut,
    /// Somebody called [`MachineHandle::stop`].
    Stopped(StopReason),
}

/// Something worth telling while the machine goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Every vCPU has halted with interrupts off, and nothing will wake them.
    HaltedForGood,
    /// The guest reset the machine, which boots again.
    Rebooting,
    /// The guest neglected its watchdog, which resets the machine; it boots again.
    WatchdogResets,
    /// A disk's image failed on the host, and the guest sees an I/O error; told once for each kind of failure. Or it may
    /// not be what the user takes it for.
    DiskFault(String),
    /// The guest's driver broke the rules of a device, which does nothing more until it is reset. Told once for each
    /// device.
    DeviceBroken(String),
    /// The power button was pressed; the guest has so much time to switch itself off.
    AskedToStop(Duration),
}

/// A machine, from being assembled to its end.
pub struct Machine {
    pub(crate) spec: MachineSpec,
    pub(crate) selection: Selection,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) vm: Box<dyn Vm>,
    /// Before the vCPUs' devices, so that the threads are gone first.
    pub(crate) vcpus: Vec<VcpuThread>,
    pub(crate) devices: Devices,
    pub(crate) power: Arc<PowerSwitch>,
    pub(crate) events: Receiver<Event>,
    pub(crate) backlog: VecDeque<Event>,
    pub(crate) handle: MachineHandle,
    pub(crate) plan: BootPlan,
    /// What ports write to.
    pub(crate) port_files: Files,
    /// Kept for as long as the machine.
    pub(crate) _helpers: Vec<Helper>,
    pub(crate) run_time: Duration,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("spec", &self.spec).finish_non_exhaustive()
    }
}

/// Whether the vCPUs are on.
struct Activity {
    /// Since when they are held, if they are.
    paused: Option<Instant>,
    /// Who has halted for good.
    halted: Vec<bool>,
    /// Until when the guest may take to switch itself off, and why it was asked to.
    grace: Option<(Instant, StopReason)>,
}

impl Machine {
    /// Assembles a machine and loads its kernel. Nothing runs yet.
    ///
    /// # Errors
    /// [`MachineError`] if the description, the host or the kernel do not allow it.
    pub fn new(spec: MachineSpec, outputs: SerialOutputs) -> Result<Self, MachineError> {
        build::build(spec, outputs)
    }

    /// What other threads reach the machine by.
    pub fn handle(&self) -> MachineHandle {
        self.handle.clone()
    }

    /// The console's end for input.
    pub fn console_input(&self) -> ConsoleInput {
        self.devices.console_input().clone()
    }

    /// Which engine runs it, and why.
    pub fn engine(&self) -> Selection {
        self.selection
    }

    /// What was loaded.
    pub fn boot_plan(&self) -> &BootPlan {
        &self.plan
    }

    /// The guest's clock.
    pub fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    /// Lets the machine run until it ends, at most for `timeout`. `notice` is called for events on the way.
    ///
    /// # Errors
    /// [`MachineError`] if a vCPU is lost or the kernel cannot be loaded again after a reset.
    pub fn run(
        &mut self,
        timeout: Option<Duration>,
        mut notice: impl FnMut(Notice),
    ) -> Result<Outcome, MachineError> {
        let start = Instant::now();
        let deadline = timeout.and_then(|timeout| start.checked_add(timeout));
        let mut activity = Activity { paused: None, halted: vec![false; self.vcpus.len()], grace: None };
        self.start_vcpus(&activity)?;
        let result = loop {
            let (limit, end) = match activity.grace {
                Some((until, reason)) if deadline.is_none_or(|deadline| until < deadline) => {
                    (Some(until), Outcome::Stopped(reason))
                }
                _ => (deadline, Outcome::TimedOut),
            };
            let Some(event) = self.next_event(limit) else { break Ok(end) };
            match self.handle_event(event, &mut activity, &mut notice) {
                Ok(None) => {}
                Ok(Some(outcome)) => break Ok(outcome),
                Err(error) => break Err(error),
            }
        };
        self.run_time += start.elapsed();
        self.devices.console_input().end();
        // The reason to end is known; a vCPU that does not stop any more changes nothing about it.
        let _ = self.pause_vcpus();
        self.port_files.finish();
        // But for an engine that checks itself at the end.
        match self.failure_at_the_end() {
            Some(outcome) if result.is_ok() => Ok(outcome),
            _ => result,
        }
    }

    /// What an engine has found wrong while its vCPU was stopped.
    fn failure_at_the_end(&mut self) -> Option<Outcome> {
        let left: Vec<Event> = self.backlog.drain(..).chain(self.events.try_iter()).collect();
        left.into_iter().find_map(|event| match event {
            Event::Vcpu(
                index,
                VcpuReport::Stopped { exit: VmExit::Internal(reason), state, instructions },
            ) => {
                let report = CrashReport::new(index, reason, *state, instructions, &self.memory);
                Some(Outcome::EngineFailed(Box::new(report)))
            }
            _ => None,
        })
    }

    /// Numbers about every vCPU.
    ///
    /// # Errors
    /// [`MachineError::VcpuLost`].
    pub fn statistics(&self) -> Result<Vec<VcpuStatistics>, MachineError> {
        self.each_vcpu(VcpuThread::statistics)
    }

    /// How long [`Machine::run`] took.
    pub fn run_time(&self) -> Duration {
        self.run_time
    }

    /// Resident memory of this process, which holds one machine. `None` if the host does not tell.
    pub fn memory_use(&self) -> Option<MemoryUse> {
        usage::measure(&self.memory)
    }

    fn next_event(&mut self, deadline: Option<Instant>) -> Option<Event> {
        if let Some(event) = self.backlog.pop_front() {
            return Some(event);
        }
        let Some(deadline) = deadline else { return self.events.recv().ok() };
        self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }

    fn handle_event(
        &mut self,
        event: Event,
        activity: &mut Activity,
        notice: &mut impl FnMut(Notice),
    ) -> Result<Option<Outcome>, MachineError> {
        match event {
            Event::Stop(reason) => return Ok(Some(Outcome::Stopped(reason))),
            Event::AskToStop(reason, patience) => {
                // A machine that stands still cannot switch itself off.
                if activity.paused.is_some() || !self.devices.press_power_button() {
                    return Ok(Some(Outcome::Stopped(reason)));
                }
                notice(Notice::AskedToStop(patience));
                let until = Instant::now().checked_add(patience);
                activity.grace = activity.grace.or(until.map(|until| (until, reason)));
            }
            Event::Power(PowerEvent::PowerOff) => return Ok(Some(Outcome::PoweredOff)),
            Event::Power(PowerEvent::GuestPanic) => return Ok(Some(Outcome::Panicked)),
            Event::Power(event @ PowerEvent::DebugExit(_)) => {
                return Ok(Some(Outcome::DebugExit(event.exit_status().unwrap_or_default())));
            }
            Event::Power(PowerEvent::Reset) if self.spec.no_reboot => return Ok(Some(Outcome::Reset)),
            Event::Power(PowerEvent::Watchdog)
                if self.spec.no_reboot || self.spec.watchdog != Some(WatchdogAction::Reset) =>
            {
                return Ok(Some(Outcome::Neglected));
            }
            Event::Power(event @ (PowerEvent::Reset | PowerEvent::Watchdog)) => {
                notice(match event {
                    PowerEvent::Watchdog => Notice::WatchdogResets,
                    _ => Notice::Rebooting,
                });
                self.reboot()?;
                activity.halted.fill(false);
                self.start_vcpus(activity)?;
            }
            Event::Vcpu(index, VcpuReport::Died) => return Err(MachineError::VcpuLost(index)),
            Event::Vcpu(index, VcpuReport::Stopped { exit, state, instructions }) => {
                let report =
                    |reason| Box::new(CrashReport::new(index, reason, *state, instructions, &self.memory));
                match exit {
                    VmExit::Kicked => {}
                    VmExit::Shutdown(reason) => return Ok(Some(Outcome::Crashed(report(reason)))),
                    VmExit::Internal(reason) => return Ok(Some(Outcome::EngineFailed(report(reason)))),
                    VmExit::HaltedForGood => {
                        if let Some(halted) = activity.halted.get_mut(index as usize) {
                            *halted = true;
                        }
                        if activity.halted.iter().all(|halted| *halted) {
                            notice(Notice::HaltedForGood);
                        }
                    }
                }
            }
            Event::DiskFault(text) => notice(Notice::DiskFault(text)),
            Event::DeviceBroken(text) => notice(Notice::DeviceBroken(text)),
            Event::Pause(done) => {
                self.pause_vcpus()?;
                activity.paused.get_or_insert_with(Instant::now);
                // Whoever asked may have given up waiting.
                let _ = done.send(());
            }
            Event::Resume => {
                if let Some(since) = activity.paused.take() {
                    self.clock.skip(since.elapsed());
                    self.start_vcpus(activity)?;
                }
            }
        }
        Ok(None)
    }

    /// Lets every vCPU run that has not halted for good, unless the machine is paused.
    fn start_vcpus(&self, activity: &Activity) -> Result<(), MachineError> {
        if activity.paused.is_some() {
            return Ok(());
        }
        for (index, (vcpu, halted)) in self.vcpus.iter().zip(&activity.halted).enumerate() {
            if !halted {
                vcpu.run().map_err(|NoAnswer| MachineError::VcpuLost(index as u32))?;
            }
        }
        Ok(())
    }

    /// Returns when no vCPU is in the guest.
    pub(crate) fn pause_vcpus(&self) -> Result<(), MachineError> {
        // All are asked before the first is waited for, so that they stop together.
        let asked = self.each_vcpu(VcpuThread::begin_pause)?;
        for (index, answer) in asked.into_iter().enumerate() {
            answer.wait().map_err(|NoAnswer| MachineError::VcpuLost(index as u32))?;
        }
        Ok(())
    }

    pub(crate) fn each_vcpu<T>(
        &self,
        f: impl Fn(&VcpuThread) -> Result<T, NoAnswer>,
    ) -> Result<Vec<T>, MachineError> {
        let numbered = self.vcpus.iter().zip(0..);
        numbered.map(|(vcpu, index)| f(vcpu).map_err(|NoAnswer| MachineError::VcpuLost(index))).collect()
    }

    /// The reset line: every part back to power-on, then the kernel afresh.
    fn reboot(&mut self) -> Result<(), MachineError> {
        self.pause_vcpus()?;
        self.vm.reset();
        self.devices.reset();
        self.memory.set_a20(true);
        self.plan = load::load(&self.spec, &self.memory)?;
        self.reset_vcpus()?;
        // What the old guest still said means nothing to the new one; what the outside said does.
        let outside = |event: &Event| {
            matches!(
                event,
                Event::Stop(_)
                    | Event::AskToStop(..)
                    | Event::Pause(_)
                    | Event::Resume
                    | Event::DiskFault(_)
                    | Event::DeviceBroken(_)
            )
        };
        self.backlog.extend(self.events.try_iter().filter(outside));
        self.power.clear();
        Ok(())
    }

    /// Puts the bootstrap processor at the kernel's entry and the others to wait for it.
    pub(crate) fn reset_vcpus(&self) -> Result<(), MachineError> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let state = (index == 0).then(|| self.plan.cpu.clone());
            vcpu.reset(state).map_err(|NoAnswer| MachineError::VcpuLost(index as u32))??;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
