//! What the emitter makes, and the memory that it works in.

use iced_x86::Encoder;

use super::apart::Row;
use super::asm::Assembler;
use super::cold::{Fixed, Side};
use super::helper::Site;
use super::links::NewLink;
use super::loops::Loop;
use super::unmasked::Point;

/// Host code for a region. Its memory is used again for the next.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) assembler: Assembler,
    /// Where what is rarely executed starts in the code. That goes to the end of the place.
    pub(super) split: usize,
    /// With offsets in the arena.
    pub(super) links: Vec<NewLink>,
    /// Steps besides the first at which the code can be entered, and where that is in the arena.
    pub(super) entries: Vec<(usize, usize)>,
    pub(super) sites: Vec<Site>,
    pub(super) points: Vec<Point>,
    pub(super) rows: Vec<Row>,
    /// Instructions that the interpreter's handlers execute.
    pub(super) interpreted: usize,
    pub(super) spare: Spare,
}

/// What is of use only while a region is emitted.
pub(super) struct Spare {
    /// Boxed, as it is large and all of this goes from hand to hand.
    pub(super) encoder: Box<Encoder>,
    pub(super) fixed: Vec<Fixed>,
    pub(super) sides: Vec<Side>,
    pub(super) loops: Vec<Loop>,
    pub(super) misses: Vec<usize>,
    pub(super) labels: Vec<Option<usize>>,
    pub(super) forward: Vec<(usize, usize)>,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").finish_non_exhaustive()
    }
}

impl Default for Output {
    fn default() -> Self {
        Self {
            assembler: Assembler::with_capacity(1 << 14),
            split: 0,
            links: Vec::new(),
            entries: Vec::new(),
            sites: Vec::new(),
            points: Vec::new(),
            rows: Vec::new(),
            interpreted: 0,
            spare: Spare {
                encoder: Box::new(Encoder::new(64)),
                fixed: Vec::new(),
                sides: Vec::new(),
                loops: Vec::new(),
                misses: Vec::new(),
                labels: Vec::new(),
                forward: Vec::new(),
            },
        }
    }
}

impl Output {
    /// The code.
    pub(super) fn code(&self) -> &[u8] {
        &self.assembler.code
    }
}
