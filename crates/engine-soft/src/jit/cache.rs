//! Translated regions: where they are, how they are linked, and how they go away.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use ringfence_memory::GuestAddress;

use super::emit::{Output, emit};
use super::region::Source;
use super::stubs::{self, JUMP_BITS, Jump, NO_JUMP, Stubs, jump_index};
use crate::code::granules;
use crate::codemem::{CodeMemory, CodeMemoryError};
use crate::interp::op::Op;

/// Index of a region; valid until the cache is flushed.
pub(super) type RegionId = u32;

/// Regions start on such a boundary.
const ALIGN: usize = 16;

/// A quick hash for addresses. A guest that makes them collide slows down nobody but itself.
#[derive(Debug, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A translated region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) address: GuestAddress,
    /// Granules of its page that it was made from.
    mask: u64,
    /// Offset of its code in the arena.
    pub(super) entry: usize,
    /// Bytes of its code.
    pub(super) length: usize,
    /// Links that lead here.
    incoming: Vec<u32>,
    /// The operations that its code points at.
    pub(super) ops: Box<[Op]>,
}

/// A direct branch in a page.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// Offset of its displacement in the arena.
    site: usize,
    /// Where it leads while it is not linked.
    stub: usize,
    /// What it is meant to lead to.
    target: GuestAddress,
}

/// Figures for `-v`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    pub(super) regions: u64,
    pub(super) instructions: u64,
    pub(super) interpreted: u64,
    pub(super) guest_bytes: u64,
    pub(super) host_bytes: u64,
    pub(super) invalidated: u64,
    pub(super) flushes: u64,
    pub(super) links: u64,
}

/// All translated code of one vCPU.
#[derive(Debug)]
pub(super) struct Cache {
    memory: CodeMemory,
    used: usize,
    pub(super) stubs: Stubs,
    regions: Vec<Option<Region>>,
    by_address: HashMap<GuestAddress, RegionId, BuildHasherDefault<AddressHasher>>,
    by_page: HashMap<GuestAddress, Vec<RegionId>>,
    links: Vec<Link>,
    jumps: Box<[Jump]>,
    /// Code was written since it was last entered.
    pub(super) written: bool,
    /// Regions lead to one another without a return to Rust.
    pub(super) chaining: bool,
    pub(super) sizes: Sizes,
}

impl Cache {
    /// An empty cache that holds up to `size` bytes of code.
    pub(super) fn new(size: usize) -> Result<Self, CodeMemoryError> {
        let (code, stubs) = stubs::emit();
        let mut memory = CodeMemory::new(size.max(1 << 20))?;
        memory.write(0, &code);
        Ok(Self {
            memory,
            used: stubs.length.next_multiple_of(ALIGN),
            stubs,
            regions: Vec::new(),
            by_address: HashMap::default(),
            by_page: HashMap::new(),
            links: Vec::new(),
            jumps: vec![NO_JUMP; 1 << JUMP_BITS].into_boxed_slice(),
            written: true,
            chaining: true,
            sizes: Sizes::default(),
        })
    }

    /// Host address of an offset.
    pub(super) fn host(&self, offset: usize) -> u64 {
        self.memory.at(offset).as_ptr() as u64
    }

    /// A copy of code.
    pub(super) fn code(&self, offset: usize, length: usize) -> Vec<u8> {
        self.memory.read(offset, length)
    }

    /// Address of the table of jump targets.
    pub(super) fn jumps(&self) -> u64 {
        self.jumps.as_ptr() as u64
    }

    /// The region that starts at a physical address.
    pub(super) fn find(&self, address: GuestAddress) -> Option<RegionId> {
        self.by_address.get(&address).copied()
    }

    /// A region by its index.
    pub(super) fn get(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(id as usize)?.as_ref()
    }

    /// Where an address led before, under the same circumstances.
    #[inline(always)]
    pub(super) fn jump(&self, linear: u64, context: u64) -> Option<RegionId> {
        let jump = &self.jumps[jump_index(linear)];
        (jump.linear == linear && jump.context == context).then_some(jump.region as RegionId)
    }

