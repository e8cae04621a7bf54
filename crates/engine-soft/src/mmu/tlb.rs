//! The soft TLB: guest linear page to host address, with permission proved by presence.
//!
//! One direct-mapped table per access class and kind. An entry matches only an access that lies within its
//! page, that the page tables permit, and that needs no further thought: pages with decoded code, device
//! registers, ROM and clean pages never get a write entry, so one comparison decides. Instruction fetches have tables of
//! their own, which lead to guest physical pages: code is known by those.
//!
//! Each address space that a process-context identifier names has such tables ([`slot`]), for as long as there is room:
//! [`Tlb::switch`] puts those of another one in place. A processor may forget any translation at any time (SDM 3A 4.10.2),
//! so more is forgotten than must be where that is simpler; what must go is said at each function.

mod filter;
mod slot;

use slot::{Contents, NOTHING, Slot};

/// Entries per table: with a quarter of them, a Python program's code, heap and libraries took each other's places, and it
/// missed four times as often.
pub const ENTRIES: usize = 16384;
/// Entries per table of fetches.
pub const FETCH_ENTRIES: usize = 4096;
/// Address spaces remembered. Linux takes turns with six identifiers.
const SLOTS: usize = 8;

/// Who makes an access, as far as permissions differ. Each has tables of its own, so a change of privilege
/// needs no flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2 under SMAP with AC clear, and implicit supervisor accesses.
    Kernel = 1,
    /// CPL 0 to 2 where user pages are accessible (SMAP off, or AC set).
    KernelAc = 2,
    /// Accesses that each need a look: alignment checks or data breakpoints are on. Never filled.
    Slow = 3,
}

/// One entry: the linear page's address and the host's. An access is permitted if its address less the page's is no more
/// than what leaves room for it in a page: one comparison tells the page, the permission, and that the access does not leave it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entry {
    /// In a row without an entry this is a page that belongs in another row. So the distance of an address that leads to this one is at
    /// least a page.
    tag: u64,
    host: u64,
}

/// Of a page, what reads ask and what writes ask.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct DataRow([Entry; 2]);

/// One entry of a table of fetches. That it is there means that an instruction fetch from the page, by the privilege that
/// the table is for, is permitted and reads that physical page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct FetchEntry {
    /// The linear page's address; no multiple of the page size if there is none.
    tag: u64,
    /// The guest physical page's address, A20 applied.
    physical: u64,
}

/// What the page tables say of a page besides its address.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Size in bytes of the guest's mapping.
    pub size: u64,
    /// Global page: stays when its address space is flushed.
    pub global: bool,
}

/// What a page that is filled in may be used for, and what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Reads, and that was asked for.
    Read,
    /// A read was asked for, writes may be done as well.
    ReadOfWritable,
    /// A write was asked for.
    Write,
}

/// An address space: what CR3 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Process-context identifier, zero without CR4.PCIDE.
    pub pcid: u16,
    /// Address of the topmost table.
    pub base: u64,
}

/// Figures for `-v`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Times that all pages, or all of an address space, had to be forgotten.
    pub flushes: u64,
    /// Times that one page had to be.
    pub page_flushes: u64,
    /// Changes of the address space that found its tables in place.
    pub kept: u64,
    /// Entries made for loads and stores.
    pub fills: u64,
    /// Entries made for fetches.
    pub fetch_fills: u64,
}

/// The soft TLB of one vCPU.
pub struct Tlb {
    /// Of the address space in use.
    current: Box<Slot>,
    /// Of others, made when they are first needed.
    parked: Vec<Box<Slot>>,
    /// See [`Tlb::generation`]: below CPL 3, and there.
    generations: [u32; 2],
    /// The newest generation.
    newest: u32,
    /// The generation of supervisor code in global pages, which all address spaces share.
    shared: u32,
    /// The pages that such code was fetched from.
    shared_code: Contents,
    /// Counts switches; orders slots by their last use.
    switches: u64,
    /// See [`Tlb::changes`].
    changes: u64,
    /// Counts the times that writing was taken away from pages whose translation stays.
    holds: u64,
    /// What it has done.
    pub counters: Counters,
}

impl std::fmt::Debug for Tlb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tlb").field("generations", &self.generations).finish_non_exhaustive()
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes `generation` one that nothing had before.
fn renew(generation: &mut u32, newest: &mut u32) {
    // Zero is left out: tables of jump targets use it for "none".
    *newest = newest.checked_add(1).unwrap_or(1);
    *generation = *newest;
}

impl Tlb {
    /// An empty TLB.
    pub fn new() -> Self {
        Self {
            current: Slot::new(1),
            parked: Vec::new(),
            generations: [2, 1],
            newest: 2,
            shared: 2,
            shared_code: NOTHING,
            switches: 0,
            changes: 0,
            holds: 0,
            counters: Counters::default(),
        }
    }

