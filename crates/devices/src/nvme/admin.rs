//! Admin commands (5).

use ringfence_disk::{Access, Buffers};
use ringfence_memory::GuestAddress;

use super::command::{Command, Outcome, Ticket};
use super::events::{Kind, TEMPERATURE_THRESHOLD};
use super::queue::{Completion, Submission};
use super::spec::{
    ALL_NAMESPACES, COMMAND_SIZE, COMPLETION_SIZE, MAX_ENTRIES, MAX_TRANSFER, PAGE, Status, admin, cc,
};
use super::state::State;
use super::{Controller, Namespace, identify, prp};
use crate::device::lock;

/// The result of a command, or `None` if its completion comes later.
type Answer = Result<Option<u32>, Status>;

/// Queue creation flags: physically contiguous, interrupts enabled.
const CONTIGUOUS: u32 = 1;
const INTERRUPTS: u32 = 1 << 1;

impl Controller {
    pub(super) fn run_admin(&self, command: &Command, ticket: Ticket) {
        let answer = command.check_form().and_then(|()| self.admin(command, ticket));
        match answer {
            Ok(Some(result)) => self.complete(ticket, Outcome::done(result)),
            Ok(None) => (),
            Err(status) => self.complete(ticket, Outcome::failed(status)),
        }
    }

