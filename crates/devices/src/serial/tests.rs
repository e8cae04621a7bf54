use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::register::*;
use super::*;
use crate::Device;
use crate::testing::{Bench, poke, read8, write8};

/// Takes at most `room` bytes.
struct Capture {
    bytes: Mutex<Vec<u8>>,
    room: AtomicUsize,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl SerialOutput for Capture {
    fn write(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room.load(Ordering::Relaxed));
        self.room.fetch_sub(taken, Ordering::Relaxed);
        lock(&self.bytes).extend(&bytes[..taken]);
        taken
    }

    fn on_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        let _ = self.wake.set(wake);
    }
}

struct Fixture {
    bench: Bench,
    output: Arc<Capture>,
    serial: Arc<Serial>,
}

const READY: u8 = modem_control::DTR | modem_control::RTS | modem_control::OUT2;

fn fixture() -> Fixture {
    let bench = Bench::new();
    let output = Arc::new(Capture {
        bytes: Mutex::default(),
        room: AtomicUsize::new(usize::MAX),
        wake: OnceLock::new(),
    });
    let serial = Serial::new(0, bench.irq(4), Arc::clone(&output) as _);
    Fixture { bench, output, serial }
}

/// With FIFOs on (trigger level 14), modem lines up, and the given interrupts enabled.
fn opened(interrupts: u8) -> Fixture {
    let f = fixture();
    f.put(FIFO_CONTROL, 0xc7);
    f.put(MODEM_CONTROL, READY);
    f.put(INTERRUPT_ENABLE, interrupts);
    f
}

impl Fixture {
    fn put(&self, offset: u64, value: u8) {
        write8(&*self.serial, offset, value);
    }

    fn get(&self, offset: u64) -> u8 {
        read8(&*self.serial, offset)
    }

    fn irq(&self) -> bool {
        self.bench.level(4)
    }

    fn sent(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.output.bytes))
    }

    fn id(&self) -> u8 {
        self.get(INTERRUPT_ID) & 0x0f
    }
}

#[test]
fn written_bytes_come_out_in_order() {
    let f = fixture();
    for byte in b"hello" {
        assert_eq!(f.get(LINE_STATUS), 0x60);
        f.put(DATA, *byte);
    }
    assert_eq!(f.sent(), b"hello");
}

#[test]
fn probe_of_a_16550a_driver_succeeds() {
    let f = fixture();
    f.put(INTERRUPT_ENABLE, 0);
    assert_eq!(f.get(INTERRUPT_ENABLE), 0);
    f.put(INTERRUPT_ENABLE, 0xff);
    assert_eq!(f.get(INTERRUPT_ENABLE), 0x0f, "the upper bits tell other chips");
    f.put(INTERRUPT_ENABLE, 0);
    f.put(MODEM_CONTROL, modem_control::LOOP | modem_control::RTS | modem_control::OUT2);
    assert_eq!(f.get(MODEM_STATUS) & 0xf0, modem_status::CTS | modem_status::DCD);
    f.put(MODEM_CONTROL, READY);
    assert_eq!(f.get(INTERRUPT_ID), 0x01);
    f.put(FIFO_CONTROL, 1);
    assert_eq!(f.get(INTERRUPT_ID), 0xc1);
    f.put(LINE_CONTROL, 0x80);
    f.put(0, 0x0c);
    f.put(1, 0x01);
    assert_eq!((f.get(0), f.get(1)), (0x0c, 0x01));
    f.put(LINE_CONTROL, 0x03);
    assert_eq!((f.get(INTERRUPT_ENABLE), f.get(LINE_CONTROL)), (0, 3));
    f.put(SCRATCH, 0x5a);
    assert_eq!(f.get(SCRATCH), 0x5a);
    assert_eq!(f.sent(), [0; 0]);
}

#[test]
fn enabling_the_transmitter_interrupt_causes_one_each_time() {
    let f = opened(0);
    for _ in 0..2 {
        f.put(INTERRUPT_ENABLE, enable::TRANSMITTER);
        assert!(f.irq());
        assert_eq!(f.id(), cause::TRANSMITTER);
        assert!(!f.irq(), "reading the identification takes it back");
        assert_eq!(f.id(), cause::NONE);
        f.put(INTERRUPT_ENABLE, 0);
    }
    assert_eq!(f.bench.edges(4).len(), 2);
}

