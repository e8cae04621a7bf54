//! Translated regions: where they are, how they are linked, and how they go away.

use std::ops::Range;

use ringfence_memory::GuestAddress;

use super::apart::Row;
use super::emit::{Place, emit};
use super::flags::{ALL, Set};
use super::helper::Site;
use super::links::{Crossing, NewLink};
use super::output::Output;
use super::region::Source;
use super::state::State;
use super::stubs::{self, JUMP_BITS, Jump, NO_JUMP, Stubs, TARGETS, Target, jump_index};
use super::unmasked::Point;
use super::{LARGEST_CODE, SMALLEST_CODE};
use crate::codemem::{CodeMemory, CodeMemoryError};
use crate::hash::QuickMap;
use crate::interp::code_address::CodeAddress;
use crate::landing::{Landing, Raised};

/// Index of a region; valid until the cache is flushed.
pub(super) type RegionId = u32;

/// Bytes of host memory asked for at a time. A region may be longer: what is missing comes as it is touched.
const STEP: usize = 256 << 10;
/// Regions start on such a boundary.
const ALIGN: usize = 16;

/// A translated region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) address: CodeAddress,
    /// Granules of its page that it was made from.
    mask: u64,
    /// Where it can be entered: a range of the list of those addresses.
    entries: Range<u32>,
    /// Its code, and what is rarely executed of it: offsets in the arena, and bytes.
    pub(super) code: [(usize, usize); 2],
    /// Links that lead here.
    incoming: Vec<u32>,
    /// Instructions of its first run.
    pub(super) instructions: usize,
    /// Lengths of its instructions, which follow each other; kept for whoever goes region by region.
    pub(super) lengths: Box<[u8]>,
}

/// What there is of a guest page in a mode.
#[derive(Debug)]
pub(super) struct Page {
    /// Regions made from it.
    regions: Vec<RegionId>,
    /// Its offsets for which there is code, one bit each.
    translated: [u64; 64],
}

impl Page {
    /// Whether there is code for an offset.
    pub(super) fn has(&self, offset: u32) -> bool {
        self.translated.get(offset as usize / 64).is_some_and(|bits| bits >> (offset % 64) & 1 != 0)
    }

    fn set(&mut self, offset: u64, there: bool) {
        let (bits, bit) = (&mut self.translated[offset as usize / 64 % 64], 1 << (offset % 64));
        *bits = if there { *bits | bit } else { *bits & !bit };
    }
}

impl Default for Page {
    fn default() -> Self {
        Self { regions: Vec::new(), translated: [0; 64] }
    }
}

/// Where to enter translated code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    region: RegionId,
    /// Flags wanted there, if that is known.
    pub(super) wanted: Set,
    /// Offset in the arena.
    code: u32,
}

/// A direct branch of a region, as [`NewLink`] says. Offsets are those in the arena, which is smaller than 4 GiB.
#[derive(Clone, Copy, Debug)]
struct Link {
    site: u32,
    stub: u32,
    target: i64,
    crossing: Option<u32>,
    /// The page that the region is in.
    page: CodeAddress,
}

impl Link {
    fn new(link: &NewLink, page: CodeAddress) -> Self {
        let NewLink { site, stub, target, crossing } = *link;
        let crossing = crossing.map(|crossing| crossing.number);
        Self { site: site as u32, stub: stub as u32, target, crossing, page }
    }
}

/// Figures for `-v`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    pub(super) regions: u64,
    pub(super) instructions: u64,
    pub(super) interpreted: u64,
    pub(super) guest_bytes: u64,
    pub(super) host_bytes: u64,
    /// Of those, what is rarely executed.
    pub(super) rare_bytes: u64,
    /// Rows translated apart.
    pub(super) apart: u64,
    pub(super) invalidated: u64,
    pub(super) flushes: u64,
    pub(super) links: u64,
}

