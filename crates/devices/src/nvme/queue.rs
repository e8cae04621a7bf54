//! Submission and completion queues (4.1).

use ringfence_memory::{GuestAddress, GuestMemory, MemoryError};
use serde::{Deserialize, Serialize};

use super::command::{Command, Ticket};
use super::spec::{COMMAND_SIZE, COMPLETION_SIZE, Status};

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Submission {
    /// Guest address of the first entry.
    pub(super) base: u64,
    /// Entries.
    pub(super) size: u32,
    /// The next entry to take.
    pub(super) head: u32,
    /// One past the last entry that the guest has filled.
    pub(super) tail: u32,
    /// Where its completions go.
    pub(super) completion: u16,
    /// Commands taken and not completed.
    #[serde(skip)]
    pub(super) in_flight: u32,
    /// The command that deletes it and waits for those in flight; no more are taken.
    pub(super) deleted_by: Option<u16>,
}

impl Submission {
    pub(super) fn new(base: u64, size: u32, completion: u16) -> Self {
        Self { base, size, head: 0, tail: 0, completion, in_flight: 0, deleted_by: None }
    }

    pub(super) fn has_commands(&self) -> bool {
        self.head != self.tail && self.deleted_by.is_none()
    }

    /// Takes the next entry.
    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Command, MemoryError> {
        let mut bytes = [0; COMMAND_SIZE as usize];
        let at = self.base.wrapping_add(u64::from(self.head) * COMMAND_SIZE);
        memory.read_bytes(GuestAddress(at), &mut bytes)?;
        self.head = next(self.head, self.size);
        self.in_flight += 1;
        Ok(Command::parse(&bytes))
    }
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Completion {
    /// Guest address of the first entry.
    pub(super) base: u64,
    /// Entries.
    pub(super) size: u32,
    /// The next entry that the guest will look at.
    pub(super) head: u32,
    /// The next entry to fill.
    pub(super) tail: u32,
    /// The phase tag of this round.
    pub(super) phase: bool,
    /// The interrupt vector, if it has interrupts.
    pub(super) vector: Option<u16>,
    /// Entries kept for commands that have been taken, so that every completion finds room.
    #[serde(skip)]
    pub(super) reserved: u32,
}

impl Completion {
    pub(super) fn new(base: u64, size: u32, vector: Option<u16>) -> Self {
        Self { base, size, head: 0, tail: 0, phase: true, vector, reserved: 0 }
    }

    /// Entries that the guest has not taken.
    pub(super) fn used(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.tail + self.size - self.head }
    }

    /// Keeps an entry for a command, if one is free.
    pub(super) fn reserve(&mut self) -> bool {
        let free = self.used() + self.reserved < self.size - 1;
        self.reserved += u32::from(free);
        free
    }

    /// Takes over the guest's head. Returns whether it lies between the old one and the tail.
    pub(super) fn set_head(&mut self, head: u32) -> bool {
        let ahead = |from: u32, to: u32| if to >= from { to - from } else { to + self.size - from };
        let valid = head < self.size && ahead(self.head, head) <= self.used();
        if valid {
            self.head = head;
        }
        valid
    }

    /// Fills a reserved entry. The half with the phase tag is stored last and at once: the guest may be polling.
    pub(super) fn post(
        &mut self,
        memory: &GuestMemory,
        ticket: Ticket,
        submission_head: u32,
        result: u32,
        status: Status,
    ) -> Result<(), MemoryError> {
        self.reserved = self.reserved.saturating_sub(1);
        let at = GuestAddress(self.base.wrapping_add(u64::from(self.tail) * COMPLETION_SIZE));
        let third = u32::from(ticket.queue) << 16 | submission_head;
        let fourth = u32::from(status.0) << 17 | u32::from(self.phase) << 16 | u32::from(ticket.id);
        memory.write(at, u64::from(result))?;
        memory.write(GuestAddress(at.0.wrapping_add(8)), u64::from(fourth) << 32 | u64::from(third))?;
        self.tail = next(self.tail, self.size);
        self.phase ^= self.tail == 0;
        Ok(())
    }
}

fn next(index: u32, size: u32) -> u32 {
    if index + 1 >= size { 0 } else { index + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_reserved_and_used_never_fill_the_queue() {
        let memory = GuestMemory::flat(0x1000).unwrap();
        let mut queue = Completion::new(0, 4, None);
        let ticket = Ticket { queue: 1, id: 7, namespace: 1 };
        let post = |queue: &mut Completion| queue.post(&memory, ticket, 0, 0, Status::SUCCESS).unwrap();
        assert_eq!([(); 4].map(|()| queue.reserve()), [true, true, true, false]);
        (0..3).for_each(|_| post(&mut queue));
        assert!(!queue.reserve() && queue.used() == 3 && queue.phase);
        assert!(!queue.set_head(4), "no such entry");
        assert!(queue.set_head(2) && queue.set_head(2));
        assert!(!queue.set_head(1), "backwards");
        assert!(!queue.set_head(0), "past the tail");
        assert!(queue.reserve());
        post(&mut queue);
        assert!(!queue.phase && queue.tail == 0 && queue.used() == 2);
        assert!(queue.set_head(0) && queue.used() == 0);
        assert_eq!(memory.read::<u64>(GuestAddress(8)).unwrap(), 0x0001_0007_0001_0000);
    }
}
