//! The tables of one address space.

use super::filter::Filter;
use super::{Class, ENTRIES, Entry, FETCH_ENTRIES, FetchEntry, Grant, Page, Space};

const CLASSES: usize = 4;

/// What a table is made of.
trait Row: Copy {
    /// What is in a row that holds nothing.
    fn empty(index: usize) -> Self;
}

impl Row for Entry {
    #[inline(always)]
    fn empty(index: usize) -> Self {
        Self { tag: (index as u64 ^ 1) << 12, host: 0 }
    }
}

impl Row for FetchEntry {
    #[inline(always)]
    fn empty(_: usize) -> Self {
        // No page has this address.
        Self { tag: 0x800, physical: 0 }
    }
}

/// A direct-mapped table, with marks that make it cheap to empty. `WORDS` is a 64th of `ROWS`.
struct Table<E, const ROWS: usize, const WORDS: usize> {
    /// On the heap from the first, since it is too large for a stack.
    rows: Box<[E]>,
    /// Rows that have been written since they were last emptied.
    filled: [u64; WORDS],
    /// Those of them that hold a global page.
    global: [u64; WORDS],
}

type DataTable = Table<Entry, ENTRIES, { ENTRIES / 64 }>;
type FetchTable = Table<FetchEntry, FETCH_ENTRIES, { FETCH_ENTRIES / 64 }>;

impl<E: Row, const ROWS: usize, const WORDS: usize> Table<E, ROWS, WORDS> {
    fn new() -> Self {
        let rows = (0..ROWS).map(E::empty).collect();
        Self { rows, filled: [0; WORDS], global: [0; WORDS] }
    }

    #[inline(always)]
    fn index(linear: u64) -> usize {
        (linear >> 12) as usize % ROWS
    }

    #[inline(always)]
    fn row(&self, linear: u64) -> &E {
        &self.rows[Self::index(linear)]
    }

    #[inline(always)]
    fn set(&mut self, linear: u64, row: E, global: bool) {
        let index = Self::index(linear);
        let bit = 1 << (index % 64);
        self.rows[index] = row;
        self.filled[index / 64] |= bit;
        self.global[index / 64] &= !bit;
        self.global[index / 64] |= u64::from(global) << (index % 64);
    }

    /// Whether the row for an address holds no page, or the address's own.
    fn is_free_for(&self, linear: u64, tag: impl Fn(&E) -> u64) -> bool {
        let tag = tag(self.row(linear));
        tag == linear & !0xfff || Self::index(tag) != Self::index(linear)
    }

    /// Empties the row for an address if `stale` picks it.
    fn drop_row(&mut self, linear: u64, stale: impl Fn(&E) -> bool) {
        let index = Self::index(linear);
        if stale(&self.rows[index]) {
            self.rows[index] = E::empty(index);
        }
    }

    /// Empties the table, but for global pages if those are to stay.
    fn clear(&mut self, keep_global: bool) {
        for word in 0..WORDS {
            let kept = if keep_global { self.global[word] } else { 0 };
            let mut gone = self.filled[word] & !kept;
            self.filled[word] = kept;
            self.global[word] = kept;
            let first = 64 * word;
            let rows = &mut self.rows[first..first + 64];
            if gone.count_ones() > 24 && kept == 0 {
                rows.iter_mut().zip(first..).for_each(|(row, index)| *row = E::empty(index));
                continue;
            }
            while gone != 0 {
                let at = gone.trailing_zeros() as usize;
                rows[at] = E::empty(first + at);
                gone &= gone - 1;
            }
        }
    }

