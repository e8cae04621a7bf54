//! The controller's saved state.

use ringfence_engine::{SavedState, StateError, Stateful};
use ringfence_memory::GuestAddress;
use serde::{Deserialize, Serialize};

use super::Controller;
use super::events::Events;
use super::features::Features;
use super::log::Logs;
use super::queue::{Completion, Submission};
use super::spec::{COMMAND_SIZE, COMPLETION_SIZE, MAX_ADMIN_ENTRIES, PAGE, cc, csts};
use super::state::{Postponed, State};
use crate::device::{invalid, lock};
use crate::pci::EndpointState;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    intms: u32,
    submissions: Vec<Option<Submission>>,
    completions: Vec<Option<Completion>>,
    features: Features,
    events: Events,
    logs: Logs,
    postponed: Vec<Postponed>,
    endpoint: EndpointState,
}

impl Saved {
    /// The state, or what is wrong with it. Nothing is trusted: what a guest could not have done is refused.
    fn check(self, controller: &Controller) -> Result<(State, EndpointState), &'static str> {
        let queues = controller.config.queues;
        let mut state = State {
            cc: self.cc & cc::ALL,
            csts: self.csts & (csts::READY | csts::FATAL | csts::SHUTDOWN),
            aqa: self.aqa & 0x0fff_0fff,
            asq: self.asq & !(PAGE - 1),
            acq: self.acq & !(PAGE - 1),
            intms: self.intms,
            submissions: self.submissions,
            completions: self.completions,
            features: self.features,
            events: self.events,
            logs: self.logs,
            ..State::new(queues)
        };
        let count = usize::from(queues) + 1;
        if state.submissions.len() != count || state.completions.len() != count {
            return Err("it has another number of queues");
        }
        if !state.features.fits(queues) || !state.events.is_valid() {
            return Err("its features or events cannot be");
        }
        let place = |base: u64, size: u32, entry: u64| {
            (2..=MAX_ADMIN_ENTRIES).contains(&size)
                && base.is_multiple_of(PAGE)
                && controller.memory.holds(GuestAddress(base), u64::from(size) * entry, true)
        };
        let fits = |q: &Completion| {
            place(q.base, q.size, COMPLETION_SIZE)
                && q.head.max(q.tail) < q.size
                && q.vector.is_none_or(|vector| vector <= queues)
        };
        if !state.completions.iter().flatten().all(fits) {
            return Err("a completion queue cannot be");
        }
        let fits = |q: &Submission| {
            place(q.base, q.size, COMMAND_SIZE)
                && q.head.max(q.tail) < q.size
                && state.completions.get(usize::from(q.completion)).is_some_and(Option::is_some)
        };
        if !state.submissions.iter().flatten().all(fits) {
            return Err("a submission queue cannot be");
        }
        let admin = state.submissions.first().is_some_and(Option::is_some);
        if admin != (state.csts & csts::READY != 0) {
            return Err("readiness and admin queue do not agree");
        }
        for postponed in &self.postponed {
            let pair = state.pair(postponed.ticket.queue);
            let (submission, completion) = pair.ok_or("a completion belongs to no queue")?;
            if !completion.reserve() {
                return Err("completions do not fit their queue");
            }
            submission.in_flight += 1;
        }
        let deletions = state.submissions.iter().flatten().filter(|q| q.deleted_by.is_some());
        if deletions.clone().any(|q| q.in_flight == 0) {
            return Err("a queue waits for its deletion without need");
        }
        for _ in 0..deletions.count() {
            let (submission, completion) = state.pair(0).ok_or("a deletion without an admin queue")?;
            if !completion.reserve() {
                return Err("completions do not fit their queue");
            }
            submission.in_flight += 1;
        }
        state.postponed = self.postponed;
        Ok((state, self.endpoint))
    }
}

impl Stateful for Controller {
    fn quiesce(&self) {
        drop(self.wait_idle());
    }

    fn save(&self) -> SavedState {
        let state = lock(&self.state).clone();
        let saved = Saved {
            cc: state.cc,
            csts: state.csts,
            aqa: state.aqa,
            asq: state.asq,
            acq: state.acq,
            intms: state.intms,
            submissions: state.submissions,
            completions: state.completions,
            features: state.features,
            events: state.events,
            logs: state.logs,
            postponed: state.postponed,
            endpoint: self.endpoint.save(),
        };
        SavedState::pack(&self.config.name, VERSION, &saved)
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let name = &self.config.name;
        let saved: Saved = saved.unpack(name, VERSION)?;
        let (new, endpoint) = saved.check(self).map_err(|what| invalid(name, what))?;
        let mut state = self.wait_idle();
        if !self.endpoint.restore(&endpoint) {
            return Err(invalid(name, "its PCI registers are those of another function"));
        }
        *state = new;
        self.update_pin(&state);
        Ok(())
    }
}
