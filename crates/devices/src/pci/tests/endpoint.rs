//! Functions with registers and interrupts, driven through the ECAM window as an operating system would.

use ringfence_engine::Bus;
use ringfence_memory::GuestAddress;

use super::*;
use crate::platform::{PCI_INTERRUPT_BASE, PCI_WINDOW};
use crate::testing::Random;

const IDENTITY: Identity = Identity { vendor: 0x1234, device: 0xabcd, class: 0x01_0802, revision: 7 };
const COMMAND: u64 = 4;
const BAR0: u64 = 0x10;
const BAR4: u64 = 0x20;
const POWER: u64 = 0x40;
const MSIX: u64 = 0x48;
const MEMORY: u32 = 2;
const MASTER: u32 = 4;
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;

/// A device whose registers read as its number.
struct Numbered(u8);

impl BusDevice for Numbered {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

struct Card {
    endpoint: Endpoint,
    number: u8,
    size: u64,
}

impl PciFunction for Card {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.endpoint.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.endpoint.config_write(offset, data);
    }

    fn plugged(&self, slot: Slot) -> Result<(), PciError> {
        let device = Arc::new(Numbered(self.number));
        self.endpoint.plug(slot, &Registers { name: "card", size: self.size, device })
    }
}

struct Machine {
    bench: Bench,
    pci: Arc<PciBus>,
    bus: Arc<SystemBus>,
    cards: Vec<Arc<Card>>,
}

impl Machine {
    /// Cards with registers of these sizes, numbered from 1, in devices numbered alike.
    fn new(sizes: &[u64]) -> Self {
        let bench = Bench::new();
        let pci = PciBus::new();
        let host = PciHost::new(Arc::clone(&pci), Arc::new(Requests::default()));
        let bus = Arc::new(SystemBus::new(host.placements()).unwrap());
        let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
        pci.connect(&bus, &interrupts);
        let mut cards = Vec::new();
        for (number, &size) in (1..).zip(sizes) {
            let endpoint = Endpoint::new(&IDENTITY, 3, &interrupts);
            let card = Arc::new(Card { endpoint, number, size });
            assert_eq!(pci.plug_next(Arc::clone(&card) as _).unwrap(), PciAddress::new(0, number, 0));
            cards.push(card);
        }
        Self { bench, pci, bus, cards }
    }

    fn config(card: u64, register: u64) -> GuestAddress {
        GuestAddress(PCI_ECAM.start.0 + (card << 15) + register)
    }