/// All translated code of one vCPU.
#[derive(Debug)]
pub(super) struct Cache {
    memory: CodeMemory,
    /// Code is below, what is rarely executed from `rare` on.
    pub(super) used: usize,
    pub(super) rare: usize,
    /// Below the first and from the second on, there is host memory.
    populated: (usize, usize),
    pub(super) stubs: Stubs,
    /// What was emitted last, for its memory.
    pub(super) output: Option<Output>,
    regions: Vec<Option<Region>>,
    by_address: QuickMap<CodeAddress, Entry>,
    by_page: QuickMap<CodeAddress, Page>,
    links: Vec<Link>,
    /// Those to other pages.
    crossings: Vec<Crossing>,
    /// Addresses at which regions can be entered.
    addresses: Vec<CodeAddress>,
    /// What handlers are called for from translated code.
    sites: Vec<Site>,
    /// Instructions that may raise floating-point exceptions: in regions, the highest address last; in rows that run apart, the highest first.
    pub(super) points: Vec<Point>,
    pub(super) points_apart: Vec<Point>,
    /// Rows that may have to run apart.
    pub(super) rows: Vec<Row>,
    /// Where indirect branches lead.
    targets: Box<[Target]>,
    /// By physical address, two rows for each.
    jumps: Box<[Jump]>,
    /// The same, for Rust.
    jump_entries: Box<[Entry]>,
    /// Code was written since it was last entered.
    pub(super) written: bool,
    /// Regions lead to one another without a return to Rust.
    pub(super) chaining: bool,
    pub(super) sizes: Sizes,
}

impl Cache {
    /// An empty cache that holds up to `size` bytes of code, from [`SMALLEST_CODE`] to [`LARGEST_CODE`].
    pub(super) fn new(size: usize) -> Result<Self, CodeMemoryError> {
        let (code, stubs) = stubs::emit();
        let mut memory = CodeMemory::new(size.clamp(SMALLEST_CODE, LARGEST_CODE))?;
        memory.write(0, &code);
        let rare = memory.size();
        Ok(Self {
            memory,
            used: stubs.length.next_multiple_of(ALIGN),
            rare,
            populated: (0, rare),
            stubs,
            output: None,
            regions: Vec::new(),
            by_address: QuickMap::default(),
            by_page: QuickMap::default(),
            links: Vec::new(),
            crossings: Vec::new(),
            addresses: Vec::new(),
            sites: Vec::new(),
            points: Vec::new(),
            points_apart: Vec::new(),
            rows: Vec::new(),
            targets: vec![Target::default(); TARGETS].into_boxed_slice(),
            jumps: vec![NO_JUMP; 1 << JUMP_BITS].into_boxed_slice(),
            jump_entries: vec![Entry { region: 0, wanted: 0, code: 0 }; 1 << JUMP_BITS].into_boxed_slice(),
            written: true,
            chaining: true,
            sizes: Sizes::default(),
        })
    }

    /// Host address of the arena where it can be written.
    pub(super) fn writable(&self) -> u64 {
        self.memory.writable_address()
    }

    /// Where a thread goes on whose translated code raises a floating-point exception, once it is noted where.
    pub(super) fn landing(&self, note: *mut Raised) -> Landing {
        Landing { code: self.memory.executed(), to: self.host(self.stubs.raised), note }
    }

    /// Host address of an offset.
    pub(super) fn host(&self, offset: usize) -> u64 {
        self.memory.at(offset).as_ptr() as u64
    }

    /// A copy of code, and where it is executed.
    pub(super) fn code(&self, offset: usize, length: usize) -> (u64, Vec<u8>) {
        if length == 0 {
            return (0, Vec::new());
        }
        (self.host(offset), self.memory.read(offset, length))
    }

    /// The region that code belongs to.
    pub(super) fn region(&self, entry: Entry) -> Option<&Region> {
        self.regions.get(entry.region as usize)?.as_ref()
    }

    /// Address of the table of jump targets.
    pub(super) fn jumps(&self) -> u64 {
        self.jumps.as_ptr() as u64
    }

