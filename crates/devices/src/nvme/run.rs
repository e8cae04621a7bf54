//! Taking commands, completing them, and what waits for that.

use std::sync::{Arc, MutexGuard, PoisonError};

use ringfence_disk::{Operation, Request};

use super::Controller;
use super::command::{Command, Outcome, Ticket};
use super::spec::{MAX_ADMIN_ENTRIES, Status, cc, csts};
use super::state::{Postponed, Shutdown, State};
use crate::device::lock;

/// Commands taken from a queue before they are started.
const BATCH: usize = 16;

/// Commands taken, and what holds for all of them.
pub(super) struct Batch {
    commands: Vec<Command>,
    /// Whether writes have to be durable, since the write cache is off.
    pub(super) durable: bool,
}

impl Controller {
    /// Takes and starts the commands of a submission queue.
    pub(super) fn process(&self, queue: u16) {
        // Another vCPU may fill the queue meanwhile, for ever. What is left after twice the largest queue, it has
        // to care for itself: its own doorbell comes here after it has moved the tail.
        let mut left = 2 * MAX_ADMIN_ENTRIES as usize;
        while left > 0 {
            let batch = self.take(queue);
            if batch.commands.is_empty() {
                return;
            }
            left = left.saturating_sub(batch.commands.len());
            let mut used = 0_u64;
            for command in &batch.commands {
                let ticket = Ticket { queue, id: command.id(), namespace: command.namespace() };
                if queue == 0 {
                    self.run_admin(command, ticket);
                } else {
                    used |= self.run_io(command, ticket, batch.durable);
                }
            }
            for (index, namespace) in self.namespaces.iter().enumerate() {
                if used >> index & 1 != 0 {
                    namespace.disk.kick();
                }
            }
        }
    }

    fn take(&self, queue: u16) -> Batch {
        let mut state = lock(&self.state);
        let mut batch = Batch { commands: Vec::new(), durable: !state.features.write_cache };
        if !state.is_running() || !self.endpoint.is_bus_master() {
            return batch;
        }
        let mut fatal = false;
        if let Some((submission, completion)) = state.pair(queue) {
            while batch.commands.len() < BATCH && submission.has_commands() && completion.reserve() {
                match submission.take(&self.memory) {
                    Ok(command) => batch.commands.push(command),
                    Err(_) => {
                        fatal = true;
                        break;
                    }
                }
            }
        }
        state.in_flight += batch.commands.len() as u32;
        if fatal {
            state.csts |= csts::FATAL;
        }
        batch
    }

    /// Ends a command whose outcome is known now.
    pub(super) fn complete(&self, ticket: Ticket, outcome: Outcome) {
        let mut state = lock(&self.state);
        state.in_flight = state.in_flight.saturating_sub(1);
        if outcome.status.is_error() {
            state.logs.failed(ticket.queue, ticket.id, outcome.status, ticket.namespace);
        }
        if let Some((write, bytes)) = outcome.moved {
            state.logs.transferred(write, bytes);
        }
        if !state.resetting {
            self.post(&mut state, ticket, outcome.result, outcome.status);
        }
        self.settle(state);
    }

    /// A command that stays with the controller, and does not keep it from being idle.
    pub(super) fn keep(state: &mut State) {
        state.in_flight = state.in_flight.saturating_sub(1);
    }

    fn post(&self, state: &mut State, ticket: Ticket, result: u32, status: Status) {
        if !self.endpoint.is_bus_master() {
            state.postponed.push(Postponed { ticket, result, status: status.0 });
            return;
        }
        let Some((submission, completion)) = state.pair(ticket.queue) else { return };
        submission.in_flight = submission.in_flight.saturating_sub(1);
        let drained = submission.deleted_by.filter(|_| submission.in_flight == 0);
        let (head, vector) = (submission.head, completion.vector);
        if completion.post(&self.memory, ticket, head, result, status).is_err() {
            state.csts |= csts::FATAL;
        }
        if let Some(vector) = vector {
            self.endpoint.notify(vector);
        }
        self.update_pin(state);
        if let Some(id) = drained {
            if let Some(queue) = state.submissions.get_mut(usize::from(ticket.queue)) {
                *queue = None;
            }
            self.post(state, Ticket { queue: 0, id, namespace: 0 }, 0, Status::SUCCESS);
        }
    }

    /// Reports events for which there are requests and room.
    pub(super) fn deliver_events(&self, state: &mut State) {
        while state.is_running() && self.endpoint.is_bus_master() && state.events.is_due() {
            let Some((submission, completion)) = state.pair(0) else { return };
            if !completion.reserve() {
                return;
            }
            submission.in_flight += 1;
            if let Some((id, result)) = state.events.next() {
                self.post(state, Ticket { queue: 0, id, namespace: 0 }, result, Status::SUCCESS);
            }
        }
    }

    /// The pin is high while a completion waits in a queue with interrupts and is not masked (7.5.1).
    pub(super) fn update_pin(&self, state: &State) {
        let waits = || state.completions.iter().flatten().any(|q| q.vector.is_some() && q.used() > 0);
        let level = !self.endpoint.uses_messages() && state.intms & 1 == 0 && waits();
        self.endpoint.set_interrupt(level);
    }

    /// Goes on after the function has become bus master.
    pub(super) fn resume(&self) {
        let mut state = lock(&self.state);
        for Postponed { ticket, result, status } in std::mem::take(&mut state.postponed) {
            self.post(&mut state, ticket, result, Status(status));
        }
        self.deliver_events(&mut state);
        let queues = state.submissions.len() as u16;
        drop(state);
        (0..queues).for_each(|queue| self.process(queue));
    }

    /// What waits until nothing is in flight: a reset, the flush of a shutdown, a thread.
    pub(super) fn settle(&self, mut state: MutexGuard<'_, State>) {
        if state.in_flight > 0 {
            return;
        }
        self.idle.notify_all();
        match state.shutdown {
            Shutdown::Draining => {
                state.shutdown = Shutdown::Flushing;
                state.in_flight = self.namespaces.len() as u32;
                drop(state);
                return self.flush_all();
            }
            Shutdown::Flushing => {
                state.shutdown = Shutdown::None;
                state.csts = state.csts & !csts::SHUTDOWN | csts::SHUTDOWN_COMPLETE;
            }
            Shutdown::None => (),
        }
        if state.resetting {
            state.controller_reset(self.config.queues);
            if state.cc & cc::ENABLE != 0 {
                self.enable(&mut state);
            }
            self.update_pin(&state);
        }
    }

    fn flush_all(&self) {
        let Some(me) = self.me.upgrade() else { return };
        for namespace in &self.namespaces {
            let me = Arc::clone(&me);
            let done = Box::new(move |_| {
                // Whether it worked cannot be told any more; the user has been.
                let mut state = lock(&me.state);
                state.in_flight = state.in_flight.saturating_sub(1);
                me.settle(state);
            });
            namespace.disk.submit(Request { operation: Operation::Flush, done });
            namespace.disk.kick();
        }
    }

    /// Gives up what disks hold back: a reset waits for what is in flight, which limits can hold back for long.
    pub(super) fn abandon(&self) {
        self.namespaces.iter().for_each(|namespace| namespace.disk.abandon());
    }

    /// Waits until no command is in flight. The guest must not be running.
    pub(super) fn wait_idle(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        while state.in_flight > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}
