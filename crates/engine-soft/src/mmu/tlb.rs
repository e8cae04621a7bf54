//! The soft TLB: guest linear page to host address, with permission proved by presence.
//!
//! One direct-mapped table per access class and kind. An entry matches only an access that lies within its
//! page, that the page tables permit, and that needs no further thought: pages with decoded code, device
//! registers, ROM and clean pages never get a write entry, so one comparison decides.

/// Entries per table.
pub const ENTRIES: usize = 1024;

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

const CLASSES: usize = 4;
/// No page-aligned address equals it.
const EMPTY: u64 = 1;

/// One entry: the linear page, and what to add to a linear address to get the host's.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Entry {
    tag: u64,
    addend: u64,
}

const NO_ENTRY: Entry = Entry { tag: EMPTY, addend: 0 };

type Table = [Entry; ENTRIES];

/// The soft TLB of one vCPU.
pub struct Tlb {
    read: [Table; CLASSES],
    write: [Table; CLASSES],
    /// The smallest aligned region that holds every large page with an entry: `(address & mask) == base`.
    large: Option<(u64, u64)>,
    /// Counts flushes; whatever else depends on translations compares it.
    pub generation: u32,
}

impl std::fmt::Debug for Tlb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tlb").field("generation", &self.generation).finish_non_exhaustive()
    }
}

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear >> 12) as usize % ENTRIES
}

impl Tlb {
    /// An empty TLB.
    pub fn new() -> Box<Self> {
        Box::new(Self {
            read: [[NO_ENTRY; ENTRIES]; CLASSES],
            write: [[NO_ENTRY; ENTRIES]; CLASSES],
            large: None,
            generation: 0,
        })
    }

    #[inline(always)]
    fn find(table: &Table, linear: u64, size: u64) -> Option<*mut u8> {
        let entry = &table[index(linear)];
        // An access that leaves the page has a last byte whose page differs from the tag.
        (linear.wrapping_add(size - 1) & !0xfff == entry.tag)
            .then(|| linear.wrapping_add(entry.addend) as *mut u8)
    }

    /// Addresses of a class's tables for reads and for writes, for translated code: [`ENTRIES`] of [`Entry`] each, indexed
    /// by the low bits of the page number. They stay where they are as long as the TLB does.
    #[inline(always)]
    pub(crate) fn tables(&self, class: Class) -> (u64, u64) {
        (self.read[class as usize].as_ptr() as u64, self.write[class as usize].as_ptr() as u64)
    }

    /// The host address for a read of `size` bytes.
    #[inline(always)]
    pub fn read(&self, class: Class, linear: u64, size: u64) -> Option<*mut u8> {
        Self::find(&self.read[class as usize], linear, size)
    }

    /// The host address for a write (or read and write) of `size` bytes.
    #[inline(always)]
    pub fn write(&self, class: Class, linear: u64, size: u64) -> Option<*mut u8> {
        Self::find(&self.write[class as usize], linear, size)
    }

    /// Remembers a page. `page_size` is that of the guest's mapping, in bytes.
    pub fn fill(&mut self, class: Class, linear: u64, host: *mut u8, write: bool, page_size: u64) {
        if class == Class::Slow {
            return;
        }
        if page_size > 4096 {
            self.note_large(linear, page_size);
        }
        let entry = Entry { tag: linear & !0xfff, addend: (host as u64).wrapping_sub(linear & !0xfff) };
        self.read[class as usize][index(linear)] = entry;
        if write {
            self.write[class as usize][index(linear)] = entry;
        }
    }

    fn note_large(&mut self, linear: u64, page_size: u64) {
        let mut mask = !(page_size - 1);
        if let Some((base, old)) = self.large {
            mask &= old;
            while (base ^ linear) & mask != 0 {
                mask <<= 1;
            }
        }
        self.large = Some((linear & mask, mask));
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        for table in self.read.iter_mut().chain(&mut self.write) {
            table.fill(NO_ENTRY);
        }
        self.large = None;
        self.generation = self.generation.wrapping_add(1);
    }

    /// Forgets one page, and with it all pages if it may be part of a large one.
    pub fn flush_page(&mut self, linear: u64) {
        if self.large.is_some_and(|(base, mask)| linear & mask == base) {
            return self.flush();
        }
        for table in self.read.iter_mut().chain(&mut self.write) {
            let entry = &mut table[index(linear)];
            if entry.tag == linear & !0xfff {
                *entry = NO_ENTRY;
            }
        }
        self.generation = self.generation.wrapping_add(1);
    }

    /// Forgets the write entry of one page in one class; the read entry stays.
    pub fn forget_write(&mut self, class: Class, linear: u64) {
        let entry = &mut self.write[class as usize][index(linear)];
        if entry.tag == linear & !0xfff {
            *entry = NO_ENTRY;
        }
    }

    /// Forgets every write entry for a host page: it now holds decoded code.
    pub fn protect(&mut self, host_page: *mut u8) {
        for table in &mut self.write {
            for entry in table.iter_mut() {
                if entry.tag != EMPTY && entry.tag.wrapping_add(entry.addend) == host_page as u64 {
                    *entry = NO_ENTRY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u64) -> *mut u8 {
        (0x7000_0000_0000 + n * 0x1000) as *mut u8
    }

    #[test]
    fn access_that_leaves_the_page_misses() {
        let mut tlb = Tlb::new();
        tlb.fill(Class::User, 0x5000, host(0), true, 4096);
        assert_eq!(tlb.read(Class::User, 0x5ff8, 8), Some(host(0).wrapping_add(0xff8)));
        assert_eq!(tlb.read(Class::User, 0x5ff9, 8), None);
        assert_eq!(tlb.write(Class::Kernel, 0x5000, 1), None);
    }

    #[test]
    fn address_that_wraps_never_hits() {
        let mut tlb = Tlb::new();
        tlb.fill(Class::User, 0xffff_ffff_ffff_f000, host(0), true, 4096);
        tlb.fill(Class::User, 0, host(1), true, 4096);
        assert_eq!(tlb.read(Class::User, u64::MAX, 2), None);
    }

    #[test]
    fn flush_of_a_page_inside_a_large_one_drops_all_its_parts() {
        let mut tlb = Tlb::new();
        tlb.fill(Class::User, 0x20_0000, host(0), false, 2 << 20);
        tlb.fill(Class::User, 0x20_3000, host(3), false, 2 << 20);
        tlb.fill(Class::User, 0x9000, host(9), false, 4096);
        tlb.flush_page(0x9000);
        assert_eq!(tlb.read(Class::User, 0x9000, 1), None);
        assert!(tlb.read(Class::User, 0x20_3000, 1).is_some());
        tlb.flush_page(0x20_1000);
        assert_eq!(tlb.read(Class::User, 0x20_3000, 1), None);
    }

    #[test]
    fn two_large_pages_far_apart_are_both_covered() {
        let mut tlb = Tlb::new();
        tlb.fill(Class::Kernel, 0xffff_8880_0020_0000, host(0), false, 2 << 20);
        tlb.fill(Class::Kernel, 0x40_0000, host(5), false, 2 << 20);
        tlb.flush_page(0x50_0000);
        assert_eq!(tlb.read(Class::Kernel, 0x40_0000, 1), None);
    }

    #[test]
    fn protected_page_keeps_its_read_entry() {
        let mut tlb = Tlb::new();
        tlb.fill(Class::Kernel, 0x5000, host(2), true, 4096);
        tlb.protect(host(2));
        assert!(tlb.read(Class::Kernel, 0x5000, 1).is_some());
        assert_eq!(tlb.write(Class::Kernel, 0x5000, 1), None);
    }
}
