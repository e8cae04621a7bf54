//! How what came of a turn is compared.

use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::paging::Entry;

use super::{Pair, Stop, Subject};
use crate::lockstep::compare::{Difference, differences, same};
use crate::lockstep::report::{self, Block, Found};
use crate::lockstep::shadow;
use crate::lockstep::world::executing;

impl Pair {
    /// Compares everything that the last instructions can have changed. `apart` is what is known to differ.
    pub(super) fn compare(&mut self, event: &str, mut apart: Vec<Difference>) -> Result<(), Stop> {
        self.figures.comparisons += 1;
        if let Some((expected, found)) = self.journal.finish() {
            apart.push(Difference::new("access to a device", expected, found));
        }
        if !same(&self.reference.interpreter.cpu, &self.subject.interpreter.cpu) {
            apart.extend(differences(&self.reference.interpreter.cpu, &self.subject.interpreter.cpu));
        }
        self.compare_written(&mut apart);
        if !apart.is_empty() {
            return Err(self.report(event, apart));
        }
        let since = self.reference.interpreter.cpu.retired - self.compared;
        if since >= self.options.full { self.compare_all() } else { Ok(()) }
    }

    /// Compares the pages and ranges that either side has written, and closes them.
    fn compare_written(&mut self, apart: &mut Vec<Difference>) {
        self.pages.clear();
        self.ranges.clear();
        for own in &self.own {
            own.take(&mut self.ranges);
        }
        for cpu in [&mut self.reference.interpreter.cpu, &mut self.subject.interpreter.cpu] {
            if let Some(tracker) = &cpu.tracker {
                self.pages.extend(tracker.pages().iter().map(|page| page.physical));
                self.ranges.extend_from_slice(tracker.ranges());
            }
            cpu.close_written();
        }
        self.pages.sort_unstable();
        self.pages.dedup();
        self.figures.pages += self.pages.len() as u64;
        // Entries before pages: a table may be both.
        for i in 0..self.ranges.len() {
            let (address, len) = self.ranges[i];
            if let Some(at) = shadow::range_difference(&self.memory, &self.shadow, address, len)
                && !self.adopt(address, len)
            {
                apart.push(memory_difference(&self.memory, &self.shadow, at));
            }
        }
        let (memory, shadow) = (&self.memory, &self.shadow);
        let pages = self.pages.iter().filter_map(|page| shadow::page_difference(memory, shadow, *page));
        apart.extend(pages.map(|at| memory_difference(memory, shadow, at)));
    }

    /// Takes over the interpreter's accessed bit, if that is all that differs in the page-table entry at `address`.
    ///
    /// A guest that clears the bit without flushing the TLB cannot know when it is set again (SDM 3A 4.10.2.3): at the next
    /// walk, and the two do not walk for instruction fetches at the same times.
    fn adopt(&mut self, address: GuestAddress, len: u64) -> bool {
        let entry = |memory: &GuestMemory| match len {
            8 => memory.read::<u64>(address).ok(),
            4 => memory.read::<u32>(address).ok().map(u64::from),
            _ => None,
        };
        let Some((left, right)) = entry(&self.memory).zip(entry(&self.shadow)) else { return false };
        let present = left & right & Entry::PRESENT.bits() != 0;
        if !present || left ^ right != Entry::ACCESSED.bits() {
            return false;
        }
        self.figures.adopted += 1;
        // It has been read, so it is memory.
        executing(false, || self.shadow.write_bytes(address, &left.to_le_bytes()[..len as usize])).is_ok()
    }

    /// Compares all of memory. What differs then was written without its page having been noted.
    pub(in crate::lockstep) fn compare_all(&mut self) -> Result<(), Stop> {
        self.figures.full += 1;
        self.catch_up();
        let since = self.reference.interpreter.cpu.retired - self.compared;
        self.compared = self.reference.interpreter.cpu.retired;
        let Some(at) = shadow::first_difference(&self.memory, &self.shadow) else { return Ok(()) };
        let apart = vec![memory_difference(&self.memory, &self.shadow, at)];
        let event = format!(
            "within the {since} instructions since all memory compared equal, so not in the code below"
        );
        Err(self.report(&event, apart))
    }

    fn report(&mut self, event: &str, differences: Vec<Difference>) -> Stop {
        let Subject { interpreter, jit } = &mut self.subject;
        let blocks: Vec<_> = self
            .trail
            .iter()
            .map(|&linear| {
                let block = Block::fetch(&mut interpreter.cpu, linear);
                let host = block.address().and_then(|at| jit.host_code(at));
                (block, host)
            })
            .collect();
        let found = Found {
            event: event.to_owned(),
            before: self.before,
            retired: self.reference.interpreter.cpu.retired,
            differences,
        };
        Stop::Apart(report::text(&found, &blocks).into())
    }
}

/// The 16 bytes around a byte of memory on both sides.
fn memory_difference(a: &GuestMemory, b: &GuestMemory, at: GuestAddress) -> Difference {
    let from = GuestAddress(at.0 & !15);
    let show = |memory: &GuestMemory| {
        let mut bytes = [0; 16];
        match memory.read_bytes(from, &mut bytes) {
            Ok(()) => format!("{bytes:02x?}"),
            Err(error) => error.to_string(),
        }
    };
    Difference::new(format!("memory at {:#x}, from {:#x}", at.0, from.0), show(a), show(b))
}
