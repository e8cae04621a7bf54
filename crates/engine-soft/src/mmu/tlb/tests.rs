use super::*;

const SMALL: Page = Page { size: 4096, global: false };
const GLOBAL: Page = Page { size: 4096, global: true };
const LARGE: Page = Page { size: 2 << 20, global: false };

fn host(n: u64) -> *mut u8 {
    (0x7000_0000_0000 + n * 0x1000) as *mut u8
}

fn space(pcid: u16) -> Space {
    Space { pcid, base: 0x10_0000 + 0x1000 * u64::from(pcid) }
}

#[test]
fn access_that_leaves_the_page_misses() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    assert_eq!(tlb.read(Class::User, 0x5ff8, 8), Some(host(0).wrapping_add(0xff8)));
    assert_eq!(tlb.read(Class::User, 0x5ff9, 8), None);
    assert_eq!(tlb.write(Class::Kernel, 0x5000, 1), None);
}

#[test]
fn address_that_wraps_never_hits() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0xffff_ffff_ffff_f000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.fill(Class::User, 0, host(1), Grant::ReadOfWritable, SMALL);
    assert_eq!(tlb.read(Class::User, u64::MAX, 2), None);
}

#[test]
fn flush_of_a_page_inside_a_large_one_drops_all_its_parts() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x40_0000, host(0), Grant::Read, LARGE);
    tlb.fill(Class::User, 0x40_3000, host(3), Grant::Read, LARGE);
    tlb.fill(Class::User, 0x9000, host(9), Grant::Read, SMALL);
    tlb.flush_page(0x9000);
    assert_eq!(tlb.read(Class::User, 0x9000, 1), None);
    assert!(tlb.read(Class::User, 0x40_3000, 1).is_some());
    tlb.flush_page(0x40_1000);
    assert_eq!(tlb.read(Class::User, 0x40_3000, 1), None);
}

#[test]
fn flush_of_a_page_drops_parts_of_every_size_of_large_page() {
    for (size, distance) in [(2_u64 << 20, 0x1f_f000), (4 << 20, 0x3f_f000), (1 << 30, 0x3fff_f000)] {
        for base in [0x1_4000_0000, 0xffff_8880_0000_0000] {
            let mut tlb = Tlb::new();
            tlb.fill(Class::Kernel, base, host(0), Grant::ReadOfWritable, Page { size, global: true });
            tlb.flush_page(base + distance);
            assert_eq!(tlb.read(Class::Kernel, base, 1), None, "{size:#x} at {base:#x}");
        }
    }
}

#[test]
fn flush_of_a_small_page_leaves_large_ones_elsewhere() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0xffff_8880_0020_0000, host(0), Grant::ReadOfWritable, LARGE);
    tlb.fill(Class::Kernel, 0xffff_ffff_8100_0000, host(1), Grant::ReadOfWritable, LARGE);
    tlb.fill(Class::Kernel, 0xffff_c900_0123_4000, host(2), Grant::ReadOfWritable, SMALL);
    let before = tlb.generation(true);
    tlb.flush_page(0xffff_c900_0123_4000);
    tlb.flush_page(0x7fff_ffff_e000);
    assert_eq!(tlb.read(Class::Kernel, 0xffff_c900_0123_4000, 1), None);
    assert!(tlb.write(Class::Kernel, 0xffff_8880_0020_0000, 1).is_some());
    assert!(tlb.write(Class::Kernel, 0xffff_ffff_8100_0000, 1).is_some());
    assert_eq!(tlb.generation(true), before);
}

#[test]
fn flush_of_a_programs_page_leaves_its_others_whatever_large_pages_the_kernel_has() {
    let mut tlb = Tlb::new();
    for n in 0..1024 {
        tlb.fill(Class::Kernel, 0xffff_8880_0000_0000 + (n << 22), host(n), Grant::Read, LARGE);
    }
    tlb.fill(Class::User, 0x7ffd_1234_5000, host(1), Grant::Read, SMALL);
    tlb.fill(Class::User, 0x5555_5678_9000, host(2), Grant::Read, SMALL);
    tlb.flush_page(0x7ffd_1234_5000);
    assert_eq!(tlb.read(Class::User, 0x7ffd_1234_5000, 1), None);
    assert!(tlb.read(Class::User, 0x5555_5678_9000, 1).is_some());
}

#[test]
fn protected_page_keeps_its_read_entry() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0x5000, host(2), Grant::ReadOfWritable, SMALL);
    tlb.protect(host(2));
    assert!(tlb.read(Class::Kernel, 0x5000, 1).is_some());
    assert_eq!(tlb.write(Class::Kernel, 0x5000, 1), None);
}

