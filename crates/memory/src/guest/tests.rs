use std::sync::Mutex;

use super::*;

fn two_regions() -> GuestMemory {
    GuestMemory::new(&[
        RegionSpec { range: GuestRange::new(0, 0x2000), kind: RegionKind::Ram },
        RegionSpec { range: GuestRange::new(0x2000, 0x1000), kind: RegionKind::Ram },
        RegionSpec { range: GuestRange::new(0x10_0000, 0x1000), kind: RegionKind::Rom },
    ])
    .unwrap()
}

#[test]
fn access_across_adjacent_regions_works() {
    let memory = two_regions();
    memory.write::<u64>(GuestAddress(0x1ffc), 0x1122_3344_5566_7788).unwrap();
    assert_eq!(memory.read::<u64>(GuestAddress(0x1ffc)).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(memory.read::<u32>(GuestAddress(0x2000)).unwrap(), 0x1122_3344);
}

#[test]
fn write_that_runs_into_a_hole_changes_nothing() {
    let memory = two_regions();
    assert!(memory.write_bytes(GuestAddress(0x2ff8), &[0xaa; 16]).is_err());
    assert_eq!(memory.read::<u64>(GuestAddress(0x2ff8)).unwrap(), 0);
    assert!(memory.read::<u8>(GuestAddress(0x3000)).is_err());
    assert!(memory.read::<u64>(GuestAddress(u64::MAX - 3)).is_err());
}

#[test]
fn bad_regions_are_refused() {
    let spec = |start, len| RegionSpec { range: GuestRange::new(start, len), kind: RegionKind::Ram };
    for specs in [vec![spec(0, 0)], vec![spec(0x800, 0x1000)], vec![spec(0, 0x2000), spec(0x1000, 0x1000)]] {
        assert!(matches!(GuestMemory::new(&specs), Err(MemoryError::BadRegion { .. })));
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl CodeObserver for Log {
    fn code_written(&self, address: GuestAddress, len: u64) {
        self.0.lock().unwrap().push((address.0, len));
    }
}

#[test]
fn write_to_marked_page_tells_the_observer_page_by_page() {
    let memory = two_regions();
    let log = Arc::new(Log::default());
    memory.set_code_observer(log.clone());
    memory.set_code_page(GuestAddress(0x1abc), true);
    memory.write_bytes(GuestAddress(0xff0), &[1; 0x1020]).unwrap();
    memory.write::<u8>(GuestAddress(0x2010), 1).unwrap();
    memory.set_code_page(GuestAddress(0x1000), false);
    memory.write::<u8>(GuestAddress(0x1000), 1).unwrap();
    assert_eq!(*log.0.lock().unwrap(), [(0x1000, 0x1000)]);
}

#[test]
fn direct_write_is_told_for_marked_pages_of_every_region() {
    let memory = two_regions();
    let log = Arc::new(Log::default());
    memory.set_code_observer(log.clone());
    for page in [0x1000, 0x2000, 0x10_0000] {
        memory.set_code_page(GuestAddress(page), true);
    }
    memory.notify_written(GuestAddress(0x1ff0), 0x20);
    memory.notify_written(GuestAddress(0x2fff), 0x10_0000);
    memory.notify_written(GuestAddress(u64::MAX), u64::MAX);
    let told = [(0x1ff0, 0x10), (0x2000, 0x10), (0x2fff, 1), (0x10_0000, 0x1000)];
    assert_eq!(*log.0.lock().unwrap(), told);
}

#[test]
fn closing_a20_changes_mask_and_generation_once() {
    let memory = two_regions();
    let before = memory.generation();
    memory.set_a20(false);
    memory.set_a20(false);
    assert_eq!(memory.a20_mask(), !(1 << 20));
    assert_eq!(memory.generation(), before + 1);
}

#[derive(Default)]
struct Written(Mutex<Vec<(u64, u64)>>);

impl WriteObserver for Written {
    fn written(&self, address: GuestAddress, len: u64) {
        self.0.lock().unwrap().push((address.0, len));
    }
}

#[test]
fn write_observer_hears_of_every_write_to_any_page() {
    let memory = two_regions();
    let written = Arc::new(Written::default());
    memory.set_write_observer(Arc::clone(&written) as _);
    memory.write::<u32>(GuestAddress(0x10), 1).unwrap();
    memory.write_bytes(GuestAddress(0x1ff8), &[1; 16]).unwrap();
    memory.fill(GuestAddress(0x10_0000), 7, 3).unwrap();
    memory.notify_written(GuestAddress(0x2ffc), 100);
    memory.note_walk(GuestAddress(0x18), 8);
    let expected = [(0x10, 4), (0x1ff8, 8), (0x2000, 8), (0x10_0000, 3), (0x2ffc, 4), (0x18, 8)];
    assert_eq!(*written.0.lock().unwrap(), expected);
}

#[test]
fn memory_made_from_the_regions_of_another_is_like_it() {
    let memory = two_regions();
    let copy = GuestMemory::new(&memory.specs()).unwrap();
    assert_eq!(format!("{copy:?}"), format!("{memory:?}"));
}

#[test]
fn released_pages_read_as_zeroes_and_others_keep_their_bytes() {
    let ram = RegionSpec { range: GuestRange::new(0, 0x8000), kind: RegionKind::Ram };
    let rom = RegionSpec { range: GuestRange::new(0x8000, 0x2000), kind: RegionKind::Rom };
    let memory = GuestMemory::new(&[ram, rom]).unwrap();
    memory.fill(GuestAddress(0), 7, 0xa000).unwrap();
    assert_eq!(memory.release(GuestAddress(0x1001), 0x2fff), 0x2000, "whole pages only");
    let byte = |at| memory.read::<u8>(GuestAddress(at)).unwrap();
    assert_eq!([byte(0x1fff), byte(0x2000), byte(0x3fff), byte(0x4000)], [7, 0, 0, 7]);
    assert_eq!(memory.release(GuestAddress(0x7000), u64::MAX), 0x1000, "ROM stays");
    assert_eq!([byte(0x6fff), byte(0x7000), byte(0x8000)], [7, 0, 7]);
    assert_eq!(memory.release(GuestAddress(0x10_0000), 0x1000), 0, "there is nothing");
    memory.write(GuestAddress(0x2000), 9_u8).unwrap();
    assert_eq!(byte(0x2000), 9, "it can be used again");
}
