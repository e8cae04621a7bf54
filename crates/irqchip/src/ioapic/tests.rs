use super::*;
use crate::message::{DeliveryMode, Destination};

/// An I/O APIC and what it sent.
struct Bench {
    ioapic: IoApic,
    sent: Vec<Message>,
    accepts: bool,
}

impl Bench {
    fn new() -> Self {
        Self { ioapic: IoApic::new(), sent: Vec::new(), accepts: true }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let (sent, accepts) = (&mut self.sent, self.accepts);
        self.ioapic.write(offset, value, &mut |message| {
            sent.push(*message);
            accepts
        });
    }

    fn set(&mut self, index: u8, value: u32) {
        self.write(0x00, u32::from(index));
        self.write(0x10, value);
    }

    fn get(&mut self, index: u8) -> u32 {
        self.write(0x00, u32::from(index));
        self.ioapic.read(0x10)
    }

    fn pin(&mut self, pin: usize, asserted: bool) {
        let (sent, accepts) = (&mut self.sent, self.accepts);
        self.ioapic.set_pin(pin, asserted, &mut |message| {
            sent.push(*message);
            accepts
        });
    }

    fn eoi(&mut self, vector: u8) {
        let (sent, accepts) = (&mut self.sent, self.accepts);
        self.ioapic.end_of_interrupt(vector, &mut |message| {
            sent.push(*message);
            accepts
        });
    }
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

#[test]
fn registers_read_as_after_reset() {
    let mut bench = Bench::new();
    assert_eq!(bench.get(1), 0x0017_0020);
    bench.set(0, 0xffff_ffff);
    assert_eq!((bench.get(0), bench.get(2)), (0x0f00_0000, 0x0f00_0000));
    for pin in 0..PINS as u8 {
        assert_eq!((bench.get(0x10 + 2 * pin), bench.get(0x11 + 2 * pin)), (MASKED, 0));
    }
    assert_eq!(bench.get(0x40), 0);
    assert_eq!(bench.get(0xff), 0);
}

#[test]
fn read_only_bits_of_an_entry_are_kept() {
    let mut bench = Bench::new();
    bench.set(0x10, 0xffff_ffff);
    bench.set(0x11, 0xffff_ffff);
    assert_eq!((bench.get(0x10), bench.get(0x11)), (0x0001_afff, 0xff00_0000));
}

#[test]
fn edge_sends_one_message_a_rise() {
    let mut bench = Bench::new();
    bench.set(0x19, 0x0300_0000);
    bench.set(0x18, 0x0931);
    bench.pin(4, true);
    bench.pin(4, true);
    bench.pin(4, false);
    bench.pin(4, true);
    let expected = Message {
        destination: Destination::Logical(3),
        mode: DeliveryMode::LowestPriority,
        vector: 0x31,
        level: false,
    };
    assert_eq!(bench.sent, [expected, expected]);
}

#[test]
fn edge_on_a_masked_pin_is_lost() {
    let mut bench = Bench::new();
    bench.set(0x18, MASKED | 0x31);
    bench.pin(4, true);
    bench.set(0x18, 0x31);
    assert!(bench.sent.is_empty());
    bench.pin(4, false);
    bench.pin(4, true);
    assert_eq!(bench.sent.len(), 1);
}

#[test]
fn level_asks_again_after_each_end_of_interrupt_while_high() {
    let mut bench = Bench::new();
    bench.set(0x24, LEVEL | 0x41);
    bench.pin(10, true);
    assert_eq!(bench.sent.len(), 1);
    assert!(bench.sent[0].level);
    assert_eq!(bench.get(0x24), LEVEL | REMOTE_IRR | 0x41);
    bench.pin(10, false);
    bench.pin(10, true);
    assert_eq!(bench.sent.len(), 1, "one under way is enough");
    bench.eoi(0x42);
    assert_eq!(bench.sent.len(), 1, "that was another vector's");
    bench.eoi(0x41);
    assert_eq!(bench.sent.len(), 2);
    bench.pin(10, false);
    bench.write(0x40, 0x41);
    assert_eq!(bench.sent.len(), 2);
    assert_eq!(bench.get(0x24), LEVEL | 0x41, "the EOI register ends it too");
}

#[test]
fn level_while_masked_is_sent_when_unmasked() {
    let mut bench = Bench::new();
    bench.set(0x24, MASKED | LEVEL | 0x41);
    bench.pin(10, true);
    assert!(bench.sent.is_empty());
    bench.set(0x24, LEVEL | 0x41);
    assert_eq!(bench.sent.len(), 1);
    bench.set(0x24, MASKED | LEVEL | 0x41);
    bench.eoi(0x41);
    assert_eq!(bench.sent.len(), 1);
    bench.set(0x24, LEVEL | 0x41);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn level_that_nobody_accepts_is_tried_again() {
    let mut bench = Bench::new();
    bench.accepts = false;
    bench.set(0x24, LEVEL | 0x41);
    bench.pin(10, true);
    assert_eq!(bench.get(0x24), LEVEL | 0x41, "no remote IRR without a remote");
    bench.accepts = true;
    let sent = &mut bench.sent;
    bench.ioapic.retry(&mut |message| {
        sent.push(*message);
        true
    });
    assert_eq!(bench.sent.len(), 2);
    assert_eq!(bench.get(0x24), LEVEL | REMOTE_IRR | 0x41);
}

#[test]
fn becoming_edge_triggered_ends_a_level_interrupt() {
    let mut bench = Bench::new();
    bench.set(0x24, LEVEL | 0x41);
    bench.pin(10, true);
    bench.set(0x24, MASKED | 0x41);
    assert_eq!(bench.get(0x24), MASKED | 0x41);
    bench.set(0x24, LEVEL | 0x41);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn nmi_on_a_level_pin_is_an_edge() {
    let mut bench = Bench::new();
    bench.set(0x10, LEVEL | 0x400);
    bench.pin(0, true);
    bench.pin(0, true);
    assert_eq!(bench.sent.len(), 1);
    assert_eq!((bench.sent[0].mode, bench.sent[0].level), (DeliveryMode::Nmi, false));
}

#[test]
fn pins_that_do_not_exist_do_nothing() {
    let mut bench = Bench::new();
    bench.pin(24, true);
    bench.pin(usize::MAX, true);
    assert!(bench.sent.is_empty());
}

#[test]
fn saved_state_continues_the_same() {
    let mut bench = Bench::new();
    bench.set(0, 0x0500_0000);
    bench.set(0x25, 0x0200_0000);
    bench.set(0x24, LEVEL | 0x41);
    bench.pin(10, true);
    let mut copy = Bench::new();
    copy.ioapic.load(&bench.ioapic.state());
    assert_eq!(copy.ioapic.state(), bench.ioapic.state());
    copy.eoi(0x41);
    assert_eq!(copy.sent, bench.sent);
}