    /// The region that `linear` led to before, whatever has changed since, if it is the one at `address`.
    pub(super) fn jump_before(&self, linear: u64, address: GuestAddress) -> Option<RegionId> {
        let jump = &self.jumps[jump_index(linear)];
        let id = jump.region as RegionId;
        (jump.linear == linear && jump.host != 0 && self.get(id)?.address == address).then_some(id)
    }

    /// Remembers where an address leads.
    pub(super) fn remember(&mut self, linear: u64, context: u64, id: RegionId) {
        if let Some(region) = self.get(id) {
            let host = self.host(region.entry);
            self.jumps[jump_index(linear)] = Jump { linear, context, host, region: u64::from(id) };
        }
    }

    /// Translates a region and links it with those there are. Everything else is dropped first if there is no room.
    pub(super) fn translate(&mut self, source: Source) -> Option<RegionId> {
        let mut output = emit(&source, &self.stubs, self.used, self.links.len());
        if self.used + output.code.len() > self.memory.size() {
            self.flush();
            output = emit(&source, &self.stubs, self.used, self.links.len());
        }
        let Output { code, links, interpreted } = output;
        if self.used + code.len() > self.memory.size() {
            return None;
        }
        let entry = self.used;
        self.memory.write(entry, &code);
        self.written = true;
        self.used = (entry + code.len()).next_multiple_of(ALIGN);
        let Source { address, steps, ops, length } = source;
        self.sizes.regions += 1;
        self.sizes.instructions += steps.len() as u64;
        self.sizes.interpreted += interpreted as u64;
        self.sizes.guest_bytes += u64::from(length);
        self.sizes.host_bytes += code.len() as u64;
        let id = self.regions.len() as RegionId;
        let mask = granules(address.page_offset(), u64::from(length));
        let length = code.len();
        self.regions.push(Some(Region { address, mask, entry, length, incoming: Vec::new(), ops }));
        self.by_address.insert(address, id);
        self.by_page.entry(address.page()).or_default().push(id);
        for link in links {
            let target = GuestAddress(address.page().0 + u64::from(link.target));
            let index = self.links.len() as u32;
            self.links.push(Link { site: entry + link.site, stub: entry + link.stub, target });
            if self.chaining
                && let Some(to) = self.find(target)
            {
                self.connect(index, to);
            }
        }
        Some(id)
    }

    /// Where a link is meant to lead.
    pub(super) fn link_target(&self, link: u32) -> Option<GuestAddress> {
        self.links.get(link as usize).map(|l| l.target)
    }

    /// Makes a link lead to a region.
    pub(super) fn connect(&mut self, link: u32, to: RegionId) {
        let Some(&Link { site, .. }) = self.links.get(link as usize) else { return };
        let Some(Some(region)) = self.regions.get_mut(to as usize) else { return };
        region.incoming.push(link);
        let entry = region.entry;
        self.sizes.links += 1;
        self.patch(site, entry);
    }

    /// Makes the branch whose displacement is at `site` lead to `target`.
    fn patch(&mut self, site: usize, target: usize) {
        let distance = (target as i64 - (site as i64 + 4)) as i32;
        self.memory.write(site, &distance.to_le_bytes());
        self.written = true;
    }

    /// Drops every region made from the given granules of a page.
    pub(super) fn invalidate(&mut self, page: GuestAddress, mask: u64) {
        let Some(ids) = self.by_page.remove(&page) else { return };
        let (stale, kept): (Vec<_>, Vec<_>) =
            ids.into_iter().partition(|&id| self.get(id).is_some_and(|r| r.mask & mask != 0));
        for id in stale {
            let Some(region) = self.regions[id as usize].take() else { continue };
            self.by_address.remove(&region.address);
            for link in region.incoming {
                let Link { site, stub, .. } = self.links[link as usize];
                self.patch(site, stub);
            }
            self.sizes.invalidated += 1;
        }
        if !kept.is_empty() {
            self.by_page.insert(page, kept);
        }
        self.forget_jumps();
    }

    /// Drops everything. Dead code's room comes back only this way.
    pub(super) fn flush(&mut self) {
        self.used = self.stubs.length.next_multiple_of(ALIGN);
        self.regions.clear();
        self.by_address.clear();
        self.by_page.clear();
        self.links.clear();
        self.forget_jumps();
        self.sizes.flushes += 1;
    }

    fn forget_jumps(&mut self) {
        self.jumps.fill(NO_JUMP);
    }
}