#[test]
fn copy_between_pages_of_one_row_keeps_both() {
    let mut tlb = Tlb::new();
    let other = 0x5000 + 0x1000 * ENTRIES as u64;
    tlb.fill(Class::Kernel, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.fill(Class::Kernel, other, host(1), Grant::Write, SMALL);
    assert!(tlb.read(Class::Kernel, 0x5000, 8).is_some() && tlb.write(Class::Kernel, other, 8).is_some());
    assert_eq!((tlb.write(Class::Kernel, 0x5000, 8), tlb.read(Class::Kernel, other, 8)), (None, None));
}

#[test]
fn page_is_protected_in_every_address_space() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x5000, host(2), Grant::ReadOfWritable, SMALL);
    tlb.fill(Class::User, 0x6000, host(3), Grant::ReadOfWritable, GLOBAL);
    tlb.switch(space(0), space(1), true);
    tlb.protect(host(2));
    tlb.protect(host(3));
    tlb.switch(space(1), space(0), true);
    assert!(tlb.read(Class::User, 0x5000, 1).is_some());
    assert_eq!(tlb.write(Class::User, 0x5000, 1), None);
    assert_eq!(tlb.write(Class::User, 0x6000, 1), None);
}

#[test]
fn global_page_is_protected_when_others_were_before_it_and_are_flushed() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0x5000, host(1), Grant::ReadOfWritable, SMALL);
    tlb.fill(Class::Kernel, 0x6000, host(2), Grant::ReadOfWritable, GLOBAL);
    tlb.fill(Class::User, 0x7000, host(3), Grant::ReadOfWritable, GLOBAL);
    tlb.protect(host(1));
    tlb.flush_all_but_global();
    tlb.protect(host(3));
    assert!(tlb.write(Class::Kernel, 0x6000, 1).is_some());
    assert_eq!(tlb.write(Class::User, 0x7000, 1), None);
}

#[test]
fn address_space_comes_back_with_its_pages_and_its_generation() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.fill_fetch(true, 0x7000, 0x9000, SMALL);
    let first = tlb.generation(true);
    tlb.switch(space(0), space(1), false);
    assert_ne!(tlb.generation(true), first);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), None);
    assert_eq!(tlb.fetch(true, 0x7000), None);
    tlb.fill(Class::User, 0x5000, host(1), Grant::ReadOfWritable, SMALL);
    tlb.switch(space(1), space(0), true);
    assert_eq!(tlb.generation(true), first);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), Some(host(0)));
    assert_eq!(tlb.fetch(true, 0x7123), Some(0x9123));
    assert_eq!(tlb.fetch(false, 0x7123), None);
    tlb.switch(space(0), space(1), true);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), Some(host(1)));
}

#[test]
fn switch_without_keeping_drops_all_but_global_pages() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.fill(Class::Kernel, 0x6000, host(1), Grant::ReadOfWritable, GLOBAL);
    tlb.fill_fetch(false, 0x5000, 0x5000, SMALL);
    tlb.fill_fetch(false, 0x6000, 0x6000, GLOBAL);
    let before = (tlb.generation(false), tlb.generation(true));
    tlb.switch(space(0), space(0), false);
    assert_eq!(tlb.read(Class::Kernel, 0x5000, 1), None);
    assert_eq!(tlb.read(Class::Kernel, 0x6000, 1), Some(host(1)));
    assert_eq!((tlb.fetch(false, 0x5000), tlb.fetch(false, 0x6000)), (None, Some(0x6000)));
    assert_ne!((tlb.generation(false), tlb.generation(true)), (before.0, before.1));
    // No code but global code is left.
    let before = (tlb.generation(false), tlb.generation(true));
    tlb.switch(space(0), space(0), false);
    assert_eq!((tlb.generation(false), tlb.generation(true)), before);
    tlb.switch(space(0), space(1), true);
    tlb.switch(space(1), space(0), false);
    assert_eq!(tlb.read(Class::Kernel, 0x6000, 1), Some(host(1)));
}

#[test]
fn local_page_in_a_global_ones_place_is_dropped_with_the_others() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0x5000, host(0), Grant::ReadOfWritable, GLOBAL);
    tlb.fill(Class::Kernel, 0x5000, host(1), Grant::ReadOfWritable, SMALL);
    tlb.flush_space(None);
    assert_eq!(tlb.read(Class::Kernel, 0x5000, 1), None);
}