    /// Names the translations that code at CPL 3 (`user`) or below is fetched through: the number changes with every flush
    /// that may concern code, and with the address space, whose own comes back with it. So what was found by a fetch under
    /// a number may be used whenever the number is the same. Supervisor code has one number in all address spaces as long
    /// as it lies in global pages.
    ///
    /// The number is known after the fetch only, which may change it.
    #[inline(always)]
    pub fn generation(&self, user: bool) -> u32 {
        self.generations[usize::from(user)]
    }

    /// How many numbers [`Tlb::generation`] has had, for `-v`; from 1 again after the last of 32 bits.
    pub fn generations_made(&self) -> u32 {
        self.newest
    }

    /// Gives everything a new number, for who remembers numbers that may come again.
    pub(crate) fn renew_generations(&mut self) {
        renew(&mut self.shared, &mut self.newest);
        renew(&mut self.current.epoch, &mut self.newest);
        for slot in &mut self.parked {
            renew(&mut slot.epoch, &mut self.newest);
        }
        self.update_generations();
    }

    /// Goes on with numbers behind this one.
    #[cfg(test)]
    pub(crate) fn skip_generations(&mut self, newest: u32) {
        self.newest = newest;
    }

    /// Counts whenever anything that it holds may have been forgotten, or another address space is in use: what a walk has
    /// found may be remembered for as long as the number is the same.
    #[inline(always)]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Changes whenever a page that was found writable may no longer be.
    #[inline(always)]
    pub(crate) fn write_changes(&self) -> u64 {
        self.changes + self.holds
    }

    fn update_generations(&mut self) {
        let own = self.current.epoch;
        self.generations = [if self.current.own_kernel_code { own } else { self.shared }, own];
    }

    #[inline(always)]
    fn find(entry: &Entry, linear: u64, size: u64) -> Option<*mut u8> {
        let offset = linear.wrapping_sub(entry.tag);
        (offset <= 0x1000 - size).then(|| entry.host.wrapping_add(offset) as *mut u8)
    }

    /// Address of a class's table for reads and writes, for translated code: [`ENTRIES`] of [`DataRow`], indexed by the low bits of the
    /// page number. It holds until the next [`Tlb::switch`].
    #[inline(always)]
    pub(crate) fn table(&self, class: Class) -> u64 {
        self.current.table(class)
    }

    /// Address of the table of fetches at CPL 3 (`user`) or below, for translated code: [`FETCH_ENTRIES`] of [`FetchEntry`],
    /// indexed by the low bits of the page number. It holds until the next [`Tlb::switch`].
    #[inline(always)]
    pub fn fetch_table(&self, user: bool) -> u64 {
        self.current.fetch_table(user)
    }

    /// The host address for a read of `size` bytes.
    #[inline(always)]
    pub fn read(&self, class: Class, linear: u64, size: u64) -> Option<*mut u8> {
        Self::find(self.current.read(class, linear), linear, size)
    }

    /// The host address for a write (or read and write) of `size` bytes.
    #[inline(always)]
    pub fn write(&self, class: Class, linear: u64, size: u64) -> Option<*mut u8> {
        Self::find(self.current.write(class, linear), linear, size)
    }

    /// The guest physical address that an instruction fetch reads from, if it is known to be permitted.
    #[inline(always)]
    pub fn fetch(&self, user: bool, linear: u64) -> Option<u64> {
        let entry = self.current.fetch(user, linear);
        (linear & !0xfff == entry.tag).then_some(entry.physical | linear & 0xfff)
    }

    /// Remembers a page for loads and stores.
    pub fn fill(&mut self, class: Class, linear: u64, host: *mut u8, grant: Grant, page: Page) {
        if class == Class::Slow {
            return;
        }
        self.counters.fills += 1;
        let tag = linear & !0xfff;
        self.current.fill(class, Entry { tag, host: host as u64 & !0xfff }, grant, page);
    }

    /// Remembers a page for fetches.
    pub fn fill_fetch(&mut self, user: bool, linear: u64, physical: u64, page: Page) {
        self.counters.fetch_fills += 1;
        let entry = FetchEntry { tag: linear & !0xfff, physical: physical & !0xfff };
        let before = self.current.own_kernel_code;
        self.current.fill_fetch(user, entry, page);
        if !user && page.global {
            self.shared_code.note_code(entry.tag, page.size);
        }
        if self.current.own_kernel_code != before {
            // Whoever has asked for the number before the fetch leaves nothing behind that another address space finds.
            renew(&mut self.shared, &mut self.newest);
            self.update_generations();
        }
    }

    fn flush_current(&mut self, keep_global: bool) {
        self.changes += 1;
        if self.current.flush(keep_global) {
            renew(&mut self.current.epoch, &mut self.newest);
        }
        self.update_generations();
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.counters.flushes += 1;
        self.forget_all();
    }