    /// Address of the table of indirect branches' targets.
    pub(super) fn targets(&self) -> u64 {
        self.targets.as_ptr() as u64
    }

    /// How many checks of links to other pages know under which number they lead where they should.
    #[cfg(test)]
    pub(super) fn learnt(&self) -> usize {
        let knows = |crossing: &&Crossing| self.memory.read(crossing.checked as usize, 4) != [0; 4];
        self.crossings.iter().filter(knows).count()
    }

    /// Tells translated code where the lists are that grow with it.
    pub(super) fn publish(&self, state: &mut State) {
        state.sites = self.sites.as_ptr() as u64;
        state.rows = self.rows.as_ptr() as u64;
        state.crossings = self.crossings.as_ptr() as u64;
    }

    /// What a handler is called for, by its number.
    pub(super) fn site(&self, number: u32) -> Option<&Site> {
        self.sites.get(number as usize)
    }

    /// The code for an address.
    pub(super) fn find(&self, address: CodeAddress) -> Option<Entry> {
        self.by_address.get(&address).copied()
    }

    /// What there is of a page.
    pub(super) fn page(&self, page: CodeAddress) -> Option<&Page> {
        self.by_page.get(&page)
    }

    /// Host address of an entry.
    pub(super) fn entry(&self, entry: Entry) -> u64 {
        self.host(entry.code as usize)
    }

    /// The code for an address, if it is among the jump targets.
    #[inline(always)]
    pub(super) fn jump(&self, address: CodeAddress) -> Option<Entry> {
        let index = jump_index(address);
        let row = [index, index + 1].into_iter().find(|&row| self.jumps[row].code == address.bits())?;
        Some(self.jump_entries[row])
    }

    /// Makes the code for an address a jump target. The older one of the two in its rows goes.
    pub(super) fn remember(&mut self, address: CodeAddress, entry: Entry) {
        let index = jump_index(address);
        self.jumps[index + 1] = self.jumps[index];
        self.jump_entries[index + 1] = self.jump_entries[index];
        self.jumps[index] = Jump { code: address.bits(), host: self.host(entry.code as usize) };
        self.jump_entries[index] = entry;
    }

    /// Translates a region and links it with those there are. Everything else is dropped first if there is no room.
    pub(super) fn translate(&mut self, source: &Source) -> Option<Entry> {
        let mut output = emit(source, &self.stubs, self.place(), self.output.take().unwrap_or_default());
        if self.used + output.code().len() > self.rare {
            self.flush();
            output = emit(source, &self.stubs, self.place(), output);
        }
        let entry = (self.used + output.code().len() <= self.rare).then(|| self.add(source, &output));
        self.output = Some(output);
        entry
    }

    /// Puts a region's code, for which there is room, in its place.
    fn add(&mut self, source: &Source, output: &Output) -> Entry {
        let start = self.used;
        let often = output.split;
        self.put(output);
        debug_assert!(output.points.is_sorted_by(|a, b| a.at < b.at), "they are found by their places");
        self.points.extend_from_slice(&output.points);
        self.sizes.regions += 1;
        self.sizes.instructions += source.steps.len() as u64;
        self.sizes.interpreted += output.interpreted as u64;
        self.sizes.guest_bytes += u64::from(source.bytes);
        let (id, address) = (self.regions.len() as RegionId, source.address);
        // Bytes in another page may change without a word to who looks here for what flags are wanted.
        let wanted = if source.second.is_some() { ALL } else { source.wanted_before(0) };
        let first = Entry { region: id, wanted, code: start as u32 };
        let page = self.by_page.entry(address.page()).or_default();
        page.regions.push(id);
        page.set(address.page_offset(), true);
        self.by_address.insert(address, first);
        let entries = self.addresses.len() as u32;
        self.addresses.push(address);
        // A region that starts with a look at another page can be entered there only.
        let others = if source.second.is_none() { &output.entries[..] } else { &[] };
        for &(step, code) in others {
            let at = address.in_page(source.steps[step].start());
            let wanted = source.wanted_before(step);
            self.by_address.entry(at).or_insert(Entry { region: id, wanted, code: code as u32 });
            page.set(at.page_offset(), true);
            self.addresses.push(at);
        }
        let instructions = source.steps.iter().position(|step| step.last).map_or(0, |last| last + 1);
        let lengths = if self.chaining {
            Box::default()
        } else {
            source.steps.iter().map(|step| step.op.length).collect()
        };
        self.regions.push(Some(Region {
            address,
            mask: source.granules,
            entries: entries..self.addresses.len() as u32,
            code: [(start, often), (self.rare, output.code().len() - often)],
            incoming: Vec::new(),
            instructions,
            lengths,
        }));
        if let Some(second) = source.second {
            self.by_page.entry(CodeAddress::new(second, address.is_narrow())).or_default().regions.push(id);
        }
        self.add_links(&output.links, address.page());
        first
    }

