//! Another end of a link made of bytes: the entry for a fuzzer.
//!
//! Bytes become what such an end may write into the memory of the rings, at any time between what our end does. What must hold
//! is asserted: nothing panics or hangs, a message that is received has a length that it can have, there are no more of them than a ring
//! holds, and a broken rule ends the link for good.

use std::io::{ErrorKind, IoSlice};
use std::os::fd::OwnedFd;

use rustix::event::PollFlags;

use crate::link::Link;
use crate::ring::Place;
use crate::rings::{Rings, places, size};

/// Small, so that few bytes fill a ring.
const LONGEST: usize = 100;
const CAPACITY: usize = Place::capacity_for(LONGEST);
/// The most messages that a ring holds: each takes eight bytes.
const MOST: usize = CAPACITY / 8;

struct Playground {
    rings: Rings,
    socket: OwnedFd,
    /// A rule was broken.
    over: bool,
}

impl Playground {
    /// Notes an error of our end, which is there for good.
    fn note(&mut self, kind: Option<ErrorKind>) {
        match kind {
            Some(ErrorKind::InvalidData) => self.over = true,
            kind => assert!(!self.over, "{kind:?} after a broken rule"),
        }
        assert_eq!(self.over, self.rings.fault().is_some());
    }

    fn receive(&mut self, room: usize) {
        let mut buffer = vec![0; room];
        let mut count = 0;
        loop {
            match self.rings.receive(&self.socket, &mut buffer) {
                Ok(len) => {
                    let len = len.expect("nobody has hung up");
                    assert!(len <= LONGEST && len <= room && (len > 0 || room == 0), "{len} bytes");
                    self.note(None);
                }
                Err(error) => return self.note(Some(error.kind())),
            }
            count += 1;
            assert!(count <= MOST, "more messages than there can be");
        }
    }

    fn send(&mut self, len: usize, times: usize) {
        for _ in 0..times {
            let result = self.rings.send(&self.socket, &[IoSlice::new(&vec![7; len])]);
            match result.map_err(|error| error.kind()) {
                Err(ErrorKind::InvalidInput) => assert!(len == 0 || len > LONGEST),
                Err(kind) => return self.note(Some(kind)),
                Ok(()) => self.note(None),
            }
        }
    }

    fn sleep(&mut self, options: u8) {
        let wanted = PollFlags::from_bits_truncate(u16::from(options)) & (PollFlags::IN | PollFlags::OUT);
        let ready = if options & 2 == 0 {
            self.rings.before_sleep(&self.socket, wanted)
        } else {
            self.rings.after_sleep(&self.socket, wanted, options & 8 != 0)
        };
        self.over |= self.rings.fault().is_some();
        assert!((wanted | PollFlags::HUP).contains(ready));
        assert_eq!(self.over, ready.contains(PollFlags::HUP));
    }
}

/// Lets an end that does what `input` says loose on one of ours.
///
/// # Panics
/// If there are no sockets or no memory, or when something that must hold does not.
pub fn run(input: &[u8]) {
    let (link, other) = Link::pair().expect("a link");
    let (memory, _) = ringfence_memory::SharedMemory::create("fuzz", size(LONGEST)).expect("memory");
    let [out, inward] = places(memory, LONGEST);
    let hostile = [inward.clone(), out.clone()];
    let mut playground =
        Playground { rings: Rings::new(out, inward), socket: link.into_socket(), over: false };
    let mut bytes = input.iter().copied();
    while let Some(action) = bytes.next() {
        let mut byte = || bytes.next().unwrap_or(0);
        let ring = &hostile[usize::from(action >> 3 & 1)];
        match action % 8 {
            // A count near those that are likely, or any word.
            0 => ring.scribble(action >> 4 & 1, u32::from(byte()) * 8),
            1 => ring.scribble(action >> 4, u32::from_le_bytes([byte(), byte(), byte(), byte()])),
            // A length at a place where one may be, and anything anywhere.
            2 => ring.scatter(CAPACITY + usize::from(byte()) * 8, &u32::from(byte()).to_le_bytes()),
            3 => {
                let (at, len) = (usize::from(byte()) << 2 | usize::from(action >> 6), byte() & 31);
                let scattered: Vec<u8> = (0..len).map(|_| byte()).collect();
                ring.scatter(at, &scattered);
            }
            4 => playground.receive(usize::from(byte())),
            5 => playground.send(usize::from(byte() & 0x7f), usize::from(action >> 3) + 1),
            6 => playground.sleep(byte()),
            _ => {
                let _ = other.send(&[IoSlice::new(&[byte()])]);
            }
        }
    }
    playground.receive(LONGEST);
}

/// So many inputs of `len` arbitrary bytes each, the same ones every time: what tests try without a fuzzer.
pub fn inputs(count: usize, len: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut state = 1_u64;
    let mut byte = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..count).map(move |_| (0..len).map(|_| byte()).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn arbitrary_input_does_no_harm() {
        super::inputs(3000, 400).for_each(|input| super::run(&input));
    }
}
