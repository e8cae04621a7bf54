//! Small sets that answer "perhaps" or "certainly not".

/// A set of numbers that may claim a member it does not have, but never denies one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filter<const WORDS: usize>([u64; WORDS]);

impl<const WORDS: usize> Filter<WORDS> {
    /// No members.
    pub(super) const EMPTY: Self = Self([0; WORDS]);

    /// Neighbours get bits of their own: pages come in runs.
    #[inline(always)]
    fn bit(number: u64) -> (usize, u64) {
        let bits = 64 * WORDS as u64;
        let folded = (number ^ (number / bits)) % bits;
        ((folded / 64) as usize, 1 << (folded % 64))
    }

    #[inline(always)]
    pub(super) fn insert(&mut self, number: u64) {
        let (word, bit) = Self::bit(number);
        self.0[word] |= bit;
    }

    #[inline(always)]
    pub(super) fn may_hold(&self, number: u64) -> bool {
        let (word, bit) = Self::bit(number);
        self.0[word] & bit != 0
    }
}