#[test]
fn each_written_byte_is_a_new_edge() {
    let f = opened(enable::TRANSMITTER);
    assert_eq!(f.bench.edges(4).len(), 1);
    f.put(DATA, b'a');
    f.put(DATA, b'b');
    assert!(f.irq());
    assert_eq!(f.bench.edges(4).len(), 2, "without the identification being read");
}

#[test]
fn identification_with_a_higher_cause_keeps_the_transmitters() {
    let f = opened(enable::TRANSMITTER | enable::RECEIVED);
    f.serial.input(b"x");
    assert_eq!(f.id(), cause::TIMEOUT);
    assert_eq!(f.get(DATA), b'x');
    assert_eq!(f.id(), cause::TRANSMITTER);
    assert_eq!(f.id(), cause::NONE);
}

#[test]
fn receiver_interrupts_at_the_trigger_level_and_by_timeout_below() {
    let f = opened(enable::RECEIVED);
    f.serial.input(&[b'a'; 14]);
    assert_eq!(f.id(), cause::RECEIVED);
    assert_eq!(f.get(DATA), b'a');
    assert_eq!(f.id(), cause::TIMEOUT);
    for _ in 0..13 {
        assert_eq!(f.get(LINE_STATUS) & 1, 1);
        f.get(DATA);
    }
    assert_eq!((f.id(), f.get(LINE_STATUS)), (cause::NONE, 0x60));
    assert!(!f.irq());
}

#[test]
fn long_input_arrives_whole_with_an_edge_per_fifo_load() {
    let f = opened(enable::RECEIVED);
    let text: Vec<u8> = (0..100).collect();
    assert_eq!(f.serial.input(&text), 100);
    let mut got = Vec::new();
    while f.get(LINE_STATUS) & line_status::DATA_READY != 0 {
        got.push(f.get(DATA));
    }
    assert_eq!(got, text);
    assert_eq!(f.bench.edges(4).len(), 100_usize.div_ceil(FIFO));
}

#[test]
fn input_queue_is_bounded_and_tells_of_room() {
    let f = opened(0);
    let (tell, told) = mpsc::channel();
    f.serial.on_input_room(move || tell.send(()).unwrap());
    assert_eq!(f.serial.input(&[7; 10_000]), INPUT_QUEUE);
    assert_eq!(f.serial.input_room(), FIFO, "the queue filled the FIFO and has that much room");
    assert_eq!(f.serial.input(&[7; 10_000]), FIFO);
    for _ in 0..INPUT_QUEUE / 2 - 1 {
        f.get(DATA);
    }
    assert!(told.try_recv().is_err());
    for _ in 0..2 * FIFO {
        f.get(DATA);
    }
    assert!(told.try_recv().is_ok());
    assert!(told.try_recv().is_err(), "once");
    assert!(f.serial.input_room() >= INPUT_QUEUE / 2);
}

#[test]
fn input_before_the_port_is_opened_is_not_lost() {
    let f = fixture();
    f.serial.input(b"early");
    assert_eq!(f.get(LINE_STATUS) & 1, 0);
    f.put(FIFO_CONTROL, 0x07);
    f.put(MODEM_CONTROL, READY);
    let got: Vec<u8> = (0..5).map(|_| f.get(DATA)).collect();
    assert_eq!(got, b"early");
}

#[test]
fn interrupt_needs_out2() {
    let f = opened(enable::RECEIVED);
    f.put(MODEM_CONTROL, modem_control::RTS);
    f.serial.input(b"x");
    assert_eq!(f.id(), cause::TIMEOUT);
    assert!(!f.irq());
    f.put(MODEM_CONTROL, READY);
    assert!(f.irq());
}