    /// Adds code of a page, for which there is room, to what is rarely executed, as all of it is: its offset in the arena.
    pub(super) fn add_rare(&mut self, output: &Output, page: CodeAddress) -> u32 {
        self.put(output);
        self.points_apart.extend(output.points.iter().rev());
        self.sizes.apart += 1;
        self.add_links(&output.links, page);
        self.rare as u32
    }

    /// Puts code in its place, and the records that it names.
    fn put(&mut self, output: &Output) {
        let (often, rarely) = output.code().split_at(output.split);
        let start = self.used;
        self.rare -= rarely.len();
        self.populate(start + often.len(), self.rare);
        self.memory.write(start, often);
        self.memory.write(self.rare, rarely);
        self.written = true;
        self.used = (start + often.len()).next_multiple_of(ALIGN);
        self.sites.extend_from_slice(&output.sites);
        self.rows.extend_from_slice(&output.rows);
        self.sizes.host_bytes += output.code().len() as u64;
        self.sizes.rare_bytes += rarely.len() as u64;
    }

    /// Adds links of code of a page, and makes those that lead to code in the page.
    fn add_links(&mut self, links: &[NewLink], page: CodeAddress) {
        for link in links {
            let index = self.links.len() as u32;
            self.links.push(Link::new(link, page));
            if let Some(crossing) = link.crossing {
                debug_assert_eq!(crossing.number as usize, self.crossings.len());
                self.crossings.push(Crossing::new(link.target, index, crossing.checked));
            }
            if self.chaining
                && link.crossing.is_none()
                && let Some(to) = self.find(page.behind(link.target as u64))
            {
                self.connect(index, to);
            }
        }
    }

    /// Sees to host memory below one offset and from another on.
    fn populate(&mut self, below: usize, from: usize) {
        let (low, high) = self.populated;
        if below > low {
            let length = STEP.min(high.saturating_sub(low));
            self.memory.populate(low, length);
            self.populated.0 = low + length;
        }
        if from < high {
            let length = STEP.min(high.saturating_sub(self.populated.0));
            self.memory.populate(high - length, length);
            self.populated.1 = high - length;
        }
    }

    /// Where the next region goes.
    pub(super) fn place(&self) -> Place {
        Place {
            base: self.used,
            end: self.rare,
            links: self.links.len(),
            crossings: self.crossings.len(),
            sites: self.sites.len(),
            rows: self.rows.len(),
        }
    }

    /// Where a link is meant to lead, from the start of its page.
    pub(super) fn link_target(&self, link: u32) -> Option<i64> {
        self.links.get(link as usize).map(|link| link.target)
    }