    fn get(&self, card: u64, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.bus.memory_read(Self::config(card, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, card: u64, register: u64, value: u32) {
        self.bus.memory_write(Self::config(card, register), &value.to_le_bytes());
    }

    fn bar(&self, card: u64, register: u64) -> u64 {
        u64::from(self.get(card, register + 4)) << 32 | u64::from(self.get(card, register) & !0xf)
    }

    fn set_bar(&self, card: u64, register: u64, address: u64) {
        self.set(card, register, address as u32);
        self.set(card, register + 4, (address >> 32) as u32);
    }

    /// What answers at an address: a card's number, or 0xff.
    fn at(&self, address: u64) -> u8 {
        let mut data = [0xff];
        self.bus.memory_read(GuestAddress(address), &mut data);
        data[0]
    }

    /// Writes an MSI-X table entry.
    fn entry(&self, card: u64, vector: u64, words: [u32; 4]) {
        for (word, offset) in words.iter().zip((vector * 16..).step_by(4)) {
            let address = GuestAddress(self.bar(card, BAR4) + offset);
            self.bus.memory_write(address, &word.to_le_bytes());
        }
    }

    fn pending(&self, card: u64) -> u64 {
        let mut data = [0; 8];
        self.bus.memory_read(GuestAddress(self.bar(card, BAR4) + 0x800), &mut data);
        u64::from_le_bytes(data)
    }
}

#[test]
fn header_tells_what_it_is() {
    let m = Machine::new(&[0x4000]);
    assert_eq!(m.get(1, 0), 0xabcd_1234);
    assert_eq!(m.get(1, 8), 0x0108_0207);
    assert_eq!(m.get(1, 0x2c), 0xabcd_1234);
    assert_eq!(m.get(1, 0x0c) >> 16 & 0xff, 0, "type 0, one function");
    assert_eq!(m.get(1, 0x3c) & 0xffff, 0x0111, "INTA, routed to GSI 17");
    assert_eq!(m.get(2, 0), u32::MAX, "nothing there");
    m.set(1, 0, 0);
    m.set(1, 8, 0);
    assert_eq!((m.get(1, 0), m.get(1, 8)), (0xabcd_1234, 0x0108_0207));
    assert_eq!(m.get(1, 0x100), 0, "no extended capability");
    let mut word = [0; 2];
    m.bus.memory_read(Machine::config(1, 2), &mut word);
    assert_eq!(word, [0xcd, 0xab]);
    let mut two = [0; 8];
    m.bus.memory_read(Machine::config(1, 0), &mut two);
    assert_eq!(two[..4], 0xabcd_1234_u32.to_le_bytes());
}

#[test]
fn capabilities_are_linked() {
    let m = Machine::new(&[0x4000]);
    assert_ne!(m.get(1, 4) >> 16 & 0x10, 0, "there is a list");
    let mut at = u64::from(m.get(1, 0x34) & 0xff);
    let mut found = Vec::new();
    while at != 0 {
        let head = m.get(1, at);
        found.push((at, head & 0xff));
        at = u64::from(head >> 8 & 0xff);
    }
    assert_eq!(found, [(POWER, 1), (MSIX, 0x11), (0x54, 0x10)]);
    assert_eq!(m.get(1, MSIX) >> 16, 2, "three vectors");
    assert_eq!((m.get(1, MSIX + 4), m.get(1, MSIX + 8)), (4, 0x804), "table and pending bits in BAR 4");
    assert_eq!(m.get(1, 0x54) >> 16, 0x92);
}

#[test]
fn sizing_shows_the_size_and_leaves_the_address() {
    let m = Machine::new(&[0x4000, 0x1_0000]);
    for (card, size) in [(1, 0x4000_u64), (2, 0x1_0000)] {
        let address = m.bar(card, BAR0);
        assert!(PCI_WINDOW.contains(GuestAddress(address), size) && address.is_multiple_of(size));
        assert_eq!(m.get(card, BAR0) & 0xf, 0b0100, "64 bits, not prefetchable");
        m.set_bar(card, BAR0, u64::MAX);
        assert_eq!(m.bar(card, BAR0), !(size - 1));
        m.set_bar(card, BAR0, address);
        assert_eq!(m.bar(card, BAR0), address);
        assert_eq!((m.get(card, 0x18), m.get(card, 0x30)), (0, 0), "no other register, no ROM");
    }
    assert_ne!(m.bar(1, BAR0), m.bar(2, BAR0));
}

#[test]
fn registers_answer_only_while_decoding_is_on() {
    let m = Machine::new(&[0x4000]);
    let address = m.bar(1, BAR0);
    assert_eq!(m.at(address), 0xff);
    m.set(1, COMMAND, MEMORY);
    assert_eq!((m.at(address), m.at(address + 0x3fff)), (1, 1));
    m.set(1, COMMAND, MEMORY | MASTER);
    m.set(1, POWER + 4, 3);
    assert_eq!(m.at(address), 0xff, "asleep in D3");
    assert!(!m.cards[0].endpoint.is_bus_master(), "and silent");
    m.set(1, POWER + 4, 0);
    assert!(m.cards[0].endpoint.is_bus_master());
    assert_eq!(m.at(address), 1);
    m.set(1, COMMAND, 0);
    assert_eq!(m.at(address), 0xff);
}

#[test]
fn registers_move_while_mapped() {
    let m = Machine::new(&[0x4000]);
    m.set(1, COMMAND, MEMORY);
    let old = m.bar(1, BAR0);
    for new in [0xe000_0000, 0x12_3456_4000, 0x2000_0000_0000] {
        m.set_bar(1, BAR0, new);
        assert_eq!((m.at(old), m.at(new), m.at(new + 0x3fff)), (0xff, 1, 1), "{new:#x}");
    }
    // Outside the bridge's windows: into RAM, configuration space, the interrupt controllers.
    for new in [0, 0x10_0000, PCI_ECAM.start.0, 0xfec0_0000, 0xfee0_0000, u64::MAX] {
        m.set_bar(1, BAR0, new);
        let placed = m.bus.placements(AddressSpace::Memory);
        assert!(placed.iter().all(|p| p.name != "card"), "{new:#x}: {placed:?}");
    }
    assert_eq!(m.get(1, 0), 0xabcd_1234);
    m.set_bar(1, BAR0, old);
    assert_eq!(m.at(old), 1);
}

#[test]
fn two_functions_can_change_places_one_after_the_other() {
    let m = Machine::new(&[0x4000, 0x4000]);
    m.set(1, COMMAND, MEMORY);
    m.set(2, COMMAND, MEMORY);
    let (one, two) = (m.bar(1, BAR0), m.bar(2, BAR0));
    m.set_bar(1, BAR0, two);
    assert_eq!((m.at(one), m.at(two)), (0xff, 2), "who was there first stays");
    m.set_bar(2, BAR0, one);
    assert_eq!((m.at(one), m.at(two)), (2, 1));
}

#[test]
fn bus_connected_late_shows_what_is_decoded_already() {
    let bench = Bench::new();
    let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
    let pci = PciBus::new();
    let card = Arc::new(Card { endpoint: Endpoint::new(&IDENTITY, 1, &interrupts), number: 9, size: 0x1000 });
    pci.plug_next(Arc::clone(&card) as _).unwrap();
    card.config_write(4, &MEMORY.to_le_bytes());
    card.endpoint.set_interrupt(true);
    let bus = Arc::new(SystemBus::new([]).unwrap());
    pci.connect(&bus, &interrupts);
    assert_eq!(bus.placements(AddressSpace::Memory).len(), 2);
    assert!(bench.level(PCI_INTERRUPT_BASE + 1));
}

#[test]
fn full_bus_and_full_window_refuse_more() {
    let m = Machine::new(&[0x1000; 31]);
    let interrupts = Arc::clone(&m.bench.wires) as Arc<dyn InterruptSink>;
    let card = |size| Arc::new(Card { endpoint: Endpoint::new(&IDENTITY, 1, &interrupts), number: 0, size });
    assert!(matches!(m.pci.plug_next(card(0x1000)), Err(PciError::Full)));
    let pci = PciBus::new();
    pci.plug_next(card(1 << 28)).unwrap();
    assert!(matches!(pci.plug_next(card(1 << 29)), Err(PciError::NoRoom(_))));
    pci.plug_next(card(1 << 12)).unwrap();
}

#[test]
fn masked_message_waits_and_comes_once() {
    let m = Machine::new(&[0x4000]);
    let endpoint = &m.cards[0].endpoint;
    m.set(1, COMMAND, MEMORY | MASTER);
    m.entry(1, 1, [0xfee0_1000, 0, 0x41, 0]);
    endpoint.notify(1);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![], 0), "MSI-X is off");
    m.set(1, MSIX, ENABLE);
    assert!(endpoint.uses_messages());
    endpoint.notify(1);
    assert_eq!(m.bench.messages(), [(0xfee0_1000, 0x41)]);