#[test]
fn loopback_returns_what_is_sent_and_overruns() {
    let f = opened(enable::LINE);
    f.put(MODEM_CONTROL, modem_control::LOOP);
    f.serial.input(b"outside");
    for byte in 0..17 {
        f.put(DATA, byte);
    }
    assert_eq!(f.id(), cause::LINE);
    assert_eq!(f.get(LINE_STATUS), 0x60 | line_status::OVERRUN | line_status::DATA_READY);
    assert_eq!(f.id(), cause::NONE, "reading the line status takes it back");
    let got: Vec<u8> = (0..16).map(|_| f.get(DATA)).collect();
    assert_eq!(got, (0..16).collect::<Vec<u8>>());
    assert_eq!(f.get(LINE_STATUS), 0x60);
    assert_eq!(f.sent(), [0; 0]);
}

#[test]
fn overrun_without_fifos_replaces_the_character() {
    let f = fixture();
    f.put(MODEM_CONTROL, modem_control::LOOP);
    f.put(DATA, 1);
    f.put(DATA, 2);
    assert_eq!(f.get(LINE_STATUS) & line_status::OVERRUN, line_status::OVERRUN);
    assert_eq!(f.get(DATA), 2);
    assert_eq!(f.get(LINE_STATUS), 0x60);
}

#[test]
fn modem_status_tells_changes_once() {
    let f = opened(enable::MODEM);
    assert_eq!(f.get(MODEM_STATUS), 0xb0);
    f.put(MODEM_CONTROL, modem_control::LOOP | modem_control::OUT1 | modem_control::OUT2);
    assert_eq!(f.id(), cause::MODEM);
    assert_eq!(f.get(MODEM_STATUS), 0xc3, "CTS and DSR fell; the ring indicator's start does not count");
    assert_eq!(f.id(), cause::NONE);
    f.put(MODEM_CONTROL, modem_control::LOOP | modem_control::OUT2);
    assert_eq!(f.get(MODEM_STATUS), 0x84, "its end does");
}

#[test]
fn break_shows_when_it_reaches_the_top() {
    let f = opened(enable::LINE | enable::RECEIVED);
    f.serial.input(b"a");
    f.serial.send_break();
    assert_eq!(f.id(), cause::TIMEOUT);
    assert_eq!(f.get(DATA), b'a');
    assert_eq!(f.id(), cause::LINE);
    assert_eq!(
        f.get(LINE_STATUS),
        0x60 | line_status::BREAK | line_status::DATA_READY | line_status::ERROR_IN_FIFO
    );
    assert_eq!(f.get(DATA), 0);
    assert_eq!(f.get(LINE_STATUS), 0x60);
}

#[test]
fn clearing_fifos_empties_them() {
    let f = opened(0);
    f.serial.input(&[1; 20]);
    f.put(FIFO_CONTROL, 0x03);
    let rest: Vec<u8> = std::iter::from_fn(|| (f.get(LINE_STATUS) & 1 != 0).then(|| f.get(DATA))).collect();
    assert_eq!(rest, [1; 4], "what had not been sent yet is still to come");
}

#[test]
fn full_output_holds_the_transmitter() {
    let f = opened(enable::TRANSMITTER);
    f.id();
    f.output.room.store(1, Ordering::Relaxed);
    f.put(DATA, b'a');
    assert_eq!((f.get(LINE_STATUS), f.id()), (0x60, cause::TRANSMITTER));
    for byte in b'b'..b'b' + 20 {
        f.put(DATA, byte);
    }
    assert_eq!((f.get(LINE_STATUS), f.id()), (0, cause::NONE));
    assert!(!f.irq());
    f.output.room.store(100, Ordering::Relaxed);
    f.output.wake.get().unwrap()();
    assert_eq!((f.get(LINE_STATUS), f.id()), (0x60, cause::TRANSMITTER));
    assert_eq!(f.sent(), (b'a'..=b'a' + 16).collect::<Vec<u8>>(), "what was beyond the FIFO is lost");
}

#[test]
fn saved_port_goes_on_in_another() {
    let f = opened(enable::RECEIVED);
    f.serial.input(&[9; 30]);
    let saved = f.serial.save();
    let g = fixture();
    g.serial.restore(&saved).unwrap();
    assert!(g.irq());
    assert_eq!(g.serial.save(), saved);
    let mut bad = saved.clone();
    bad.fields["transmitter"] = vec![0; 17].into();
    assert!(g.serial.restore(&bad).is_err());
    bad = SavedState { version: VERSION + 1, ..saved };
    assert!(matches!(g.serial.restore(&bad), Err(StateError::TooNew { .. })));
}

