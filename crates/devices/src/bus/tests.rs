use std::sync::Mutex;

use ringfence_memory::GuestRange;

use super::*;
use crate::device::lock;

/// Answers with its tag and the offset, and records every access.
#[derive(Default)]
struct Probe {
    tag: u8,
    log: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.log).push((offset, vec![0; data.len()]));
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.tag + offset as u8 + i as u8;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.log).push((offset, data.to_vec()));
    }
}

fn probe(tag: u8) -> Arc<Probe> {
    Arc::new(Probe { tag, log: Mutex::default() })
}

fn place(space: AddressSpace, start: u64, len: u64, device: &Arc<Probe>) -> Placement {
    Placement { name: "probe", space, range: GuestRange::new(start, len), device: Arc::clone(device) as _ }
}

#[test]
fn unclaimed_reads_give_ones_and_are_counted() {
    let bus = SystemBus::new(delay_ports()).unwrap();
    let mut data = [0; 4];
    bus.port_read(0x300, &mut data);
    assert_eq!(data, [0xff; 4]);
    bus.memory_read(GuestAddress(u64::MAX - 1), &mut data);
    assert_eq!(data, [0xff; 4]);
    let before = bus.unclaimed();
    bus.port_write(0x80, &[1]);
    bus.port_write(0xed, &[1]);
    assert_eq!(bus.unclaimed(), before);
    bus.port_write(0x81, &[1]);
    assert_eq!(bus.unclaimed(), before + 1);
}

#[test]
fn port_access_over_byte_devices_is_split() {
    let devices: Vec<_> = [0x10, 0x20, 0x30].map(probe).into();
    let bus = SystemBus::new([
        place(AddressSpace::Port, 0x60, 1, &devices[0]),
        place(AddressSpace::Port, 0x61, 1, &devices[1]),
        place(AddressSpace::Port, 0x63, 2, &devices[2]),
    ])
    .unwrap();
    let mut data = [0; 4];
    bus.port_read(0x60, &mut data);
    assert_eq!(data, [0x10, 0x20, 0xff, 0x30]);
    bus.port_write(0x60, &[1, 2, 3, 4]);
    assert_eq!(lock(&devices[2].log).as_slice(), [(0, vec![0]), (0, vec![4])]);
    assert_eq!(lock(&devices[1].log).last(), Some(&(0, vec![2])));
}

#[test]
fn straddling_pieces_are_naturally_aligned() {
    let device = probe(0);
    let bus = SystemBus::new([place(AddressSpace::Memory, 0x1001, 0x100, &device)]).unwrap();
    bus.memory_write(GuestAddress(0x1000), &[0, 1, 2, 3, 4, 5, 6, 7]);
    let lens: Vec<_> = lock(&device.log).iter().map(|(offset, data)| (*offset, data.len())).collect();
    assert_eq!(lens, [(0, 1), (1, 2), (3, 4)]);
    lock(&device.log).clear();
    bus.memory_write(GuestAddress(0x1003), &[0; 8]);
    assert_eq!(*lock(&device.log), [(2, vec![0; 8])], "an access inside one device stays whole");
}

#[test]
fn access_at_the_end_of_port_space_does_not_wrap() {
    let (low, high) = (probe(1), probe(0x80));
    let bus =
        SystemBus::new([place(AddressSpace::Port, 0, 1, &low), place(AddressSpace::Port, 0xffff, 1, &high)])
            .unwrap();
    let mut data = [0; 4];
    bus.port_read(0xffff, &mut data);
    assert_eq!(data, [0x80, 0xff, 0xff, 0xff]);
    assert!(lock(&low.log).is_empty());
}

#[test]
fn overlap_and_bad_ranges_are_refused() {
    let device = probe(0);
    let two = [place(AddressSpace::Port, 0x40, 4, &device), place(AddressSpace::Port, 0x43, 1, &device)];
    assert!(matches!(SystemBus::new(two), Err(BusError::Overlap { .. })));
    for (start, len) in [(0x40, 0), (0xffff, 2), (u64::MAX, 2)] {
        let bad = SystemBus::new([place(AddressSpace::Port, start, len, &device)]);
        assert!(matches!(bad, Err(BusError::BadRange(_))), "{start:#x}+{len}");
    }
}

#[test]
fn relocated_device_answers_at_its_new_place_only() {
    let (a, b) = (probe(0x10), probe(0x20));
    let bus = SystemBus::new([
        place(AddressSpace::Memory, 0x1000, 0x1000, &a),
        place(AddressSpace::Memory, 0x4000, 0x1000, &b),
    ])
    .unwrap();
    let refused = bus.relocate(AddressSpace::Memory, GuestAddress(0x1000), GuestAddress(0x3800));
    assert!(matches!(refused, Err(BusError::Overlap { .. })));
    let mut data = [0];
    bus.memory_read(GuestAddress(0x1000), &mut data);
    assert_eq!(data, [0x10], "a refused move leaves the device where it was");
    bus.relocate(AddressSpace::Memory, GuestAddress(0x1000), GuestAddress(0x1800)).unwrap();
    bus.memory_read(GuestAddress(0x1000), &mut data);
    assert_eq!(data, [0xff]);
    bus.memory_read(GuestAddress(0x1801), &mut data);
    assert_eq!(data, [0x11]);
    bus.remove(AddressSpace::Memory, GuestAddress(0x4000)).unwrap();
    assert!(bus.remove(AddressSpace::Memory, GuestAddress(0x4000)).is_err());
    assert_eq!(bus.placements(AddressSpace::Memory).len(), 1);
}

/// Moves itself while it is being written to.
struct Mover(std::sync::OnceLock<std::sync::Weak<SystemBus>>);

impl BusDevice for Mover {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x77);
    }

    fn write(&self, _: u64, _: &[u8]) {
        let bus = self.0.get().and_then(std::sync::Weak::upgrade).unwrap();
        bus.relocate(AddressSpace::Memory, GuestAddress(0x1000), GuestAddress(0x2000)).unwrap();
    }
}

#[test]
fn device_may_move_itself_during_an_access() {
    let mover = Arc::new(Mover(std::sync::OnceLock::new()));
    let range = GuestRange::new(0x1000, 0x10);
    let device = Arc::clone(&mover) as Arc<dyn BusDevice>;
    let placement = Placement { name: "mover", space: AddressSpace::Memory, range, device };
    let bus = Arc::new(SystemBus::new([placement]).unwrap());
    mover.0.set(Arc::downgrade(&bus)).unwrap();
    bus.memory_write(GuestAddress(0x1000), &[1]);
    let mut data = [0];
    bus.memory_read(GuestAddress(0x2000), &mut data);
    assert_eq!(data, [0x77]);
}
