//! One direction of packets through memory that is shared with a process that is not trusted.
//!
//! One side sends, the other receives. A packet is its length in four bytes and then its bytes, filled up to a multiple of eight; it may
//! go on at the ring's start. `TAIL` counts the bytes that were ever sent, `HEAD` those that were taken out, both modulo 2^32, and each
//! is written by one side only, which has its own in memory of its own and never reads it back.
//!
//! Whatever the other side has written is read once, and checked against what this side knows: a count can only go forwards, and not past
//! the other; a length is that of a packet that is there as a whole. Bytes are copied out before anybody looks at them.
//! A side that finds a rule broken has a [`RingError`], and the ring is of no more use.
//!
//! A side that is going to sleep says so (`SLEEPING` for packets, `BLOCKED` for room), and looks once more; the other one
//! looks there after each change, and rings the bell at most once for each sleep. Writing and then looking is done by both, with a
//! [`SharedMemory::settle`] between, so one of them sees the other.

use std::io::IoSlice;
use std::sync::Arc;

use ringfence_memory::SharedMemory;

/// The words, each in a cache line of its own, and what they take.
const TAIL: usize = 0;
const HEAD: usize = 64;
const SLEEPING: usize = 128;
const BLOCKED: usize = 192;
pub(crate) const WORDS: usize = 256;

const HEADER: usize = 4;
const ALIGNMENT: usize = 8;

/// A rule that the other side has broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More than the ring holds, less than there was, or no whole packets.
    #[error("the other end of the link says that {0:#x} bytes are in a ring where that cannot be")]
    Sent(u32),
    /// More than was sent, or less than before.
    #[error("the other end of the link says that {0:#x} bytes are left in a ring where that cannot be")]
    Taken(u32),
    /// No packet has that length, or it is not there as a whole.
    #[error("the other end of the link sent a packet that says it has {0} bytes")]
    Length(u32),
}

/// What a packet of `len` bytes takes.
const fn record(len: usize) -> usize {
    (HEADER + len).next_multiple_of(ALIGNMENT)
}

/// Where a ring is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) memory: Arc<SharedMemory>,
    /// Offset of the words.
    pub(crate) words: usize,
    /// Offset of the packets.
    pub(crate) packets: usize,
    /// Bytes of the longest packet.
    pub(crate) longest: usize,
}

impl Place {
    /// Bytes for packets in a ring: a power of two of which half has room for two of the longest.
    pub(crate) const fn capacity_for(longest: usize) -> usize {
        (record(longest) * 4).next_power_of_two()
    }

    fn capacity(&self) -> u32 {
        Self::capacity_for(self.longest) as u32
    }

    fn word(&self, word: usize) -> u32 {
        self.memory.load(self.words + word)
    }

    fn set(&self, word: usize, value: u32) {
        self.memory.store(self.words + word, value);
    }

    /// Where the byte with this count is.
    fn offset(&self, count: u32) -> usize {
        self.packets + (count & (self.capacity() - 1)) as usize
    }

    /// Where `len` bytes are from the one with this count on, and how many of them before the ring's end.
    fn pieces(&self, count: u32, len: usize) -> (usize, usize) {
        let at = self.offset(count);
        (at, len.min(self.packets + self.capacity() as usize - at))
    }

    fn write(&self, count: u32, bytes: &[u8]) {
        let (at, first) = self.pieces(count, bytes.len());
        self.memory.write(at, &bytes[..first]);
        self.memory.write(self.packets, &bytes[first..]);
    }

    fn read(&self, count: u32, bytes: &mut [u8]) {
        let (at, first) = self.pieces(count, bytes.len());
        let (before, after) = bytes.split_at_mut(first);
        self.memory.read(at, before);
        self.memory.read(self.packets, after);
    }

    /// Whether the bell has to be rung for who said so in `word`, which it then has been.
    fn must_ring(&self, word: usize) -> bool {
        let asked = self.word(word) != 0;
        if asked {
            self.set(word, 0);
        }
        asked
    }
}

/// The side that sends.
#[derive(Debug)]
pub(crate) struct Sender {
    place: Place,
    tail: u32,
    /// What the other side had taken out when we last looked.
    head: u32,
}