    /// Forgets everything, for the engine's own reasons: a guest's flushes are the same in number on every engine.
    pub(crate) fn forget_all(&mut self) {
        self.changes += 1;
        self.shared_code = NOTHING;
        renew(&mut self.shared, &mut self.newest);
        self.flush_current(false);
        for slot in &mut self.parked {
            slot.owner = None;
            if slot.flush(false) {
                renew(&mut slot.epoch, &mut self.newest);
            }
        }
    }

    /// Forgets all that is not global, in every address space.
    pub fn flush_all_but_global(&mut self) {
        self.changes += 1;
        self.counters.flushes += 1;
        self.flush_current(true);
        for slot in &mut self.parked {
            slot.owner = None;
            if slot.flush(true) {
                renew(&mut slot.epoch, &mut self.newest);
            }
        }
    }

    /// Forgets all that is not global in one address space: the one in use if `pcid` is `None`.
    pub fn flush_space(&mut self, pcid: Option<u16>) {
        self.changes += 1;
        self.counters.flushes += 1;
        match pcid {
            None => self.flush_current(true),
            Some(pcid) => {
                // An orphan is flushed when it is next taken.
                if let Some(slot) = self.parked_slot(pcid) {
                    slot.owner = None;
                }
            }
        }
    }

    fn parked_slot(&mut self, pcid: u16) -> Option<&mut Box<Slot>> {
        self.parked.iter_mut().find(|slot| slot.owner.is_some_and(|owner| owner.pcid == pcid))
    }

    /// Forgets one page of the address space in use, and global ones at that address in all (SDM 3A 4.10.4.1, INVLPG). All
    /// pages go if it may be part of a large one.
    pub fn flush_page(&mut self, linear: u64) {
        self.changes += 1;
        self.counters.page_flushes += 1;
        if self.current.flush_page(linear) {
            renew(&mut self.current.epoch, &mut self.newest);
        }
        if self.shared_code.may_have_code_at(linear) {
            renew(&mut self.shared, &mut self.newest);
        }
        self.update_generations();
        for slot in self.parked.iter_mut().filter(|slot| slot.has_global_near(linear)) {
            if slot.flush_page(linear) {
                renew(&mut slot.epoch, &mut self.newest);
            }
        }
    }

    /// Forgets one page of an address space that is not in use.
    pub fn flush_page_of(&mut self, pcid: u16, linear: u64) {
        self.changes += 1;
        self.counters.page_flushes += 1;
        let mut newest = self.newest;
        if let Some(slot) = self.parked_slot(pcid)
            && slot.flush_page(linear)
        {
            renew(&mut slot.epoch, &mut newest);
        }
        self.newest = newest;
    }

    /// Goes from one address space to another, or loads CR3 with the same. All that is not global in the new one is
    /// forgotten, unless `keep` and nothing else had its identifier (SDM 3A 4.10.4.1, MOV to CR3).
    pub fn switch(&mut self, leaving: Space, entering: Space, keep: bool) {
        self.changes += 1;
        if leaving.pcid != entering.pcid {
            self.switches += 1;
            self.current.owner = Some(leaving);
            self.current.used = self.switches;
            let place = self.place_for(entering.pcid);
            std::mem::swap(&mut self.current, &mut self.parked[place]);
            let same = self.current.owner == Some(entering);
            self.current.owner = None;
            if keep && same {
                self.counters.kept += 1;
                self.update_generations();
                return;
            }
        } else if keep && leaving == entering {
            return;
        }
        self.counters.flushes += 1;
        self.flush_current(true);
    }

    /// Where among the parked slots the one for an identifier is, or one that can be had for it.
    fn place_for(&mut self, pcid: u16) -> usize {
        let owned = |slot: &Slot| slot.owner.is_some_and(|owner| owner.pcid == pcid);
        if let Some(place) = self.parked.iter().position(|slot| owned(slot)) {
            return place;
        }
        let free = self.parked.iter().position(|slot| slot.owner.is_none());
        if free.is_none() && self.parked.len() + 1 < SLOTS {
            let mut slot = Slot::new(0);
            renew(&mut slot.epoch, &mut self.newest);
            self.parked.push(slot);
            return self.parked.len() - 1;
        }
        let oldest = || (0..self.parked.len()).min_by_key(|&i| self.parked[i].used);
        free.or_else(oldest).unwrap_or(0)
    }

    /// Forgets the write entry of one page in one class, in the address space in use or in all; the read entry stays.
    pub fn forget_write(&mut self, class: Class, linear: u64, everywhere: bool) {
        self.holds += 1;
        self.current.forget_write(class, linear);
        if everywhere {
            for slot in &mut self.parked {
                slot.forget_write(class, linear);
            }
        }
    }

    /// Forgets every write entry for a host page: it now holds decoded code.
    pub fn protect(&mut self, host_page: *mut u8) {
        self.holds += 1;
        self.current.protect(host_page as u64);
        for slot in &mut self.parked {
            slot.protect(host_page as u64);
        }
    }
}

#[cfg(test)]
mod tests;
