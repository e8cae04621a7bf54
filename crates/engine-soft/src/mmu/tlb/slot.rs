//! The tables of one address space.

use super::filter::Filter;
use super::{Class, DataRow, ENTRIES, Entry, FETCH_ENTRIES, FetchEntry, Grant, Page, Space};

const CLASSES: usize = 4;

/// The entries that a page of loads and stores has in its row. They lie in one line of the host's cache, since most pages that are
/// written are read.
pub(super) const READ: usize = 0;
pub(super) const WRITE: usize = 1;

/// What a table is made of: a row for each page number's low bits, with an entry of each kind.
trait Row: Copy {
    type Entry: Copy;
    /// An entry of a row that holds nothing.
    fn empty(index: usize) -> Self::Entry;
    /// A row of such entries.
    fn none(index: usize) -> Self;
    fn entry(&self, kind: usize) -> &Self::Entry;
    fn entry_mut(&mut self, kind: usize) -> &mut Self::Entry;
    /// The linear page that an entry is for.
    fn tag(entry: &Self::Entry) -> u64;
}

impl Row for DataRow {
    type Entry = Entry;

    #[inline(always)]
    fn empty(index: usize) -> Entry {
        Entry { tag: (index as u64 ^ 1) << 12, host: 0 }
    }

    fn none(index: usize) -> Self {
        Self([Self::empty(index); 2])
    }

    #[inline(always)]
    fn entry(&self, kind: usize) -> &Entry {
        &self.0[kind]
    }

    #[inline(always)]
    fn entry_mut(&mut self, kind: usize) -> &mut Entry {
        &mut self.0[kind]
    }

    #[inline(always)]
    fn tag(entry: &Entry) -> u64 {
        entry.tag
    }
}

impl Row for FetchEntry {
    type Entry = Self;

    #[inline(always)]
    fn empty(_: usize) -> Self {
        // No page has this address.
        Self { tag: 0x800, physical: 0 }
    }

    fn none(index: usize) -> Self {
        Self::empty(index)
    }

    #[inline(always)]
    fn entry(&self, _: usize) -> &Self {
        self
    }

    #[inline(always)]
    fn entry_mut(&mut self, _: usize) -> &mut Self {
        self
    }

    #[inline(always)]
    fn tag(entry: &Self) -> u64 {
        entry.tag
    }
}

/// Which rows hold an entry of a kind.
#[derive(Clone, Copy)]
struct Marks<const WORDS: usize> {
    /// Those that have been written since they were last emptied.
    filled: [u64; WORDS],
    /// Those of them that hold a global page.
    global: [u64; WORDS],
    /// Words of `filled` that are not zero, so that a table with little in it is emptied without a look at all of them: kernels
    /// flush several times for each process that they start.
    touched: [u64; MOST_WORDS / 64],
}

/// What `WORDS` is at most.
const MOST_WORDS: usize = 256;

/// The numbers of the bits that are set, from the lowest.
fn bits(words: &[u64]) -> impl Iterator<Item = usize> + use<'_> {
    words.iter().enumerate().flat_map(|(i, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            (bit < 64).then_some(64 * i + bit)
        })
    })
}

/// A direct-mapped table, with marks that make it cheap to empty. `WORDS` is a 64th of `ROWS`.
struct Table<R, const KINDS: usize, const ROWS: usize, const WORDS: usize> {
    /// On the heap from the first, since it is too large for a stack.
    rows: Box<[R]>,
    /// For each kind of entry.
    marks: [Marks<WORDS>; KINDS],
}

type DataTable = Table<DataRow, 2, ENTRIES, { ENTRIES / 64 }>;
type FetchTable = Table<FetchEntry, 1, FETCH_ENTRIES, { FETCH_ENTRIES / 64 }>;

impl<R: Row, const KINDS: usize, const ROWS: usize, const WORDS: usize> Table<R, KINDS, ROWS, WORDS> {
    fn new() -> Self {
        const { assert!(WORDS <= MOST_WORDS) };
        let marks = [Marks { filled: [0; WORDS], global: [0; WORDS], touched: [0; MOST_WORDS / 64] }; KINDS];
        Self { rows: (0..ROWS).map(R::none).collect(), marks }
    }

    #[inline(always)]
    fn index(linear: u64) -> usize {
        (linear >> 12) as usize % ROWS
    }

    #[inline(always)]
    fn entry(&self, kind: usize, linear: u64) -> &R::Entry {
        self.rows[Self::index(linear)].entry(kind)
    }