#[test]
fn other_tables_under_a_known_identifier_get_none_of_its_pages() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.switch(space(0), Space { pcid: 0, base: 0x77000 }, true);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), None);
    tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.switch(Space { pcid: 0, base: 0x77000 }, space(1), true);
    tlb.switch(space(1), space(0), true);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), None);
}

#[test]
fn least_recently_used_address_space_makes_room() {
    let mut tlb = Tlb::new();
    let slots = SLOTS as u16;
    for pcid in 0..slots {
        tlb.fill(Class::User, 0x5000, host(u64::from(pcid)), Grant::ReadOfWritable, SMALL);
        tlb.switch(space(pcid), space(pcid + 1), false);
    }
    // The newcomer has taken the place of 0; 1 is the oldest now.
    let mut here = slots;
    for pcid in 1..slots {
        tlb.switch(space(here), space(pcid), true);
        assert_eq!(tlb.read(Class::User, 0x5000, 1), Some(host(u64::from(pcid))));
        here = pcid;
    }
    tlb.switch(space(here), space(0), true);
    assert_eq!(tlb.read(Class::User, 0x5000, 1), None);
}

#[test]
fn whole_flush_reaches_every_address_space() {
    for keep_global in [false, true] {
        let mut tlb = Tlb::new();
        for pcid in 0..3 {
            tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
            tlb.fill(Class::User, 0x6000, host(1), Grant::ReadOfWritable, GLOBAL);
            tlb.switch(space(pcid), space(pcid + 1), true);
        }
        if keep_global {
            tlb.flush_all_but_global();
        } else {
            tlb.flush();
        }
        let mut here = 3;
        for pcid in 0..3 {
            tlb.switch(space(here), space(pcid), true);
            assert_eq!(tlb.read(Class::User, 0x5000, 1), None);
            here = pcid;
            if !keep_global {
                assert_eq!(tlb.read(Class::User, 0x6000, 1), None);
            }
        }
    }
}

#[test]
fn one_address_space_is_flushed_from_outside() {
    let mut tlb = Tlb::new();
    for pcid in 0..3 {
        tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
        tlb.fill(Class::User, 0x6000, host(0), Grant::ReadOfWritable, SMALL);
        tlb.switch(space(pcid), space(pcid + 1), true);
    }
    tlb.flush_space(Some(1));
    tlb.flush_page_of(2, 0x5000);
    let found = [0, 1, 2].map(|pcid| {
        tlb.switch(space(if pcid == 0 { 3 } else { pcid - 1 }), space(pcid), true);
        [0x5000, 0x6000].map(|linear| tlb.read(Class::User, linear, 1).is_some())
    });
    assert_eq!(found, [[true, true], [false, false], [false, true]]);
}

#[test]
fn flush_of_a_page_drops_global_ones_everywhere_and_others_here() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::Kernel, 0x5000, host(0), Grant::ReadOfWritable, GLOBAL);
    tlb.fill_fetch(false, 0x6000, 0x6000, GLOBAL);
    let first = tlb.generation(true);
    tlb.switch(space(0), space(1), true);
    tlb.fill(Class::Kernel, 0x5000, host(1), Grant::ReadOfWritable, SMALL);
    tlb.flush_page(0x5000);
    tlb.flush_page(0x6000);
    assert_eq!(tlb.read(Class::Kernel, 0x5000, 1), None);
    tlb.switch(space(1), space(0), true);
    assert_eq!(tlb.read(Class::Kernel, 0x5000, 1), None);
    assert_eq!(tlb.fetch(false, 0x6000), None);
    assert_ne!(tlb.generation(true), first);
}

#[test]
fn flush_of_a_page_changes_the_generation_only_if_code_was_fetched_from_it() {
    let mut tlb = Tlb::new();
    tlb.fill(Class::User, 0x5000, host(0), Grant::ReadOfWritable, SMALL);
    tlb.fill_fetch(true, 0x6000, 0x9000, SMALL);
    // Another page takes its place in the table; the code is still known.
    tlb.fill_fetch(true, 0x6000 + 0x1000 * FETCH_ENTRIES as u64, 0xa000, SMALL);
    let before = tlb.generation(true);
    tlb.flush_page(0x5000);
    assert_eq!(tlb.generation(true), before);
    tlb.flush_page(0x6000);
    assert_ne!(tlb.generation(true), before);
}