impl Sender {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, tail: 0, head: 0 }
    }

    /// Bytes of packets that wait.
    fn used(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    /// Looks what the other side has taken out.
    fn look(&mut self) -> Result<(), RingError> {
        let head = self.place.word(HEAD);
        let used = self.tail.wrapping_sub(head);
        if used > self.used() || !used.is_multiple_of(ALIGNMENT as u32) {
            return Err(RingError::Taken(used));
        }
        self.head = head;
        Ok(())
    }

    /// Sends a packet of 1 to `longest` bytes in pieces, which the caller vouches for: whether the bell has to be rung. `None` if
    /// there is no room.
    pub(crate) fn send(&mut self, pieces: &[IoSlice<'_>], len: usize) -> Result<Option<bool>, RingError> {
        let whole = record(len) as u32;
        let capacity = self.place.capacity();
        if self.used() + whole > capacity {
            self.look()?;
            if self.used() + whole > capacity {
                return Ok(None);
            }
        }
        // Never cut in two: the ring's length is a multiple of the alignment.
        self.place.memory.store(self.place.offset(self.tail), len as u32);
        let mut at = self.tail.wrapping_add(HEADER as u32);
        for piece in pieces {
            self.place.write(at, piece);
            at = at.wrapping_add(piece.len() as u32);
        }
        self.tail = self.tail.wrapping_add(whole);
        self.place.set(TAIL, self.tail);
        self.place.memory.settle();
        Ok(Some(self.place.must_ring(SLEEPING)))
    }

    /// Whether half of the ring is free, which is more than any packet takes.
    pub(crate) fn has_room(&mut self) -> Result<bool, RingError> {
        self.look()?;
        Ok(self.used() <= self.place.capacity() / 2)
    }

    /// The same before going to sleep: if not, the other side will ring the bell when it is.
    pub(crate) fn ask_for_room(&mut self) -> Result<bool, RingError> {
        self.place.set(BLOCKED, 1);
        self.place.memory.settle();
        self.has_room()
    }
}

/// The side that receives.
#[derive(Debug)]
pub(crate) struct Receiver {
    place: Place,
    head: u32,
    /// What the other side had sent when we last looked.
    tail: u32,
}

impl Receiver {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, head: 0, tail: 0 }
    }

    /// Bytes of packets that wait.
    fn used(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    /// Looks what the other side has sent, when all that was known of is taken out: less would be more than a ring holds.
    fn look(&mut self) -> Result<(), RingError> {
        let tail = self.place.word(TAIL);
        let used = tail.wrapping_sub(self.head);
        if used > self.place.capacity() || !used.is_multiple_of(ALIGNMENT as u32) {
            return Err(RingError::Sent(used));
        }
        self.tail = tail;
        Ok(())
    }

    /// Takes a packet out, as much of it as `buffer` has room for: how much, and whether the bell has to be rung. `None` if there
    /// is none.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<(usize, bool)>, RingError> {
        if self.used() == 0 {
            self.look()?;
            if self.used() == 0 {
                return Ok(None);
            }
        }
        let said: u32 = self.place.memory.load(self.place.offset(self.head));
        let len = said as usize;
        if len == 0 || len > self.place.longest || record(len) > self.used() as usize {
            return Err(RingError::Length(said));
        }
        let taken = len.min(buffer.len());
        self.place.read(self.head.wrapping_add(HEADER as u32), &mut buffer[..taken]);
        self.head = self.head.wrapping_add(record(len) as u32);
        self.place.set(HEAD, self.head);
        self.place.memory.settle();
        // What has come since we looked is not counted: then the bell may be rung early, and never too late.
        let ring = self.used() <= self.place.capacity() / 2 && self.place.must_ring(BLOCKED);
        Ok(Some((taken, ring)))
    }

    /// Whether a packet waits.
    pub(crate) fn has_packets(&mut self) -> Result<bool, RingError> {
        if self.used() == 0 {
            self.look()?;
        }
        Ok(self.used() != 0)
    }

    /// The same before going to sleep: if not, the other side will ring the bell when one does.
    pub(crate) fn ask_for_packets(&mut self) -> Result<bool, RingError> {
        self.place.set(SLEEPING, 1);
        self.place.memory.settle();
        let any = self.has_packets()?;
        if any {
            self.stay_awake();
        }
        Ok(any)
    }

    /// Nobody has to ring.
    pub(crate) fn stay_awake(&self) {
        self.place.set(SLEEPING, 0);
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod hostile {
    //! What the other side can do to a ring.

    use super::{HEAD, Place, TAIL, WORDS};

    impl Place {
        /// Writes a word of the ring's, of which there are four.
        pub(crate) fn scribble(&self, word: u8, value: u32) {
            self.set([TAIL, HEAD, super::SLEEPING, super::BLOCKED][usize::from(word) % 4], value);
        }

        /// Writes bytes among the packets, or into the words.
        pub(crate) fn scatter(&self, at: usize, bytes: &[u8]) {
            if at < WORDS {
                let len = bytes.len().min(WORDS - at);
                self.memory.write(self.words + at, &bytes[..len]);
            } else {
                self.write(at as u32, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests;
