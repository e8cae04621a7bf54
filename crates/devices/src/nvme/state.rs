//! The controller's state: registers, queues and what is under way.

use serde::{Deserialize, Serialize};

use super::command::Ticket;
use super::events::Events;
use super::features::Features;
use super::log::Logs;
use super::queue::{Completion, Submission};
use super::spec::csts;

/// A completion that could not be posted, since the function was not bus master.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Postponed {
    pub(super) ticket: Ticket,
    pub(super) result: u32,
    pub(super) status: u16,
}

/// How far a shutdown is (7.6.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Shutdown {
    #[default]
    None,
    /// Commands are in flight; the flush comes when they are done.
    Draining,
    /// The disks are being flushed.
    Flushing,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) cc: u32,
    pub(super) csts: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    /// The pin's interrupt mask; only bit 0 has an effect.
    pub(super) intms: u32,
    /// By identifier; 0 is the admin queue.
    pub(super) submissions: Vec<Option<Submission>>,
    pub(super) completions: Vec<Option<Completion>>,
    pub(super) features: Features,
    pub(super) events: Events,
    pub(super) logs: Logs,
    pub(super) postponed: Vec<Postponed>,
    /// Commands taken whose outcome is not known, and flushes of a shutdown.
    pub(super) in_flight: u32,
    /// The guest has disabled the controller, which takes effect when nothing is in flight.
    pub(super) resetting: bool,
    pub(super) shutdown: Shutdown,
}

impl State {
    pub(super) fn new(queues: u16) -> Self {
        let count = usize::from(queues) + 1;
        Self {
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            intms: 0,
            submissions: vec![None; count],
            completions: vec![None; count],
            features: Features::new(queues),
            events: Events::default(),
            logs: Logs::default(),
            postponed: Vec::new(),
            in_flight: 0,
            resetting: false,
            shutdown: Shutdown::None,
        }
    }

    /// Everything but what the logs remember, as after power on.
    pub(super) fn power_on(&mut self, queues: u16) {
        let logs = std::mem::take(&mut self.logs);
        *self = Self { logs, ..Self::new(queues) };
    }

    /// What a controller reset does (7.3.2): the admin queue's registers stay.
    pub(super) fn controller_reset(&mut self, queues: u16) {
        let Self { cc, aqa, asq, acq, .. } = *self;
        self.power_on(queues);
        (self.cc, self.aqa, self.asq, self.acq) = (cc, aqa, asq, acq);
    }

    /// Whether commands are taken.
    pub(super) fn is_running(&self) -> bool {
        const STATUS: u32 = csts::READY | csts::FATAL;
        self.csts & STATUS == csts::READY
            && !self.resetting
            && self.csts & csts::SHUTDOWN != csts::SHUTDOWN_COMPLETE
    }

    pub(super) fn submission(&mut self, id: u16) -> Option<&mut Submission> {
        self.submissions.get_mut(usize::from(id)).and_then(Option::as_mut)
    }

    pub(super) fn completion(&mut self, id: u16) -> Option<&mut Completion> {
        self.completions.get_mut(usize::from(id)).and_then(Option::as_mut)
    }

    /// A submission queue and where its completions go.
    pub(super) fn pair(&mut self, id: u16) -> Option<(&mut Submission, &mut Completion)> {
        let submission = self.submissions.get_mut(usize::from(id)).and_then(Option::as_mut)?;
        let at = usize::from(submission.completion);
        let completion = self.completions.get_mut(at).and_then(Option::as_mut)?;
        Some((submission, completion))
    }

    /// Whether there is any queue beside the admin queue.
    pub(super) fn has_io_queues(&self) -> bool {
        let some = |queues: usize| queues > 0;
        some(self.submissions.iter().skip(1).flatten().count())
            || some(self.completions.iter().skip(1).flatten().count())
    }
}
