//! The saved state of a virtio function.

use ringfence_engine::{SavedState, StateError, Stateful};
use serde::{Deserialize, Serialize};

use super::core::State;
use super::pci::VirtioPci;
use super::spec::{NO_VECTOR, feature, status};
use crate::device::{invalid, lock};
use crate::pci::EndpointState;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    registers: State,
    device: serde_json::Value,
    endpoint: EndpointState,
}

impl VirtioPci {
    /// What is wrong with saved registers, if anything. Nothing is trusted: what a driver could not have done is
    /// refused.
    fn check(&self, new: &State) -> Result<(), &'static str> {
        let now = lock(&self.core.state);
        if new.queues.len() != now.queues.len() {
            return Err("it has another number of queues");
        }
        if !new.queues.iter().zip(&now.queues).all(|(new, now)| new.fits(now.max, &self.core.memory)) {
            return Err("a queue cannot be");
        }
        let vector = |vector: u16| vector == NO_VECTOR || vector < self.core.vectors;
        if !vector(new.config_vector) || !new.queues.iter().all(|q| vector(q.vector)) {
            return Err("an interrupt vector cannot be");
        }
        if new.status & !(status::OF_DRIVER | status::NEEDS_RESET) != 0 || new.isr & !3 != 0 {
            return Err("a status cannot be");
        }
        let features = new.driver_features;
        let agreed = features & !self.core.features == 0 && features & feature::VERSION_1 != 0;
        let active = new.has(status::DRIVER_OK) || new.queues.iter().any(|q| q.enabled);
        if new.has(status::FEATURES_OK) && !agreed || active && !new.has(status::FEATURES_OK) {
            return Err("features and status do not agree");
        }
        let room: usize = new.queues.iter().map(|q| usize::from(q.size)).sum();
        if new.postponed.len() > room || new.postponed.iter().any(|p| usize::from(p.0) >= new.queues.len()) {
            return Err("ends of requests belong to no queue");
        }
        Ok(())
    }
}

impl Stateful for VirtioPci {
    fn quiesce(&self) {
        self.device.stop(None, true);
        drop(self.core.wait_idle());
    }

    fn save(&self) -> SavedState {
        let registers = lock(&self.core.state).clone();
        let saved = Saved { registers, device: self.device.save(), endpoint: self.core.endpoint.save() };
        SavedState::pack(&self.core.name, VERSION, &saved)
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let name = &self.core.name;
        let saved: Saved = saved.unpack(name, VERSION)?;
        self.check(&saved.registers).map_err(|what| invalid(name, what))?;
        self.device.stop(None, true);
        let mut state = self.core.wait_idle();
        let before = self.core.endpoint.save();
        if !self.core.endpoint.restore(&saved.endpoint) {
            return Err(invalid(name, "its PCI registers are those of another function"));
        }
        if let Err(error) = self.device.restore(name, &saved.device) {
            self.core.endpoint.restore(&before);
            return Err(error);
        }
        *state = saved.registers;
        self.core.update_pin(&state);
        let (active, features) = (state.is_running(), state.driver_features);
        drop(state);
        if active {
            self.device.activate(features);
        }
        Ok(())
    }
}