    fn admin(&self, command: &Command, ticket: Ticket) -> Answer {
        match command.opcode() {
            admin::CREATE_CQ => self.create_cq(command),
            admin::CREATE_SQ => self.create_sq(command),
            admin::DELETE_CQ => self.delete_cq(command),
            admin::DELETE_SQ => self.delete_sq(command),
            admin::IDENTIFY => self.identify(command),
            admin::GET_LOG_PAGE => self.get_log_page(command),
            admin::GET_FEATURES => {
                let (feature, word) = (command.cdw10(), command.cdw11());
                lock(&self.state).features.get(feature, word).map(Some)
            }
            admin::SET_FEATURES => self.set_features(command, ticket),
            admin::ABORT => self.abort(command),
            admin::ASYNC_EVENT_REQUEST => self.hold_event_request(command),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Identifier and entries of a queue to be made, if it can be.
    fn queue_shape(&self, state: &State, command: &Command, entry: u64) -> Result<(u16, u32), Status> {
        let (id, size) = (command.cdw10() as u16, (command.cdw10() >> 16) + 1);
        if id == 0 || id > state.features.queues {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if !(2..=MAX_ENTRIES).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if command.cdw11() & CONTIGUOUS == 0 || state.cc & cc::ENTRY_SIZES != cc::ENTRY_SIZES_KNOWN {
            return Err(Status::INVALID_FIELD);
        }
        if !command.prp1().is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        if !self.memory.holds(GuestAddress(command.prp1()), u64::from(size) * entry, true) {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        Ok((id, size))
    }

    fn create_cq(&self, command: &Command) -> Answer {
        let mut state = lock(&self.state);
        let (id, size) = self.queue_shape(&state, command, COMPLETION_SIZE)?;
        let vector = (command.cdw11() >> 16) as u16;
        if vector > self.config.queues {
            return Err(Status::INVALID_VECTOR);
        }
        let vector = (command.cdw11() & INTERRUPTS != 0).then_some(vector);
        match state.completions.get_mut(usize::from(id)) {
            Some(place) if place.is_none() => *place = Some(Completion::new(command.prp1(), size, vector)),
            _ => return Err(Status::INVALID_QUEUE_ID),
        }
        Ok(Some(0))
    }

    fn create_sq(&self, command: &Command) -> Answer {
        let mut state = lock(&self.state);
        let (id, size) = self.queue_shape(&state, command, COMMAND_SIZE)?;
        let completion = (command.cdw11() >> 16) as u16;
        if completion == 0 || completion > state.features.queues {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if state.completion(completion).is_none() {
            return Err(Status::CQ_INVALID);
        }
        match state.submissions.get_mut(usize::from(id)) {
            Some(place) if place.is_none() => {
                *place = Some(Submission::new(command.prp1(), size, completion))
            }
            _ => return Err(Status::INVALID_QUEUE_ID),
        }
        Ok(Some(0))
    }

    fn delete_cq(&self, command: &Command) -> Answer {
        let mut state = lock(&self.state);
        let id = command.cdw10() as u16;
        if id == 0 || state.completion(id).is_none() {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if state.submissions.iter().flatten().any(|queue| queue.completion == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        if let Some(place) = state.completions.get_mut(usize::from(id)) {
            *place = None;
        }
        self.update_pin(&state);
        Ok(Some(0))
    }

    /// Takes no more commands from a queue; it is gone when those taken are done.
    fn delete_sq(&self, command: &Command) -> Answer {
        let mut state = lock(&self.state);
        let id = command.cdw10() as u16;
        let queue = state.submission(id).filter(|queue| id != 0 && queue.deleted_by.is_none());
        let queue = queue.ok_or(Status::INVALID_QUEUE_ID)?;
        if queue.in_flight > 0 {
            queue.deleted_by = Some(command.id());
            Self::keep(&mut state);
            self.settle(state);
            return Ok(None);
        }
        if let Some(place) = state.submissions.get_mut(usize::from(id)) {
            *place = None;
        }
        Ok(Some(0))
    }

    /// Copies data to where a command wants it.
    fn send(&self, command: &Command, data: &[u8]) -> Result<(), Status> {
        let pieces = prp::pieces(&self.memory, command.prp1(), command.prp2(), data.len() as u64)?;
        let buffers = Buffers::guest(&self.memory, Access::Fill, pieces);
        let buffers = buffers.map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        buffers.copy_from(0, data);
        buffers.written();
        Ok(())
    }

    pub(super) fn namespace(&self, id: u32) -> Result<(usize, &Namespace), Status> {
        let index = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        let found = index.and_then(|index| Some((index, self.namespaces.get(index)?)));
        found.ok_or(Status::INVALID_NAMESPACE)
    }

    fn identify(&self, command: &Command) -> Answer {
        let id = command.namespace();
        let data = match command.cdw10() as u8 {
            0 => identify::namespace(self.namespace(id)?.1),
            1 => identify::controller(&self.config, self.namespaces.len()),
            2 if id >= ALL_NAMESPACES - 1 => return Err(Status::INVALID_NAMESPACE),
            2 => identify::active_list(id, self.namespaces.len()),
            3 => identify::descriptors(self.namespace(id)?.1),
            _ => return Err(Status::INVALID_FIELD),
        };
        self.send(command, &data)?;
        Ok(Some(0))
    }

    fn get_log_page(&self, command: &Command) -> Answer {
        const RETAIN: u32 = 1 << 15;
        let id = command.cdw10() as u8;
        let words = u64::from(command.cdw11() & 0xffff) << 16 | u64::from(command.cdw10() >> 16);
        let len = (words + 1) * 4;
        let offset = u64::from(command.cdw13()) << 32 | u64::from(command.cdw12());
        if len > MAX_TRANSFER || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        let state = lock(&self.state);
        let page = state.logs.page(id, &state.features).ok_or(Status::INVALID_LOG_PAGE)?;
        drop(state);
        let start = usize::try_from(offset).ok().filter(|start| *start < page.len());
        let mut data: Vec<u8> = page.into_iter().skip(start.ok_or(Status::INVALID_FIELD)?).collect();
        // What lies past the end of a log is not defined; it is zero here.
        data.resize(len as usize, 0);
        self.send(command, &data)?;
        if command.cdw10() & RETAIN == 0 {
            let mut state = lock(&self.state);
            state.events.log_read(id);
            self.deliver_events(&mut state);
        }
        Ok(Some(0))
    }

    fn set_features(&self, command: &Command, ticket: Ticket) -> Answer {
        let mut state = lock(&self.state);
        let before = state.features.critical_warning();
        let cached = state.features.write_cache;
        let has_queues = state.has_io_queues();
        let (feature, word) = (command.cdw10(), command.cdw11());
        let result = state.features.set(feature, word, self.config.queues, has_queues)?;
        let warning = state.features.critical_warning();
        if warning & !before & state.features.events as u8 != 0 {
            state.events.raise(Kind::Health, TEMPERATURE_THRESHOLD);
            self.deliver_events(&mut state);
        }
        if cached && !state.features.write_cache {
            drop(state);
            // The guest sends no flush from now on, so what the cache holds has to go now.
            self.flush_every(ticket);
            self.namespaces.iter().for_each(|namespace| namespace.disk.kick());
            return Ok(None);
        }
        Ok(Some(result))
    }

    /// Only event requests can be aborted; anything else is already with the host. Bit 0 of the result says "not
    /// aborted".
    fn abort(&self, command: &Command) -> Answer {
        let (queue, id) = (command.cdw10() as u16, (command.cdw10() >> 16) as u16);
        let mut state = lock(&self.state);
        if queue != 0 || !state.events.abort(id) {
            return Ok(Some(1));
        }
        // The request is an ordinary command again, which ends now, if there is room for its completion: the
        // entry of this very command is taken, so there may be none.
        let reserved = state.pair(0).is_some_and(|(submission, completion)| {
            let room = completion.reserve();
            submission.in_flight += u32::from(room);
            room
        });
        if !reserved {
            state.events.hold(id);
            return Ok(Some(1));
        }
        state.in_flight += 1;
        drop(state);
        self.complete(Ticket { queue: 0, id, namespace: 0 }, Outcome::failed(Status::ABORT_REQUESTED));
        Ok(Some(0))
    }

    fn hold_event_request(&self, command: &Command) -> Answer {
        let mut state = lock(&self.state);
        if !state.events.hold(command.id()) {
            return Err(Status::TOO_MANY_EVENT_REQUESTS);
        }
        // It waits without an entry of the completion queue; a small queue would be full of such requests.
        if let Some((submission, completion)) = state.pair(0) {
            submission.in_flight = submission.in_flight.saturating_sub(1);
            completion.reserved = completion.reserved.saturating_sub(1);
        }
        Self::keep(&mut state);
        self.deliver_events(&mut state);
        self.settle(state);
        Ok(None)
    }
}