    m.entry(1, 1, [0xfee0_1000, 0, 0x41, 1]);
    endpoint.notify(1);
    endpoint.notify(1);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![], 2));
    // What is written while it is masked holds when it is sent.
    m.entry(1, 1, [0xfee0_2000, 0, 0x55, 0]);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![(0xfee0_2000, 0x55)], 0));

    m.set(1, MSIX, ENABLE | MASK_ALL);
    endpoint.notify(1);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![], 2));
    m.set(1, MSIX, ENABLE);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![(0xfee0_2000, 0x55)], 0));

    m.set(1, COMMAND, MEMORY);
    endpoint.notify(1);
    assert_eq!(m.bench.messages(), [], "no bus master");
    m.set(1, COMMAND, MEMORY | MASTER);
    assert_eq!(m.bench.messages(), [(0xfee0_2000, 0x55)]);
    endpoint.notify(77);
    assert_eq!(m.bench.messages(), [], "no such vector");
}

#[test]
fn garbage_in_the_table_reaches_no_memory() {
    let m = Machine::new(&[0x4000]);
    let endpoint = &m.cards[0].endpoint;
    m.set(1, COMMAND, MEMORY | MASTER);
    m.set(1, MSIX, ENABLE);
    for (low, high) in [(0, 0), (0x1000, 0), (0xfee0_0000, 1), (0xfed0_0000, 0), (0xfef0_0000, 0), (!0, !0)] {
        m.entry(1, 0, [low, high, 0x30, 0]);
        endpoint.notify(0);
        assert_eq!(m.bench.messages(), [], "{low:#x} {high:#x}");
    }
    m.entry(1, 0, [0xfeef_ffff, 0, u32::MAX, 0xffff_fffe]);
    endpoint.notify(0);
    assert_eq!(m.bench.messages(), [(0xfeef_fffc, u32::MAX)]);
    // Reserved bits are not kept; beyond the table there is nothing; narrow accesses do nothing.
    let table = m.bar(1, BAR4);
    let mut data = [0; 4];
    m.bus.memory_read(GuestAddress(table + 12), &mut data);
    assert_eq!(data, [0; 4]);
    m.bus.memory_write(GuestAddress(table + 3 * 16), &[0xaa; 4]);
    m.bus.memory_read(GuestAddress(table + 3 * 16), &mut data);
    assert_eq!(data, [0; 4]);
    m.bus.memory_write(GuestAddress(table), &[0xaa]);
    m.bus.memory_write(GuestAddress(table + 0x800), &[0xff; 8]);
    assert_eq!(m.pending(1), 0);
    m.bus.memory_read(GuestAddress(table), &mut data);
    assert_eq!(data, 0xfeef_ffff_u32.to_le_bytes());
    m.bus.memory_write(GuestAddress(table), &0x1122_3344_5566_7788_u64.to_le_bytes());
    m.bus.memory_read(GuestAddress(table + 4), &mut data);
    assert_eq!(data, 0x1122_3344_u32.to_le_bytes());
}

