use super::*;
use crate::testing::{Bench, Requests, poke, read8, write8};

struct Fixture {
    bench: Bench,
    memory: Arc<GuestMemory>,
    requests: Arc<Requests>,
    device: Arc<I8042>,
}

fn fixture() -> Fixture {
    let bench = Bench::new();
    let memory = Arc::new(GuestMemory::flat(0x1000).unwrap());
    let requests = Arc::new(Requests::default());
    let device = I8042::new(bench.irq(1), Arc::clone(&memory), Arc::clone(&requests) as _);
    Fixture { bench, memory, requests, device }
}

impl Fixture {
    fn command(&self, command: u8) {
        write8(&*self.device, COMMAND, command);
    }

    fn data(&self, value: u8) {
        write8(&*self.device, DATA, value);
    }

    fn status(&self) -> u8 {
        read8(&*self.device, COMMAND)
    }

    /// All bytes the controller has to say.
    fn answers(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & status::OUTPUT_FULL != 0 {
            bytes.push(read8(&*self.device, DATA));
        }
        bytes
    }
}

#[test]
fn probe_of_linux_finds_a_keyboard_and_no_mouse() {
    let f = fixture();
    assert_eq!(f.answers(), [0; 0]);
    f.command(0xaa);
    assert_eq!(f.answers(), [0x55]);
    f.command(0x20);
    let config = f.answers()[0];
    assert_eq!(config & config::TRANSLATE, config::TRANSLATE);
    f.command(0x60);
    f.data(config | config::KEYBOARD_OFF);
    f.command(0xd3);
    f.data(0x5a);
    assert_eq!(f.status() & status::FROM_AUX, 0, "the echo does not come from an auxiliary device");
    assert_eq!(f.answers(), [0x5a]);
    f.command(0xa9);
    assert_eq!(f.answers(), [0x01]);
    f.command(0x60);
    f.data(config & !config::KEYBOARD_OFF);
    f.data(0xf2);
    assert_eq!(f.answers(), [0xfa, 0xab, 0x41]);
    f.data(0xed);
    f.data(0x07);
    assert_eq!(f.answers(), [0xfa, 0xfa]);
    f.data(0xff);
    assert_eq!(f.answers(), [0xfa, 0xaa]);
    f.data(0x42);
    assert_eq!(f.answers(), [0xfe]);
}

#[test]
fn each_byte_is_an_edge_when_the_interrupt_is_enabled() {
    let f = fixture();
    f.data(0xf2);
    assert_eq!(f.answers().len(), 3);
    assert_eq!(f.bench.edges(1).len(), 0);
    f.command(0x60);
    f.data(config::KEYBOARD_IRQ | config::TRANSLATE);
    f.data(0xf2);
    assert!(f.bench.level(1));
    assert_eq!(f.answers().len(), 3);
    assert!(!f.bench.level(1));
    assert_eq!(f.bench.edges(1).len(), 3);
}

#[test]
fn disabled_keyboard_keeps_its_bytes() {
    let f = fixture();
    f.data(0xee);
    f.data(0xee);
    f.command(0xad);
    assert_eq!(f.answers(), [0xee], "the one in the output buffer is out already");
    f.command(0xae);
    assert_eq!(f.answers(), [0xee]);
}

#[test]
fn pulse_of_line_0_resets() {
    let f = fixture();
    f.command(0xff);
    assert_eq!(f.requests.take(), []);
    f.command(0xfe);
    f.command(0xd1);
    f.data(0xfe);
    assert_eq!(f.requests.take(), [PowerEvent::Reset, PowerEvent::Reset]);
}

#[test]
fn output_port_moves_the_a20_gate() {
    let f = fixture();
    f.command(0xd1);
    f.data(0xdd);
    assert_eq!(f.memory.a20_mask(), !(1 << 20));
    f.command(0xd0);
    assert_eq!(f.answers()[0] & output::A20, 0);
    f.command(0xd1);
    f.data(0xdf);
    assert_eq!(f.memory.a20_mask(), !0);
    f.command(0xdd);
    let closed = f.device.save();
    crate::Device::reset(&*f.device);
    assert_eq!(f.memory.a20_mask(), !0);
    f.device.restore(&closed).unwrap();
    assert_eq!(f.memory.a20_mask(), !(1 << 20));
}

#[test]
fn unread_answers_do_not_pile_up() {
    let f = fixture();
    for _ in 0..1000 {
        f.command(0xaa);
        f.data(0xee);
    }
    assert!(f.answers().len() <= 1 + ANSWERS + 16);
}

#[test]
fn random_accesses_leave_a_working_device() {
    let f = fixture();
    poke(&*f.device, 6, &f.bench, 3);
    crate::Device::reset(&*f.device);
    f.command(0xaa);
    assert_eq!(f.answers(), [0x55]);
}
