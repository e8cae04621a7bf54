//! The controller's registers and doorbells (3.1).

use std::sync::MutexGuard;

use ringfence_memory::GuestAddress;

use super::events::{INVALID_DOORBELL, INVALID_DOORBELL_VALUE, Kind};
use super::queue::{Completion, Submission};
use super::spec::{COMMAND_SIZE, COMPLETION_SIZE, MAX_ADMIN_ENTRIES, MAX_ENTRIES, PAGE, cc, csts, register};
use super::state::{Shutdown, State};
use super::{Controller, VERSION};
use crate::device::lock;

/// CAP: queues of so many entries, contiguous; ready within 20 s; the NVM command set; 4 KiB pages; doorbells
/// side by side.
const CAPABILITIES: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 40 << 24 | 1 << 37;

impl Controller {
    /// Reads of any size within the registers; they see 4-byte registers.
    pub(super) fn read_registers(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (byte, at) in data.iter_mut().zip(offset..) {
            let [a, b, c, d] = self.register(&state, at & !3).to_le_bytes();
            *byte = [a, b, c, d][(at & 3) as usize];
        }
    }

    fn register(&self, state: &State, offset: u64) -> u32 {
        let high = |value: u64| (value >> 32) as u32;
        match offset {
            register::CAP => CAPABILITIES as u32,
            0x04 => high(CAPABILITIES),
            register::VS => VERSION,
            register::INTMS | register::INTMC => state.intms,
            register::CC => state.cc,
            register::CSTS => state.csts,
            register::AQA => state.aqa,
            register::ASQ => state.asq as u32,
            0x2c => high(state.asq),
            register::ACQ => state.acq as u32,
            0x34 => high(state.acq),
            _ => 0,
        }
    }

    /// Writes of one or two whole 4-byte registers; others are not defined and dropped.
    pub(super) fn write_registers(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        for (bytes, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            if let &[a, b, c, d] = bytes {
                self.write_register(at, u32::from_le_bytes([a, b, c, d]));
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset >= register::DOORBELLS {
            return self.doorbell((offset - register::DOORBELLS) / 4, value);
        }
        let mut state = lock(&self.state);
        let low = |register: u64| register & !0xffff_ffff | u64::from(value) & !(PAGE - 1);
        let high = |register: u64| register & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            register::INTMS => state.intms |= value,
            register::INTMC => state.intms &= !value,
            register::CC => return self.set_configuration(state, value & cc::ALL),
            register::AQA => state.aqa = value & 0x0fff_0fff,
            register::ASQ => state.asq = low(state.asq),
            0x2c => state.asq = high(state.asq),
            register::ACQ => state.acq = low(state.acq),
            0x34 => state.acq = high(state.acq),
            _ => return,
        }
        self.update_pin(&state);
    }

    fn set_configuration(&self, mut state: MutexGuard<'_, State>, value: u32) {
        let old = std::mem::replace(&mut state.cc, value);
        if old & cc::SHUTDOWN == 0 && value & cc::SHUTDOWN != 0 && state.csts & csts::SHUTDOWN == 0 {
            state.csts |= csts::SHUTDOWN_OCCURRING;
            state.shutdown = Shutdown::Draining;
        }
        match (old & cc::ENABLE != 0, value & cc::ENABLE != 0) {
            (false, true) if !state.resetting => self.enable(&mut state),
            (true, false) => state.resetting = true,
            _ => (),
        }
        let resetting = state.resetting;
        self.settle(state);
        if resetting {
            self.abandon();
        }
    }

    /// Becomes ready with the admin queue that the registers describe, or says that it cannot.
    pub(super) fn enable(&self, state: &mut State) {
        let submission = Submission::new(state.asq, (state.aqa & 0xfff) + 1, 0);
        let completion = Completion::new(state.acq, (state.aqa >> 16) + 1, Some(0));
        let fits = |base, size, entry| {
            (2..=MAX_ADMIN_ENTRIES).contains(&size)
                && self.memory.holds(GuestAddress(base), u64::from(size) * entry, true)
        };
        let valid = state.cc & cc::MODE == 0
            && fits(submission.base, submission.size, COMMAND_SIZE)
            && fits(completion.base, completion.size, COMPLETION_SIZE);
        state.csts = if valid { csts::READY } else { csts::FATAL };
        state.shutdown = Shutdown::None;
        if let (true, Some(sq), Some(cq)) =
            (valid, state.submissions.first_mut(), state.completions.first_mut())
        {
            (*sq, *cq) = (Some(submission), Some(completion));
        }
    }

    /// A doorbell: even ones tell of commands, odd ones of completions taken.
    fn doorbell(&self, index: u64, value: u32) {
        let mut state = lock(&self.state);
        if !state.is_running() {
            return;
        }
        let id = u16::try_from(index / 2).unwrap_or(u16::MAX);
        let wrong = if index.is_multiple_of(2) {
            match state.submission(id) {
                None => Some(INVALID_DOORBELL),
                Some(queue) if value >= queue.size => Some(INVALID_DOORBELL_VALUE),
                Some(queue) => {
                    queue.tail = value;
                    None
                }
            }
        } else {
            match state.completion(id) {
                None => Some(INVALID_DOORBELL),
                Some(queue) => (!queue.set_head(value)).then_some(INVALID_DOORBELL_VALUE),
            }
        };
        if let Some(what) = wrong {
            state.events.raise(Kind::Error, what);
            return self.deliver_events(&mut state);
        }
        if index.is_multiple_of(2) {
            drop(state);
            self.process(id);
        } else {
            self.update_pin(&state);
            if id == 0 {
                self.deliver_events(&mut state);
            }
            // Queues whose commands waited for room for their completions.
            let waiting: Vec<u16> = (0..)
                .zip(&state.submissions)
                .filter(|(_, q)| q.as_ref().is_some_and(|q| q.completion == id && q.has_commands()))
                .map(|(id, _)| id)
                .collect();
            drop(state);
            waiting.into_iter().for_each(|id| self.process(id));
        }
    }
}