#[test]
fn pins_share_a_line_and_give_way_to_messages() {
    let m = Machine::new(&[0x1000; 5]);
    let line = PCI_INTERRUPT_BASE + 1;
    let [first, fifth] = [&m.cards[0].endpoint, &m.cards[4].endpoint];
    first.set_interrupt(true);
    assert!(m.bench.level(line));
    assert_ne!(m.get(1, COMMAND) >> 16 & 8, 0, "interrupt status");
    fifth.set_interrupt(true);
    first.set_interrupt(false);
    assert!(m.bench.level(line), "device 5 holds the line that device 1 let go");
    assert_eq!(m.get(1, COMMAND) >> 16 & 8, 0);
    m.set(5, COMMAND, 1 << 10);
    assert!(!m.bench.level(line), "disabled");
    assert_ne!(m.get(5, COMMAND) >> 16 & 8, 0);
    m.set(5, COMMAND, 0);
    assert!(m.bench.level(line));
    m.set(5, MSIX, ENABLE);
    assert!(!m.bench.level(line), "messages instead");
    m.cards[1].endpoint.set_interrupt(true);
    assert!(m.bench.level(line + 1) && !m.bench.level(line));
}

#[test]
fn reset_goes_back_to_the_first_address() {
    let m = Machine::new(&[0x4000]);
    let endpoint = &m.cards[0].endpoint;
    let first = m.bar(1, BAR0);
    m.set(1, COMMAND, MEMORY | MASTER);
    m.set_bar(1, BAR0, 0xe000_0000);
    m.entry(1, 0, [0xfee0_0000, 0, 1, 0]);
    m.set(1, MSIX, ENABLE);
    endpoint.set_interrupt(true);
    endpoint.reset();
    assert_eq!((m.bar(1, BAR0), m.get(1, COMMAND) & 0xffff, m.get(1, MSIX) >> 16), (first, 0, 2));
    assert_eq!((m.at(first), m.at(0xe000_0000)), (0xff, 0xff));
    assert!(!endpoint.is_bus_master() && !m.bench.level(17));
    m.set(1, COMMAND, MEMORY | MASTER);
    m.set(1, MSIX, ENABLE);
    endpoint.notify(0);
    assert_eq!((m.bench.messages(), m.pending(1)), (vec![], 1), "every vector is masked");
}

#[test]
fn random_accesses_keep_state_that_can_be_saved_and_loaded() {
    let m = Machine::new(&[0x4000, 0x1000]);
    let twin = Machine::new(&[0x4000, 0x1000]);
    let mut random = Random::new(3);
    for step in 0..20_000 {
        let card = 1 + random.below(2);
        let endpoint = &m.cards[card as usize - 1].endpoint;
        let value = match random.below(3) {
            0 => random.next() as u32,
            1 => PCI_WINDOW.start.0 as u32 + (random.below(16) << 12) as u32,
            _ => 1 << random.below(32),
        };
        match random.below(8) {
            0 => m.set(
                card,
                [COMMAND, BAR0, BAR0 + 4, BAR4, BAR4 + 4, MSIX, POWER + 4][random.below(7) as usize],
                value,
            ),
            1 => m.bus.memory_write(
                Machine::config(card, random.below(4090)),
                &value.to_le_bytes()[..1 + random.below(4) as usize],
            ),
            2 => m.entry(card, random.below(4), [value, 0, value, random.below(2) as u32]),
            3 => endpoint.notify(random.below(4) as u16),
            4 => endpoint.set_interrupt(random.below(2) == 0),
            5 => {
                m.at(PCI_WINDOW.start.0 + random.below(1 << 16));
            }
            _ => m.set(card, COMMAND, MEMORY | MASTER),
        }
        if step % 50 == 0 {
            let saved = endpoint.save();
            let other = &twin.cards[card as usize - 1].endpoint;
            assert!(other.restore(&saved));
            assert_eq!(other.save(), saved);
            m.bench.messages();
        }
    }
    let mut wrong = m.cards[0].endpoint.save();
    let text = serde_json::to_string(&wrong).unwrap().replace("\"pending\":[", "\"pending\":[false,");
    wrong = serde_json::from_str(&text).unwrap();
    let before = m.cards[0].endpoint.save();
    assert!(!m.cards[0].endpoint.restore(&wrong));
    assert_eq!(m.cards[0].endpoint.save(), before);
}
