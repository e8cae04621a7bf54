//! What one machine's CPU asked of the world around it, in order, to be played back to the other's.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ringfence_memory::GuestAddress;

use crate::interp::system::apic_hooks::ApicAccess;

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// IN.
    PortRead(u16),
    /// OUT.
    PortWrite(u16),
    /// A load from a device.
    MemoryRead(GuestAddress),
    /// A store to a device.
    MemoryWrite(GuestAddress),
    /// The local APIC.
    Apic(ApicAccess),
}

impl Place {
    /// The CPU gives the data, rather than getting it.
    fn is_write(self) -> bool {
        use ApicAccess as A;
        match self {
            Self::PortWrite(_) | Self::MemoryWrite(_) => true,
            Self::PortRead(_) | Self::MemoryRead(_) => false,
            Self::Apic(access) => {
                matches!(access, A::PageWrite(_) | A::MsrWrite(_) | A::PriorityWrite)
            }
        }
    }
}

/// One access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) place: Place,
    /// What was written, or what was read.
    pub(super) data: Vec<u8>,
    /// It did not raise #GP(0).
    pub(super) good: bool,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, data, good } = self;
        match place {
            Place::PortRead(port) => write!(f, "read of port {port:#x}")?,
            Place::PortWrite(port) => write!(f, "write to port {port:#x}")?,
            Place::MemoryRead(at) => write!(f, "read of device memory {:#x}", at.0)?,
            Place::MemoryWrite(at) => write!(f, "write to device memory {:#x}", at.0)?,
            Place::Apic(access) => write!(f, "local APIC, {access:x?}")?,
        }
        if place.is_write() {
            write!(f, " of {data:02x?}")?
        } else {
            write!(f, ", {} bytes", data.len())?
        }
        if *good { Ok(()) } else { f.write_str(", which raised #GP") }
    }
}

/// Bytes that a device wrote to memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) address: GuestAddress,
    pub(super) bytes: Vec<u8>,
}

enum Entry {
    Access(Access),
    Transfer(Transfer),
}

#[derive(Default)]
struct Inner {
    entries: VecDeque<Entry>,
    /// The first access that was not the one recorded.
    mismatch: Option<(String, String)>,
}

/// The list. Recorded by one CPU while it runs, then played back to the other.
#[derive(Default)]
pub(super) struct Journal(Mutex<Inner>);

/// What came of playing back one access.
pub(super) struct Played {
    /// It did not raise #GP(0).
    pub(super) good: bool,
    /// What the device wrote to memory meanwhile.
    pub(super) transfers: Vec<Transfer>,
}

impl Inner {
    fn transfers(&mut self) -> Vec<Transfer> {
        let mut found = Vec::new();
        while let Some(Entry::Transfer(_)) = self.entries.front() {
            if let Some(Entry::Transfer(transfer)) = self.entries.pop_front() {
                found.push(transfer);
            }
        }
        found
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An access begins; what the device writes to memory on it will follow. Returns its place in the list.
    pub(super) fn begin(&self, place: Place, data: &[u8]) -> usize {
        let mut inner = self.lock();
        inner.entries.push_back(Entry::Access(Access { place, data: data.to_vec(), good: true }));
        inner.entries.len() - 1
    }

    /// It has ended, with this data.
    pub(super) fn end(&self, index: usize, data: &[u8], good: bool) {
        if let Some(Entry::Access(access)) = self.lock().entries.get_mut(index) {
            access.data.copy_from_slice(data);
            access.good = good;
        }
    }

    /// A device wrote to memory.
    pub(super) fn transfer(&self, address: GuestAddress, bytes: Vec<u8>) {
        self.lock().entries.push_back(Entry::Transfer(Transfer { address, bytes }));
    }

    /// Plays back an access: `data` is what is written, or becomes what was read. An access that was not recorded is
    /// noted as a mismatch and reads as it came.
    pub(super) fn play(&self, place: Place, data: &mut [u8]) -> Played {
        let mut inner = self.lock();
        let matches = match inner.entries.front() {
            Some(Entry::Access(known)) => {
                known.place == place
                    && known.data.len() == data.len()
                    && (!place.is_write() || known.data == data)
            }
            _ => false,
        };
        if !matches {
            let expected = match inner.entries.front() {
                Some(Entry::Access(known)) => known.to_string(),
                _ => "no access".to_owned(),
            };
            let found = Access { place, data: data.to_vec(), good: true }.to_string();
            inner.mismatch.get_or_insert((expected, found));
            return Played { good: true, transfers: Vec::new() };
        }
        let mut good = true;
        if let Some(Entry::Access(known)) = inner.entries.pop_front() {
            data.copy_from_slice(&known.data);
            good = known.good;
        }
        Played { good, transfers: inner.transfers() }
    }

    /// What devices wrote to memory before anything else in the list happened.
    pub(super) fn leading_transfers(&self) -> Vec<Transfer> {
        self.lock().transfers()
    }

    /// Ends a playback: the first access that was not the same on both sides (the recorded one, the other), one that is
    /// missing included. What devices of other threads have written meanwhile stays for the next playback.
    pub(super) fn finish(&self) -> Option<(String, String)> {
        let mut inner = self.lock();
        let missing = inner.entries.iter().find_map(|entry| match entry {
            Entry::Access(access) => Some((access.to_string(), "no access".to_owned())),
            Entry::Transfer(_) => None,
        });
        if !inner.entries.is_empty() {
            inner.entries.retain(|entry| matches!(entry, Entry::Transfer(_)));
        }
        inner.mismatch.take().or(missing)
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        *self.lock() = Inner::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(place: Place, data: &[u8]) -> Journal {
        let journal = Journal::default();
        let index = journal.begin(place, &vec![0xff; data.len()]);
        journal.transfer(GuestAddress(0x5000), vec![1, 2]);
        journal.end(index, data, true);
        journal
    }

    #[test]
    fn read_plays_back_its_data_and_the_transfer_behind_it() {
        let journal = recorded(Place::PortRead(0x60), &[7]);
        assert!(journal.leading_transfers().is_empty());
        let mut data = [0xff];
        let played = journal.play(Place::PortRead(0x60), &mut data);
        assert_eq!(data, [7]);
        assert_eq!(played.transfers, [Transfer { address: GuestAddress(0x5000), bytes: vec![1, 2] }]);
        assert_eq!(journal.finish(), None);
    }

    #[test]
    fn access_of_another_place_size_or_value_is_a_mismatch() {
        let write = Place::MemoryWrite(GuestAddress(0xfe00_0000));
        for (place, data) in [
            (Place::MemoryWrite(GuestAddress(0xfe00_0004)), vec![1, 2]),
            (write, vec![1, 2, 3, 4]),
            (write, vec![1, 3]),
            (Place::PortWrite(0x80), vec![1, 2]),
        ] {
            let journal = recorded(write, &[1, 2]);
            journal.play(place, &mut data.clone());
            let (expected, _) = journal.finish().unwrap();
            assert_eq!(expected, "write to device memory 0xfe000000 of [01, 02]");
            assert_eq!(journal.finish(), None, "it is told once");
        }
    }

    #[test]
    fn transfer_that_nobody_has_waited_for_stays_for_the_next_playback() {
        let journal = Journal::default();
        journal.transfer(GuestAddress(0x5000), vec![1]);
        assert_eq!(journal.finish(), None);
        assert_eq!(journal.leading_transfers().len(), 1);
    }

    #[test]
    fn access_that_is_missing_is_a_mismatch() {
        let journal = recorded(Place::PortWrite(0x80), &[1]);
        assert_eq!(journal.finish().unwrap().1, "no access");
    }
}
