use super::*;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const LARGE: u64 = 0x80;
const NX: u64 = 1 << 63;
const USER: Rights = Rights { user: true, smap_open: true };
const KERNEL: Rights = Rights { user: false, smap_open: false };

/// Four-level tables at 0x1000.., mapping linear 0x40_0000 to 0x9000 with `leaf` flags.
fn four_level(leaf: u64) -> (GuestMemory, Context) {
    let memory = GuestMemory::flat(0x10_0000).unwrap();
    for (at, entry) in
        [(0x1000, 0x2000 | P | W | U), (0x2000, 0x3000 | P | W | U), (0x3010, 0x4000 | P | W | U)]
    {
        memory.write::<u64>(GuestAddress(at), entry).unwrap();
    }
    memory.write::<u64>(GuestAddress(0x4000), 0x9000 | leaf).unwrap();
    let context = Context {
        cr0: Cr0::PE | Cr0::PG | Cr0::WP,
        cr3: 0x1000,
        cr4: Cr4::PAE,
        efer: Efer::LME | Efer::LMA | Efer::NXE,
        pdpte: [0; 4],
        physical_bits: 40,
    };
    (memory, context)
}

fn code(result: Result<Translation, PageFault>) -> u16 {
    result.unwrap_err().0.bits()
}

fn entry(memory: &GuestMemory, at: u64) -> u64 {
    memory.read(GuestAddress(at)).unwrap()
}

#[test]
fn read_sets_accessed_on_every_level_and_not_dirty() {
    let (memory, context) = four_level(P | W | U);
    let t = translate(&memory, &context, 0x40_0123, Access::Read, USER).unwrap();
    assert_eq!((t.address, t.writable, t.page_size), (GuestAddress(0x9123), false, 4096));
    for at in [0x1000, 0x2000, 0x3010, 0x4000] {
        assert_eq!(entry(&memory, at) & (A | D), A, "{at:#x}");
    }
}

#[test]
fn entry_that_is_code_as_well_is_told_of_where_it_changes() {
    let (memory, context) = four_level(P | W | U);
    let memory = std::sync::Arc::new(memory);
    let map = crate::code::CodeMap::new(std::sync::Arc::clone(&memory));
    let stale = map.register();
    map.mark(GuestAddress(0x4000), 8);
    translate(&memory, &context, 0x40_0000, Access::Read, USER).unwrap();
    assert_eq!(stale.take(), [(GuestAddress(0x4000), 1)]);
    map.mark(GuestAddress(0x4000), 8);
    translate(&memory, &context, 0x40_0000, Access::Read, USER).unwrap();
    assert!(!stale.any(), "nothing has changed");
}

#[test]
fn write_sets_dirty_on_the_leaf_only_and_makes_it_writable() {
    let (memory, context) = four_level(P | W | U);
    assert!(translate(&memory, &context, 0x40_0000, Access::Write, USER).unwrap().writable);
    assert_eq!(entry(&memory, 0x4000) & (A | D), A | D);
    assert_eq!(entry(&memory, 0x3010) & D, 0);
    assert!(translate(&memory, &context, 0x40_0000, Access::Read, USER).unwrap().writable);
}

#[test]
fn denied_access_leaves_the_tables_alone() {
    let (memory, context) = four_level(P | U);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Write, USER)), 7);
    assert_eq!(entry(&memory, 0x4000) & (A | D), 0);
}

#[test]
fn supervisor_write_to_read_only_page_obeys_wp() {
    let (memory, mut context) = four_level(P);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Write, KERNEL)), 3);
    context.cr0 -= Cr0::WP;
    assert!(translate(&memory, &context, 0x40_0000, Access::Write, KERNEL).is_ok());
}

#[test]
fn missing_page_reports_the_access_and_not_protection() {
    let (memory, context) = four_level(0);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, USER)), 4);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Write, KERNEL)), 2);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Fetch, USER)), 0x14);
}

#[test]
fn no_execute_denies_fetches_only_and_is_reserved_without_nxe() {
    let (memory, mut context) = four_level(P | W | U | NX);
    assert!(translate(&memory, &context, 0x40_0000, Access::Read, USER).is_ok());
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Fetch, USER)), 0x15);
    context.efer -= Efer::NXE;
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, USER)), 0xd);
}

#[test]
fn smep_and_smap_keep_the_supervisor_off_user_pages() {
    let (memory, mut context) = four_level(P | W | U);
    let open = Rights { user: false, smap_open: true };
    assert!(translate(&memory, &context, 0x40_0000, Access::Fetch, open).is_ok());
    context.cr4 |= Cr4::SMEP | Cr4::SMAP;
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Fetch, open)), 0x11);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, KERNEL)), 1);
    assert!(translate(&memory, &context, 0x40_0000, Access::Read, open).is_ok());
}

