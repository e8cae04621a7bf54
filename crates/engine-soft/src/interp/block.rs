//! Decoded blocks and how they are found.

use ringfence_memory::GuestAddress;

use super::cpu::CodeSize;
use super::op::Op;
use crate::code::granules;
use crate::hash::{AddressMap, QuickMap};

/// A block is the same wherever it is mapped, but not in another mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Physical address of its first byte.
    pub address: GuestAddress,
    /// How its bytes were read.
    pub size: CodeSize,
}

/// A straight run of decoded instructions.
#[derive(Debug)]
pub struct Block {
    /// Where it is.
    pub key: BlockKey,
    /// Its instructions, at least one.
    pub ops: Box<[Op]>,
    /// Its length in bytes.
    pub length: u32,
    /// The physical page that the last instruction runs into, if it straddles a page boundary.
    pub second_page: Option<GuestAddress>,
}

impl Block {
    /// The granules of `page` that it was decoded from.
    fn granules_in(&self, page: GuestAddress) -> u64 {
        let offset = self.key.address.page_offset();
        let mut mask = 0;
        if self.key.address.page() == page {
            mask |= granules(offset, u64::from(self.length));
        }
        if self.second_page == Some(page) {
            mask |= granules(0, (offset + u64::from(self.length)).saturating_sub(0x1000));
        }
        mask
    }
}

/// Index of a block in its cache; valid until the next insertion or removal.
pub type BlockId = u32;

const JUMP_ENTRIES: usize = 4096;
/// A soft bound on memory: at about 64 bytes an instruction, 24 MiB.
const MAX_OPS: usize = 384 * 1024;

/// Where a linear address led the last time, and under what circumstances.
#[derive(Clone, Copy, Debug)]
struct Jump {
    linear: u64,
    context: u32,
    generation: u32,
    block: BlockId,
}

const NO_JUMP: Jump = Jump { linear: u64::MAX, context: u32::MAX, generation: 0, block: 0 };

/// The decoded blocks of one vCPU.
pub struct BlockCache {
    slots: Vec<Option<Block>>,
    free: Vec<BlockId>,
    by_key: QuickMap<BlockKey, BlockId>,
    by_page: AddressMap<Vec<BlockId>>,
    jumps: Box<[Jump]>,
    ops: usize,
    /// Blocks decoded since the start.
    pub decoded: u64,
    /// Blocks dropped because their bytes were written.
    pub invalidated: u64,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockCache").field("blocks", &self.by_key.len()).field("ops", &self.ops).finish()
    }
}

impl Default for BlockCache {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: QuickMap::default(),
            by_page: AddressMap::default(),
            jumps: vec![NO_JUMP; JUMP_ENTRIES].into_boxed_slice(),
            ops: 0,
            decoded: 0,
            invalidated: 0,
        }
    }
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize % JUMP_ENTRIES
}

impl BlockCache {
    /// The block that `linear` led to, if nothing has changed since: `context` holds mode and privilege,
    /// `generation` counts TLB flushes.
    #[inline(always)]
    pub fn jump(&self, linear: u64, context: u32, generation: u32) -> Option<BlockId> {
        let jump = &self.jumps[jump_index(linear)];
        (jump.linear == linear && jump.context == context && jump.generation == generation)
            .then_some(jump.block)
    }

    /// Remembers where `linear` leads.
    pub fn remember(&mut self, linear: u64, context: u32, generation: u32, block: BlockId) {
        self.jumps[jump_index(linear)] = Jump { linear, context, generation, block };
    }

    /// The block for a key.
    pub fn find(&self, key: BlockKey) -> Option<BlockId> {
        self.by_key.get(&key).copied()
    }

    /// A block by its index.
    #[inline(always)]
    pub fn get(&self, id: BlockId) -> Option<&Block> {
        self.slots.get(id as usize)?.as_ref()
    }

    /// Adds a block, first dropping all others if there is no room.
    pub fn insert(&mut self, block: Block) -> BlockId {
        if self.ops + block.ops.len() > MAX_OPS {
            self.clear();
        }
        self.ops += block.ops.len();
        self.decoded += 1;
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as BlockId
        });
        self.by_key.insert(block.key, id);
        self.by_page.entry(block.key.address.page()).or_default().push(id);
        if let Some(page) = block.second_page {
            self.by_page.entry(page).or_default().push(id);
        }
        self.slots[id as usize] = Some(block);
        id
    }

    /// Drops every block decoded from the given granules of a page.
    pub fn invalidate(&mut self, page: GuestAddress, mask: u64) {
        let Some(mut ids) = self.by_page.remove(&page) else { return };
        let before = self.invalidated;
        ids.retain(|&id| {
            let stale = self.get(id).is_some_and(|b| b.granules_in(page) & mask != 0);
            if stale {
                self.remove(id, page);
            }
            self.get(id).is_some()
        });
        if !ids.is_empty() {
            self.by_page.insert(page, ids);
        }
        if self.invalidated != before {
            self.forget_jumps();
        }
    }

    fn remove(&mut self, id: BlockId, page: GuestAddress) {
        let Some(block) = self.slots[id as usize].take() else { return };
        self.by_key.remove(&block.key);
        for other in [Some(block.key.address.page()), block.second_page].into_iter().flatten() {
            if other != page
                && let Some(ids) = self.by_page.get_mut(&other)
            {
                ids.retain(|&i| i != id);
            }
        }
        self.ops -= block.ops.len();
        self.invalidated += 1;
        self.free.push(id);
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.by_key.clear();
        self.by_page.clear();
        self.ops = 0;
        self.forget_jumps();
    }

    fn forget_jumps(&mut self) {
        self.jumps.fill(NO_JUMP);
    }
}