    /// Empties the rows that `stale` picks.
    fn drop_rows(&mut self, stale: impl Fn(&E) -> bool) {
        for word in 0..WORDS {
            let mut filled = self.filled[word];
            while filled != 0 {
                let index = 64 * word + filled.trailing_zeros() as usize;
                let row = &mut self.rows[index];
                if stale(row) {
                    *row = E::empty(index);
                }
                filled &= filled - 1;
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
    /// Parts of pages of 2 or 4 MiB, by 4 MiB.
    large: Filter<16>,
    /// Parts of pages of 1 GiB.
    huge: Filter<4>,
    /// Linear pages that code was fetched from.
    code: Filter<32>,
    coded: bool,
    /// Host pages with a write entry.
    written: Filter<64>,
}

pub(super) const NOTHING: Contents = Contents {
    any: false,
    halves: [false; 2],
    large: Filter::EMPTY,
    huge: Filter::EMPTY,
    code: Filter::EMPTY,
    coded: false,
    written: Filter::EMPTY,
};

impl Contents {
    #[inline(always)]
    fn note(&mut self, linear: u64, size: u64) {
        self.any = true;
        self.halves[(linear >> 63) as usize] = true;
        if size > 4096 {
            if size >= 1 << 30 {
                self.huge.insert(linear >> 30);
            } else {
                self.large.insert(linear >> 22);
            }
        }
    }

    #[inline(always)]
    pub(super) fn note_code(&mut self, linear: u64, size: u64) {
        self.note(linear, size);
        self.coded = true;
        self.code.insert(linear >> 12);
    }

    /// Whether code may have been fetched from a page that goes with this one.
    pub(super) fn may_have_code_at(&self, linear: u64) -> bool {
        self.coded && (self.code.may_hold(linear >> 12) || self.may_be_in_large_page(linear))
    }

    fn may_be_in_large_page(&self, linear: u64) -> bool {
        self.any && (self.large.may_hold(linear >> 22) || self.huge.may_hold(linear >> 30))
    }
}

/// The tables of one address space.
pub(super) struct Slot {
    read: [DataTable; CLASSES],
    write: [DataTable; CLASSES],
    fetch: [FetchTable; 2],
    local: Contents,
    global: Contents,
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
            read: std::array::from_fn(|_| DataTable::new()),
            write: std::array::from_fn(|_| DataTable::new()),
            fetch: std::array::from_fn(|_| FetchTable::new()),
            local: NOTHING,
            global: NOTHING,
            own_kernel_code: false,
            epoch,
            owner: None,
            used: 0,
        })
    }

    pub(super) fn tables(&self, class: Class) -> (u64, u64) {
        let (read, write) = (&self.read[class as usize], &self.write[class as usize]);
        (read.rows.as_ptr() as u64, write.rows.as_ptr() as u64)
    }

    pub(super) fn fetch_table(&self, user: bool) -> u64 {
        self.fetch[usize::from(user)].rows.as_ptr() as u64
    }

    #[inline(always)]
    pub(super) fn read(&self, class: Class, linear: u64) -> &Entry {
        self.read[class as usize].row(linear)
    }

    #[inline(always)]
    pub(super) fn write(&self, class: Class, linear: u64) -> &Entry {
        self.write[class as usize].row(linear)
    }

    #[inline(always)]
    pub(super) fn fetch(&self, user: bool, linear: u64) -> &FetchEntry {
        self.fetch[usize::from(user)].row(linear)
    }

    fn contents(&mut self, page: Page) -> &mut Contents {
        if page.global { &mut self.global } else { &mut self.local }
    }

    pub(super) fn fill(&mut self, class: Class, entry: Entry, grant: Grant, page: Page) {
        let write = grant != Grant::Read;
        // A write leaves the read entry of another page alone: a loop that copies between pages of one row would
        // otherwise miss at every step.
        let read = &mut self.read[class as usize];
        if grant != Grant::Write || read.is_free_for(entry.tag, |row| row.tag) {
            read.set(entry.tag, entry, page.global);
        }
        if write {
            self.write[class as usize].set(entry.tag, entry, page.global);
        }
        let contents = self.contents(page);
        contents.note(entry.tag, page.size);
        if write {
            contents.written.insert(entry.host >> 12);
        }
    }

    pub(super) fn fill_fetch(&mut self, user: bool, entry: FetchEntry, page: Page) {
        self.fetch[usize::from(user)].set(entry.tag, entry, page.global);
        self.contents(page).note_code(entry.tag, page.size);
        self.own_kernel_code |= !user && !page.global;
    }

    /// Forgets everything, or everything but global pages. True if code was fetched by what is gone.
    pub(super) fn flush(&mut self, keep_global: bool) -> bool {
        let keep_global = keep_global && self.global.any;
        let gone = self.local.any || self.global.any && !keep_global;
        let coded = self.local.coded || self.global.coded && !keep_global;
        if gone {
            for table in self.read.iter_mut().chain(&mut self.write) {
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
        let page = linear & !0xfff;
        for table in self.read.iter_mut().chain(&mut self.write) {
            table.drop_row(page, |row| row.tag == page);
        }
        for table in &mut self.fetch {
            table.drop_row(page, |row| row.tag == page);
        }
        self.local.may_have_code_at(page) || self.global.may_have_code_at(page)
    }

    /// Forgets the write entry of one page in one class.
    pub(super) fn forget_write(&mut self, class: Class, linear: u64) {
        self.write[class as usize].drop_row(linear, |row| row.tag == linear & !0xfff);
    }

    /// Whether a global page may lie in the same half of the address space as `linear`.
    pub(super) fn has_global_near(&self, linear: u64) -> bool {
        self.global.halves[(linear >> 63) as usize]
    }

    /// Forgets every write entry for a host page.
    pub(super) fn protect(&mut self, host_page: u64) {
        let number = host_page >> 12;
        if self.local.written.may_hold(number) || self.global.written.may_hold(number) {
            for table in &mut self.write {
                table.drop_rows(|entry| entry.host == host_page);
            }
        }
    }
}