    #[inline(always)]
    fn set(&mut self, kind: usize, linear: u64, entry: R::Entry, global: bool) {
        let index = Self::index(linear);
        let bit = 1 << (index % 64);
        *self.rows[index].entry_mut(kind) = entry;
        let marks = &mut self.marks[kind];
        marks.filled[index / 64] |= bit;
        marks.global[index / 64] &= !bit;
        marks.global[index / 64] |= u64::from(global) << (index % 64);
        marks.touched[index / 64 / 64] |= 1 << (index / 64 % 64);
    }

    /// Whether the row for an address has no page of a kind, or the address's own.
    fn is_free_for(&self, kind: usize, linear: u64) -> bool {
        let tag = R::tag(self.entry(kind, linear));
        tag == linear & !0xfff || Self::index(tag) != Self::index(linear)
    }

    /// Empties the entry for an address's page, if there is one.
    fn drop_one(&mut self, kind: usize, linear: u64) {
        let index = Self::index(linear);
        let entry = self.rows[index].entry_mut(kind);
        if R::tag(entry) == linear & !0xfff {
            *entry = R::empty(index);
        }
    }

    /// Empties the table, but for global pages if those are to stay.
    fn clear(&mut self, keep_global: bool) {
        for (kind, marks) in self.marks.iter_mut().enumerate() {
            let touched = marks.touched;
            for word in bits(&touched) {
                let kept = if keep_global { marks.global[word] } else { 0 };
                let gone = marks.filled[word] & !kept;
                marks.filled[word] = kept;
                marks.global[word] = kept;
                if kept == 0 {
                    marks.touched[word / 64] &= !(1 << (word % 64));
                }
                for bit in bits(&[gone]) {
                    let index = 64 * word + bit;
                    *self.rows[index].entry_mut(kind) = R::empty(index);
                }
            }
        }
    }

    /// Empties the entries of a kind that `stale` picks.
    fn drop_entries(&mut self, kind: usize, mut stale: impl FnMut(&R::Entry) -> bool) {
        let marks = &self.marks[kind];
        for word in bits(&marks.touched) {
            for bit in bits(&[marks.filled[word]]) {
                let index = 64 * word + bit;
                let entry = self.rows[index].entry_mut(kind);
                if stale(entry) {
                    *entry = R::empty(index);
                }
            }
        }
    }
}

/// What a slot's entries are about, as far as flushes must know; never less than what the tables hold. There is one for
/// global pages and one for all others, so that each can be forgotten with its entries.
#[derive(Clone, Copy)]
pub(super) struct Contents {
    any: bool,
    /// Entries in the lower and in the upper half of the linear address space.
    halves: [bool; 2],
    /// Parts of pages of 2 or 4 MiB, by 4 MiB, in each half: a kernel's would be taken for any program's.
    large: [Filter<16>; 2],
    /// Parts of pages of 1 GiB.
    huge: [Filter<4>; 2],
    /// Linear pages that code was fetched from, in each half: a kernel has so many that every other page of a program's would be taken for
    /// one of them.
    code: [Filter<32>; 2],
    coded: bool,
}

pub(super) const NOTHING: Contents = Contents {
    any: false,
    halves: [false; 2],
    large: [Filter::EMPTY; 2],
    huge: [Filter::EMPTY; 2],
    code: [Filter::EMPTY; 2],
    coded: false,
};

/// Which half of the linear address space an address is in.
fn half_of(linear: u64) -> usize {
    (linear >> 63) as usize
}

impl Contents {
    #[inline(always)]
    fn note(&mut self, linear: u64, size: u64) {
        self.any = true;
        let half = half_of(linear);
        self.halves[half] = true;
        if size >= 1 << 30 {
            self.huge[half].insert(linear >> 30);
        } else if size > 4096 {
            self.large[half].insert(linear >> 22);
        }
    }

    #[inline(always)]
    pub(super) fn note_code(&mut self, linear: u64, size: u64) {
        self.note(linear, size);
        self.coded = true;
        self.code[half_of(linear)].insert(linear >> 12);
    }

    /// Whether code may have been fetched from a page that goes with this one.
    pub(super) fn may_have_code_at(&self, linear: u64) -> bool {
        self.coded && (self.code[half_of(linear)].may_hold(linear >> 12) || self.may_be_in_large_page(linear))
    }

    fn may_be_in_large_page(&self, linear: u64) -> bool {
        let half = half_of(linear);
        self.any && (self.large[half].may_hold(linear >> 22) || self.huge[half].may_hold(linear >> 30))
    }
}

/// The tables of one address space.
pub(super) struct Slot {
    data: [DataTable; CLASSES],
    fetch: [FetchTable; 2],
    local: Contents,
    global: Contents,
    /// Host pages with a write entry, of which a kernel has thousands. A flush leaves it as it is: it is large.
    written: Filter<512>,
    /// Below CPL 3 code was fetched from a page that is not global.
    pub(super) own_kernel_code: bool,
    /// Changes whenever code may have to be looked up anew; unlike that of any other slot.
    pub(super) epoch: u32,
    /// Whose translations these are while another slot is in use; `None` if there are none but global ones.
    pub(super) owner: Option<Space>,
    /// When it was last in use.
    pub(super) used: u64,
}