    /// Makes a link lead to code, which is what it is meant to lead to.
    pub(super) fn connect(&mut self, link: u32, to: Entry) {
        let Some(&Link { site, crossing, page: own, .. }) = self.links.get(link as usize) else { return };
        let Some(Some(region)) = self.regions.get_mut(to.region as usize) else { return };
        let page = region.address.page();
        if page.is_narrow() != own.is_narrow() {
            return;
        }
        match crossing {
            // The page tables have changed since the branch was executed.
            None if page != own => return,
            None => {}
            Some(crossing) => {
                let Ok(page) = u32::try_from(page.physical().0 >> 8) else { return };
                let Some(crossing) = self.crossings.get_mut(crossing as usize) else { return };
                crossing.page = page;
            }
        }
        region.incoming.push(link);
        self.sizes.links += 1;
        self.patch(site as usize, to.code as usize);
    }

    /// Makes a link lead nowhere again.
    fn disconnect(&mut self, link: u32) {
        let Link { site, stub, crossing, .. } = self.links[link as usize];
        match crossing {
            None => self.patch(site as usize, stub as usize),
            // The branch itself is behind its check, which does not succeed now.
            Some(crossing) => {
                let crossing = &mut self.crossings[crossing as usize];
                (crossing.page, crossing.seen) = (Crossing::NO_PAGE, 0);
                let checked = crossing.checked as usize;
                self.rewrite(checked, 0);
            }
        }
    }

    /// Makes the branch whose displacement is at `site` lead to `target`.
    fn patch(&mut self, site: usize, target: usize) {
        self.rewrite(site, (target as i64 - (site as i64 + 4)) as i32);
    }

    /// Puts another number in code.
    fn rewrite(&mut self, at: usize, number: i32) {
        self.memory.write(at, &number.to_le_bytes());
        self.written = true;
    }

    /// Drops every region made from the given granules of a page.
    pub(super) fn invalidate(&mut self, page: GuestAddress, mask: u64) {
        for narrow in [false, true] {
            self.invalidate_in(CodeAddress::new(page, narrow), mask);
        }
    }

    /// Likewise, in one mode.
    fn invalidate_in(&mut self, page: CodeAddress, mask: u64) {
        let Some(known) = self.by_page.get_mut(&page) else { return };
        let ids = std::mem::take(&mut known.regions);
        let (stale, kept): (Vec<_>, Vec<_>) = ids.into_iter().partition(|&id| {
            let region = self.regions.get(id as usize).and_then(Option::as_ref);
            region.is_some_and(|r| r.address.page() != page || r.mask & mask != 0)
        });
        match self.by_page.get_mut(&page) {
            Some(known) if !kept.is_empty() => known.regions = kept,
            _ => drop(self.by_page.remove(&page)),
        }
        for id in stale {
            let Some(region) = self.regions[id as usize].take() else { continue };
            for link in region.incoming {
                self.disconnect(link);
            }
            let entries = region.entries.start as usize..region.entries.end as usize;
            for &address in self.addresses.get(entries).unwrap_or_default() {
                if self.by_address.get(&address).is_some_and(|entry| entry.region == id) {
                    self.by_address.remove(&address);
                    if let Some(known) = self.by_page.get_mut(&address.page()) {
                        known.set(address.page_offset(), false);
                    }
                }
                let row = jump_index(address);
                for jump in &mut self.jumps[row..row + 2] {
                    if jump.code == address.bits() {
                        *jump = NO_JUMP;
                    }
                }
            }
            self.sizes.invalidated += 1;
        }
    }

    /// Drops everything. Dead code's room comes back only this way.
    pub(super) fn flush(&mut self) {
        self.used = self.stubs.length.next_multiple_of(ALIGN);
        self.rare = self.memory.size();
        self.regions.clear();
        self.by_address.clear();
        self.by_page.clear();
        self.links.clear();
        self.crossings.clear();
        self.addresses.clear();
        self.sites.clear();
        self.points.clear();
        self.points_apart.clear();
        self.rows.clear();
        self.targets.fill(Target::default());
        self.jumps.fill(NO_JUMP);
        self.sizes.flushes += 1;
    }
}