#[test]
fn upper_level_without_user_makes_a_supervisor_page() {
    let (memory, mut context) = four_level(P | W | U);
    memory.write::<u64>(GuestAddress(0x3010), 0x4000 | P | W).unwrap();
    context.cr4 |= Cr4::SMEP | Cr4::SMAP;
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, USER)), 5);
    assert!(translate(&memory, &context, 0x40_0000, Access::Fetch, KERNEL).is_ok());
}

#[test]
fn reserved_physical_bit_faults_with_rsvd() {
    let (memory, context) = four_level(P | W | U | 1 << 45);
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, USER)), 0xd);
}

#[test]
fn large_pages_of_both_sizes_translate() {
    let (memory, context) = four_level(0);
    memory.write::<u64>(GuestAddress(0x3010), 0x60_0000 | P | W | U | LARGE).unwrap();
    let t = translate(&memory, &context, 0x41_2345, Access::Read, USER).unwrap();
    assert_eq!((t.address, t.page_size), (GuestAddress(0x61_2345), 2 << 20));
    memory.write::<u64>(GuestAddress(0x2000), 0x8000_0000 | P | U | LARGE).unwrap();
    let t = translate(&memory, &context, 0x41_2345, Access::Read, USER).unwrap();
    assert_eq!((t.address, t.page_size), (GuestAddress(0x8041_2345), 1 << 30));
    memory.write::<u64>(GuestAddress(0x3010), 0x60_2000 | P | LARGE).unwrap();
    memory.write::<u64>(GuestAddress(0x2000), 0x3000 | P).unwrap();
    assert_eq!(code(translate(&memory, &context, 0x40_0000, Access::Read, KERNEL)), 9);
}

#[test]
fn legacy_paging_maps_small_and_pse36_pages() {
    let memory = GuestMemory::flat(0x10_0000).unwrap();
    memory.write::<u32>(GuestAddress(0x1004), 0x2007).unwrap();
    memory.write::<u32>(GuestAddress(0x2004), 0x7007).unwrap();
    memory.write::<u32>(GuestAddress(0x1008), 0x0180_0000 | 0x2000 | 0x87).unwrap();
    let context = Context {
        cr0: Cr0::PE | Cr0::PG,
        cr3: 0x1000,
        cr4: Cr4::PSE,
        efer: Efer::empty(),
        pdpte: [0; 4],
        physical_bits: 40,
    };
    let t = translate(&memory, &context, 0x40_1abc, Access::Write, USER).unwrap();
    assert_eq!(t.address, GuestAddress(0x7abc));
    assert_eq!(entry(&memory, 0x2004) as u32, 0x7007 | 0x60);
    let t = translate(&memory, &context, 0x81_2345, Access::Read, USER).unwrap();
    assert_eq!((t.address, t.page_size), (GuestAddress(0x1_0181_2345), 4 << 20));
    assert_eq!(
        code(translate(&memory, &context, 0x40_2000, Access::Fetch, USER)),
        4,
        "no fetch bit without NX"
    );
}

#[test]
fn pae_paging_uses_the_loaded_pointers() {
    let memory = GuestMemory::flat(0x10_0000).unwrap();
    memory.write::<u64>(GuestAddress(0x2000), 0x3000 | P | W | U).unwrap();
    memory.write::<u64>(GuestAddress(0x3008), 0x7000 | P | W | U).unwrap();
    let context = Context {
        cr0: Cr0::PE | Cr0::PG,
        cr3: 0x1000,
        cr4: Cr4::PAE,
        efer: Efer::empty(),
        pdpte: [0, 0x2000 | P, 0, 0],
        physical_bits: 40,
    };
    let t = translate(&memory, &context, 0x4000_1234, Access::Read, USER).unwrap();
    assert_eq!(t.address, GuestAddress(0x7234));
    assert_eq!(code(translate(&memory, &context, 0x1234, Access::Read, USER)), 4);
}

#[test]
fn closed_a20_gate_folds_the_second_megabyte() {
    let memory = GuestMemory::flat(0x20_0000).unwrap();
    let (_, mut context) = four_level(0);
    context.cr0 = Cr0::empty();
    memory.set_a20(false);
    let t = translate(&memory, &context, 0x10_1234, Access::Read, KERNEL).unwrap();
    assert_eq!(t.address, GuestAddress(0x1234));
}