impl Slot {
    pub(super) fn new(epoch: u32) -> Box<Self> {
        Box::new(Self {
            data: std::array::from_fn(|_| DataTable::new()),
            fetch: std::array::from_fn(|_| FetchTable::new()),
            local: NOTHING,
            global: NOTHING,
            written: Filter::EMPTY,
            own_kernel_code: false,
            epoch,
            owner: None,
            used: 0,
        })
    }

    pub(super) fn table(&self, class: Class) -> u64 {
        self.data[class as usize].rows.as_ptr() as u64
    }

    pub(super) fn fetch_table(&self, user: bool) -> u64 {
        self.fetch[usize::from(user)].rows.as_ptr() as u64
    }

    #[inline(always)]
    pub(super) fn read(&self, class: Class, linear: u64) -> &Entry {
        self.data[class as usize].entry(READ, linear)
    }

    #[inline(always)]
    pub(super) fn write(&self, class: Class, linear: u64) -> &Entry {
        self.data[class as usize].entry(WRITE, linear)
    }

    #[inline(always)]
    pub(super) fn fetch(&self, user: bool, linear: u64) -> &FetchEntry {
        self.fetch[usize::from(user)].entry(0, linear)
    }

    fn contents(&mut self, page: Page) -> &mut Contents {
        if page.global { &mut self.global } else { &mut self.local }
    }

    pub(super) fn fill(&mut self, class: Class, entry: Entry, grant: Grant, page: Page) {
        let write = grant != Grant::Read;
        // A write leaves the read entry of another page alone: a loop that copies between pages of one row would
        // otherwise miss at every step.
        let table = &mut self.data[class as usize];
        if grant != Grant::Write || table.is_free_for(READ, entry.tag) {
            table.set(READ, entry.tag, entry, page.global);
        }
        if write {
            table.set(WRITE, entry.tag, entry, page.global);
        }
        self.contents(page).note(entry.tag, page.size);
        if write {
            self.written.insert(entry.host >> 12);
        }
    }

    pub(super) fn fill_fetch(&mut self, user: bool, entry: FetchEntry, page: Page) {
        self.fetch[usize::from(user)].set(0, entry.tag, entry, page.global);
        self.contents(page).note_code(entry.tag, page.size);
        self.own_kernel_code |= !user && !page.global;
    }

    /// Forgets everything, or everything but global pages. True if code was fetched by what is gone.
    pub(super) fn flush(&mut self, keep_global: bool) -> bool {
        let keep_global = keep_global && self.global.any;
        let gone = self.local.any || self.global.any && !keep_global;
        let coded = self.local.coded || self.global.coded && !keep_global;
        if gone {
            for table in &mut self.data {
                table.clear(keep_global);
            }
            for table in &mut self.fetch {
                table.clear(keep_global);
            }
        }
        if self.local.any {
            self.local = NOTHING;
            self.own_kernel_code = false;
        }
        if gone && !keep_global {
            self.global = NOTHING;
        }
        coded
    }

    /// Forgets one page, and with it everything if it may be part of a large one. True if code may have been fetched by
    /// what is gone.
    pub(super) fn flush_page(&mut self, linear: u64) -> bool {
        if self.local.may_be_in_large_page(linear) || self.global.may_be_in_large_page(linear) {
            return self.flush(false);
        }
        for table in &mut self.data {
            table.drop_one(READ, linear);
            table.drop_one(WRITE, linear);
        }
        for table in &mut self.fetch {
            table.drop_one(0, linear);
        }
        self.local.may_have_code_at(linear) || self.global.may_have_code_at(linear)
    }

    /// Forgets the write entry of one page in one class.
    pub(super) fn forget_write(&mut self, class: Class, linear: u64) {
        self.data[class as usize].drop_one(WRITE, linear);
    }

    /// Whether a global page may lie in the same half of the address space as `linear`.
    pub(super) fn has_global_near(&self, linear: u64) -> bool {
        self.global.halves[half_of(linear)]
    }

    /// Forgets every write entry for a host page.
    pub(super) fn protect(&mut self, host_page: u64) {
        if !self.written.may_hold(host_page >> 12) {
            return;
        }
        // What is looked at anyway tells which pages are written still; the filter would soon hold every page.
        self.written = Filter::EMPTY;
        for table in &mut self.data {
            table.drop_entries(WRITE, |entry| {
                let stale = entry.host == host_page;
                if !stale {
                    self.written.insert(entry.host >> 12);
                }
                stale
            });
        }
    }
}