#[test]
fn flush_of_a_programs_page_is_none_of_a_kernels_code() {
    const KERNEL: u64 = 0xffff_ffff_8100_0000;
    let mut tlb = Tlb::new();
    // As much code as any filter has bits.
    for page in 0..4096 {
        tlb.fill_fetch(false, KERNEL + 0x1000 * page, 0x1000 * page, GLOBAL);
    }
    tlb.fill(Class::User, 0x7000, host(0), Grant::ReadOfWritable, SMALL);
    let before = [false, true].map(|user| tlb.generation(user));
    tlb.flush_page(0x7000);
    assert_eq!([false, true].map(|user| tlb.generation(user)), before);
    tlb.flush_page(KERNEL + 0x7000);
    assert_ne!(tlb.generation(false), before[0]);
}

#[test]
fn supervisor_code_in_global_pages_has_one_generation_everywhere() {
    let mut tlb = Tlb::new();
    tlb.fill_fetch(false, 0x5000, 0x5000, GLOBAL);
    let shared = tlb.generation(false);
    tlb.switch(space(0), space(1), false);
    assert_eq!(tlb.generation(false), shared);
    assert_ne!(tlb.generation(true), shared);
    // The page is flushed where it was never fetched from.
    tlb.flush_page(0x5000);
    assert_ne!(tlb.generation(false), shared);
    let shared = tlb.generation(false);
    tlb.switch(space(1), space(0), true);
    assert_eq!(tlb.generation(false), shared);
    tlb.flush();
    assert_ne!(tlb.generation(false), shared);
}

#[test]
fn supervisor_code_in_other_pages_sets_its_address_space_apart() {
    let mut tlb = Tlb::new();
    tlb.fill_fetch(false, 0x5000, 0x5000, GLOBAL);
    let early = tlb.generation(false);
    tlb.fill_fetch(false, 0x6000, 0x6000, SMALL);
    let own = tlb.generation(false);
    assert_ne!(own, early);
    tlb.switch(space(0), space(1), false);
    // What was remembered under the number from before the fetch is not found here either.
    assert!(![own, early].contains(&tlb.generation(false)));
    tlb.switch(space(1), space(0), true);
    assert_eq!(tlb.generation(false), own);
}

#[test]
fn random_use_never_shows_what_a_flush_has_taken() {
    // A model: for each space and page, whether it may be there.
    let mut random = 0x1234_5678_u64;
    let mut next = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let mut tlb = Tlb::new();
    let mut may = std::collections::HashMap::<(u16, u64), bool>::new();
    let mut here = 0_u16;
    let mut hits = 0;
    for _ in 0..200_000 {
        // Pages from 16 on share rows with those below; odd ones are global.
        let page = next(32);
        let linear = if page < 16 { page << 12 } else { (page - 16 + ENTRIES as u64) << 12 };
        let global = page % 2 == 1;
        let pcid = next(12) as u16;
        match next(20) {
            0 => {
                let keep = next(4) != 0;
                tlb.switch(space(here), space(pcid), keep);
                here = pcid;
                if !keep {
                    may.retain(|&(at, _), global| at != here || *global);
                }
            }
            1 if next(20) == 0 => {
                tlb.flush();
                may.clear();
            }
            2 if next(20) == 0 => {
                tlb.flush_all_but_global();
                may.retain(|_, global| *global);
            }
            3 => {
                tlb.flush_page(linear);
                may.retain(|&(at, p), global| p != page || at != here && !*global);
            }
            4 if pcid != here => {
                tlb.flush_page_of(pcid, linear);
                may.retain(|&(at, p), global| p != page || at != pcid || *global);
            }
            5 => {
                tlb.flush_space((pcid != here).then_some(pcid));
                may.retain(|&(at, _), global| at != pcid || *global);
            }
            6..12 => {
                let size = if page == 3 || page == 18 { 2 << 20 } else { 4096 };
                tlb.fill(
                    Class::User,
                    linear,
                    host(page),
                    if next(2) == 0 { Grant::Write } else { Grant::Read },
                    Page { size, global },
                );
                tlb.fill_fetch(true, linear, linear, Page { size, global });
                may.insert((here, page), global);
            }
            _ => {
                let found = tlb.read(Class::User, linear, 1).is_some() || tlb.fetch(true, linear).is_some();
                hits += u32::from(found);
                // A global page filled under any identifier may be there under all.
                let allowed =
                    may.contains_key(&(here, page)) || global && may.keys().any(|&(_, known)| known == page);
                assert!(!found || allowed, "page {page} of {here}");
            }
        }
    }
    assert!(hits > 10_000, "{hits}");
}
