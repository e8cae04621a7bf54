//! How the outside and the devices reach a running machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringfence_devices::{PowerControl, PowerEvent};
use ringfence_engine::Kick;

use crate::vcpu::VcpuReport;

/// Why somebody outside ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A signal, by its number.
    Signal(i32),
    /// The user left the console.
    ConsoleLeft,
    /// Nobody takes the console's output any more.
    ConsoleClosed,
}

/// What the machine's own thread is told.
#[derive(Debug)]
pub(crate) enum Event {
    Vcpu(u32, VcpuReport),
    Power(PowerEvent),
    Stop(StopReason),
    /// The power button is pressed; the guest has so much time.
    AskToStop(StopReason, Duration),
    Pause(Sender<()>),
    Resume,
    /// A disk's image failed on the host; what to tell the user.
    DiskFault(String),
    /// The guest's driver broke the rules of a device; what to tell the user.
    DeviceBroken(String),
}

/// Passes what a device has to tell on to the machine's thread, as the event that `event` makes of it.
pub(crate) fn reporter(
    events: &Sender<Event>,
    event: fn(String) -> Event,
) -> impl Fn(String) + Send + Sync + use<> {
    let events = events.clone();
    // A machine that has ended needs no reports.
    move |text| drop(events.send(event(text)))
}

/// Reaches a machine from any thread. Outlives it harmlessly.
#[derive(Clone, Debug)]
pub struct MachineHandle {
    events: Sender<Event>,
}

/// How long [`MachineHandle::pause`] waits for a machine that does not answer.
const PAUSE_TIME: Duration = Duration::from_secs(5);

impl MachineHandle {
    pub(crate) fn new(events: Sender<Event>) -> Self {
        Self { events }
    }

    /// Ends the machine as if it were switched off.
    pub fn stop(&self, reason: StopReason) {
        self.tell(Event::Stop(reason));
    }

    /// Presses the power button, and ends the machine if it has not switched itself off after `patience`. A guest that
    /// does not listen to the button is ended at once.
    pub fn ask_to_stop(&self, reason: StopReason, patience: Duration) {
        self.tell(Event::AskToStop(reason, patience));
    }

    /// Holds every vCPU and the guest's clock. Returns when they stand still.
    pub fn pause(&self) {
        let (reply, done) = channel();
        self.tell(Event::Pause(reply));
        // Without an answer the machine has ended, or stands still for another reason.
        let _ = done.recv_timeout(PAUSE_TIME);
    }

    /// Goes on after [`MachineHandle::pause`].
    pub fn resume(&self) {
        self.tell(Event::Resume);
    }

    fn tell(&self, event: Event) {
        // A machine that has ended needs to be told nothing.
        let _ = self.events.send(event);
    }
}

/// The machine's power switch: what devices pull to switch off or reset.
pub(crate) struct PowerSwitch {
    /// Keeps vCPUs from entering the guest again until the event has been dealt with.
    hold: Arc<AtomicBool>,
    kicks: OnceLock<Vec<Arc<dyn Kick>>>,
    events: Sender<Event>,
}

impl PowerSwitch {
    pub(crate) fn new(events: Sender<Event>) -> Self {
        Self { hold: Arc::default(), kicks: OnceLock::new(), events }
    }

    /// The flag that every vCPU thread looks at.
    pub(crate) fn hold(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.hold)
    }

    /// Whom to stop. The first call holds.
    pub(crate) fn connect(&self, kicks: Vec<Arc<dyn Kick>>) {
        let _ = self.kicks.set(kicks);
    }

    /// The event has been dealt with; vCPUs may run again.
    pub(crate) fn clear(&self) {
        self.hold.store(false, Ordering::Release);
    }
}

impl PowerControl for PowerSwitch {
    fn request(&self, event: PowerEvent) {
        if self.hold.swap(true, Ordering::AcqRel) {
            // The first request decides.
            return;
        }
        // A machine that has ended needs to be told nothing.
        let _ = self.events.send(Event::Power(event));
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn first_power_event_decides_until_cleared() {
        let (sender, events) = channel();
        let switch = PowerSwitch::new(sender);
        switch.request(PowerEvent::Reset);
        switch.request(PowerEvent::PowerOff);
        switch.clear();
        switch.request(PowerEvent::PowerOff);
        let seen: Vec<Event> = events.try_iter().collect();
        assert!(
            matches!(seen[..], [Event::Power(PowerEvent::Reset), Event::Power(PowerEvent::PowerOff)]),
            "{seen:?}"
        );
    }

    #[test]
    fn handle_outlives_the_machine() {
        let (sender, events) = channel();
        let handle = MachineHandle::new(sender);
        drop(events);
        handle.stop(StopReason::ConsoleLeft);
        handle.pause();
    }
}
