//! Which pages a vCPU writes to, exactly: for tools that compare the memory of two machines.
//!
//! While writes are tracked, the soft TLB holds write entries only for pages that have been written since
//! `Cpu::close_written` was called last. The first write to any other page takes the slow path, which notes the page and
//! puts its entry in; what follows goes through the entry as always. So that the slow path does not walk again (which
//! would set accessed and dirty bits at other times than an untracked run does), walks for writes are remembered here
//! until the soft TLB forgets anything or another address space is in use.

use ringfence_memory::GuestAddress;

use super::tlb::{Class, ENTRIES, Grant, Page};
use super::walk::Translation;

/// A page that was written to, or would have been if nothing had come between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenPage {
    /// Whose table has the entry.
    pub class: Class,
    /// The linear page.
    pub linear: u64,
    /// The physical page.
    pub physical: GuestAddress,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    linear: u64,
    changes: u64,
    translation: Translation,
}

/// No page-aligned address equals it.
const NONE: u64 = 1;

/// What a vCPU whose writes are tracked keeps.
#[derive(Debug)]
pub struct Tracker {
    /// Walks for writes, by class and page.
    known: Box<[Known]>,
    /// Pages that have a write entry now.
    pages: Vec<WrittenPage>,
    /// Writes that went to pages without one: those with decoded code.
    ranges: Vec<(GuestAddress, u64)>,
    /// The soft TLB's count of changes when pages were last closed.
    changes: u64,
}

impl Default for Tracker {
    fn default() -> Self {
        let translation = Translation {
            address: GuestAddress(0),
            writable: false,
            page_size: 4096,
            global: false,
            user: false,
        };
        let known = vec![Known { linear: NONE, changes: 0, translation }; 3 * ENTRIES].into_boxed_slice();
        Self { known, pages: Vec::new(), ranges: Vec::new(), changes: 0 }
    }
}

fn slot(class: Class, linear: u64) -> usize {
    class as usize % 3 * ENTRIES + (linear >> 12) as usize % ENTRIES
}

impl Tracker {
    /// The walk for a write to `linear` that succeeded earlier, with the soft TLB's count of changes the same.
    pub fn walked(&self, class: Class, linear: u64, changes: u64) -> Option<Translation> {
        let known = &self.known[slot(class, linear)];
        (known.linear == linear & !0xfff && known.changes == changes).then(|| Translation {
            address: GuestAddress(known.translation.address.page().0 | linear & 0xfff),
            ..known.translation
        })
    }

    /// Remembers a walk for a write.
    pub fn remember(&mut self, class: Class, linear: u64, changes: u64, translation: Translation) {
        self.known[slot(class, linear)] = Known { linear: linear & !0xfff, changes, translation };
    }

    /// A page has got a write entry.
    pub fn opened(&mut self, class: Class, linear: u64, physical: GuestAddress) {
        self.pages.push(WrittenPage { class, linear: linear & !0xfff, physical: physical.page() });
    }

    /// A write went past the entries.
    pub fn wrote(&mut self, address: GuestAddress, len: u64) {
        self.ranges.push((address, len));
    }

    /// The pages written to, with repetitions.
    pub fn pages(&self) -> &[WrittenPage] {
        &self.pages
    }

    /// The other writes.
    pub fn ranges(&self) -> &[(GuestAddress, u64)] {
        &self.ranges
    }

    /// Forgets what was written.
    fn clear(&mut self) {
        self.pages.clear();
        self.ranges.clear();
    }
}

impl crate::interp::cpu::Cpu {
    /// From now on, notes every page that the vCPU writes to.
    pub fn track_writes(&mut self) {
        self.tracker = Some(Box::default());
        self.tlb.flush();
    }

    /// Closes the pages written to, so that the next write to each is noted again.
    pub fn close_written(&mut self) {
        let Some(tracker) = &mut self.tracker else { return };
        // If address spaces have taken turns, pages may have been opened in any.
        let everywhere = std::mem::replace(&mut tracker.changes, self.tlb.changes()) != self.tlb.changes();
        for page in &tracker.pages {
            self.tlb.forget_write(page.class, page.linear, everywhere);
        }
        tracker.clear();
    }

    /// Puts in the write entry of a page that this vCPU has walked for itself, as if it had just been written to: writes
    /// then go the fast way from the first on. Nothing happens if it has not walked, or the page holds decoded code.
    pub fn open_for_writing(&mut self, page: WrittenPage) {
        let changes = self.tlb.changes();
        let Some(tracker) = &mut self.tracker else { return };
        let Some(found) = tracker.walked(page.class, page.linear, changes) else { return };
        let Some(host) = self.memory.page(found.address) else { return };
        if host.writable && !host.code {
            let mapping = Page { size: found.page_size, global: found.global };
            self.tlb.fill(page.class, page.linear, host.host, Grant::Write, mapping);
            tracker.opened(page.class, page.linear, found.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use ringfence_x86::SegmentRegister;

    use crate::interp::testing::{Lab, at};

    const DS: u8 = SegmentRegister::Ds as u8;

    #[test]
    fn page_is_noted_at_its_first_write_and_again_after_it_was_closed() {
        let mut lab = Lab::long();
        let cpu = &mut lab.m.cpu;
        cpu.track_writes();
        cpu.load::<u64>(DS, at::DATA).unwrap();
        assert!(cpu.tracker.as_ref().unwrap().pages().is_empty());
        for _ in 0..2 {
            cpu.store::<u64>(DS, at::DATA + 8, 1).unwrap();
            cpu.store::<u64>(DS, at::DATA + 16, 1).unwrap();
            let pages: Vec<u64> =
                cpu.tracker.as_ref().unwrap().pages().iter().map(|p| p.physical.0).collect();
            assert_eq!(pages, [at::DATA]);
            cpu.close_written();
        }
    }

    #[test]
    fn page_walked_before_is_opened_and_any_other_is_not() {
        let mut lab = Lab::long();
        let cpu = &mut lab.m.cpu;
        cpu.track_writes();
        cpu.store::<u64>(DS, at::DATA, 1).unwrap();
        let page = cpu.tracker.as_ref().unwrap().pages()[0];
        cpu.close_written();
        cpu.open_for_writing(page);
        assert!(cpu.tlb.write(page.class, at::DATA, 8).is_some());
        cpu.close_written();
        cpu.tlb.flush();
        cpu.open_for_writing(page);
        assert!(cpu.tlb.write(page.class, at::DATA, 8).is_none());
    }

    #[test]
    fn write_across_two_pages_notes_both() {
        let mut lab = Lab::long();
        let cpu = &mut lab.m.cpu;
        cpu.track_writes();
        cpu.store::<u64>(DS, at::DATA + 0xffc, 1).unwrap();
        assert_eq!(cpu.tracker.as_ref().unwrap().pages().len(), 2);
    }
}