#[test]
fn random_accesses_leave_a_working_port() {
    let f = fixture();
    f.serial.input(&[3; 5000]);
    poke(&*f.serial, 8, &f.bench, 8);
    f.serial.reset();
    f.sent();
    f.put(DATA, b'!');
    assert_eq!(f.sent(), b"!");
}

/// Blocks each write until it is let go.
struct Gate(mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.0.recv() {
            Ok(()) => {
                lock(&self.1).extend(bytes);
                Ok(bytes.len())
            }
            Err(_) => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn stopped_reader_fills_the_buffer_and_blocks_nobody() {
    let (open, gate) = mpsc::channel();
    let written = Arc::default();
    let output = BufferedOutput::new(Gate(gate, Arc::clone(&written)), 64).unwrap();
    let (tell, told) = mpsc::channel();
    output.on_room(Box::new(move || tell.send(()).unwrap()));
    let mut taken = 0;
    loop {
        let n = output.write(&[1; 16]);
        taken += n;
        if n == 0 {
            break;
        }
        assert!(taken <= 64 + 64, "the thread may have taken one load out");
    }
    assert!(!output.drain(Duration::from_millis(20)));
    open.send(()).unwrap();
    open.send(()).unwrap();
    told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(output.drain(Duration::from_secs(10)));
    assert_eq!(lock(&written).len(), taken);
}

#[test]
fn broken_output_swallows_everything() {
    let (open, gate) = mpsc::channel::<()>();
    let output = BufferedOutput::new(Gate(gate, Arc::default()), 64).unwrap();
    drop(open);
    output.write(b"x");
    assert!(output.drain(Duration::from_secs(10)));
    assert_eq!(output.error(), Some(std::io::ErrorKind::BrokenPipe));
    assert_eq!(output.write(&[0; 1000]), 1000);
}

/// A source of input on a thread of its own, with back-pressure, against a reader that polls.
#[test]
fn input_from_another_thread_arrives_whole() {
    let f = opened(enable::RECEIVED);
    let (tell, told) = mpsc::channel();
    f.serial.on_input_room(move || tell.send(()).unwrap());
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let got = std::thread::scope(|scope| {
        let (serial, mut rest) = (&f.serial, &bytes[..]);
        scope.spawn(move || {
            while !rest.is_empty() {
                rest = &rest[serial.input(rest)..];
                if !rest.is_empty() {
                    told.recv_timeout(Duration::from_secs(20)).unwrap();
                }
            }
        });
        let mut got = Vec::new();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while got.len() < bytes.len() && std::time::Instant::now() < deadline {
            if f.get(LINE_STATUS) & line_status::DATA_READY != 0 {
                got.push(f.get(DATA));
            }
        }
        got
    });
    assert!(got == bytes, "{} bytes arrived", got.len());
}

/// A guest that waits for the transmitter, as drivers do, loses nothing to a buffer that is always full.
#[test]
fn output_through_a_small_buffer_arrives_whole() {
    let (open, gate) = mpsc::channel();
    let written = Arc::default();
    let output = BufferedOutput::new(Gate(gate, Arc::clone(&written)), 8).unwrap();
    let bench = Bench::new();
    let serial = Serial::new(1, bench.irq(3), Arc::clone(&output) as _);
    let text: Vec<u8> = (0..2000_u32).map(|i| (i % 251) as u8).collect();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    for byte in &text {
        while read8(&*serial, LINE_STATUS) & 0x20 == 0 {
            assert!(std::time::Instant::now() < deadline, "the transmitter never emptied");
            open.send(()).unwrap();
            std::thread::yield_now();
        }
        write8(&*serial, DATA, *byte);
    }
    (0..text.len()).for_each(|_| open.send(()).unwrap());
    while read8(&*serial, LINE_STATUS) & 0x20 == 0 {
        assert!(std::time::Instant::now() < deadline, "the transmitter never emptied");
    }
    assert!(output.drain(Duration::from_secs(10)));
    assert!(*lock(&written) == text);
}
