use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ringfence_engine::Stateful;

use super::super::control::{Message, event};
use super::super::*;
use crate::virtio::testing::{DATA, Driver};

const INBOX: u64 = DATA + 0x10_0000;
const MESSAGES: u64 = DATA + 0x20_0000;

/// Takes so many bytes and no more until there is room.
#[derive(Default)]
pub(super) struct Sink {
    pub(super) seen: Mutex<Vec<u8>>,
    pub(super) room: Mutex<usize>,
    wake: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

impl Sink {
    pub(super) fn with_room(room: usize) -> Arc<Self> {
        let sink = Self::default();
        *lock(&sink.room) = room;
        Arc::new(sink)
    }

    fn make_room(&self, room: usize) {
        *lock(&self.room) += room;
        lock(&self.wake).as_ref().unwrap()();
    }

    pub(super) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.seen))
    }
}

impl SerialOutput for Sink {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut room = lock(&self.room);
        let taken = bytes.len().min(*room);
        *room -= taken;
        lock(&self.seen).extend(&bytes[..taken]);
        taken
    }

    fn on_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        *lock(&self.wake) = Some(wake);
    }
}

pub(super) fn console(sink: &Arc<Sink>) -> (Arc<Console>, Driver) {
    let config = ConsoleConfig {
        console: Some(Arc::clone(sink) as _),
        size: Size { columns: 111, rows: 33 },
        ports: Vec::new(),
    };
    let console = Arc::new(Console::new(config).unwrap());
    let driver = Driver::running(Arc::clone(&console) as _, feature::SIZE | feature::EMERGENCY_WRITE, 2);
    (console, driver)
}

/// Has a console's driver say something, and waits until it takes input.
pub(super) fn speak(driver: &Driver) {
    driver.submit(1, &[(DATA, 0, false)]);
    assert_eq!(driver.wait_for(1), 0);
    std::thread::sleep(Duration::from_millis(600));
}

/// A device with the ports `a`, at a socket in `folder`, and `b`, which is `sink`.
pub(super) fn device(folder: &Path, sink: &Arc<Sink>) -> Arc<Console> {
    let path = folder.join("a");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = PortSocket::new(listener, path).unwrap();
    let ports = vec![
        PortConfig { name: "a".to_owned(), end: PortEnd::Socket(socket) },
        PortConfig { name: "b".to_owned(), end: PortEnd::Output(Arc::clone(sink) as _) },
    ];
    Arc::new(Console::new(ConsoleConfig { ports, ..ConsoleConfig::default() }).unwrap())
}

/// What the driver does to a device with ports.
pub(super) struct Lab {
    pub(super) driver: Driver,
    pub(super) folder: tempfile::TempDir,
}

impl Lab {
    pub(super) fn new(sink: &Arc<Sink>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let driver = Driver::running(device(folder.path(), sink), feature::MULTIPORT, 8);
        Self { driver, folder }
    }

    /// The same with both ports there and open in the guest.
    pub(super) fn open(sink: &Arc<Sink>) -> Self {
        let lab = Self::new(sink);
        lab.set_up();
        lab
    }

    pub(super) fn set_up(&self) {
        self.say(u32::MAX, event::DEVICE_READY, 1);
        assert_eq!(self.heard(), message(1, event::DEVICE_ADD, 1));
        assert_eq!(self.heard(), message(2, event::DEVICE_ADD, 1));
        for id in [1, 2] {
            self.say(id, event::PORT_READY, 1);
            let mut named = message(id, event::PORT_NAME, 1);
            named.push([b'a', b'b'][id as usize - 1]);
            assert_eq!(self.heard(), named);
            self.say(id, event::PORT_OPEN, 1);
        }
        assert_eq!(self.heard(), message(2, event::PORT_OPEN, 1));
    }

    /// The driver begins anew, with the first port only, which somebody on the host has open.
    pub(super) fn begin_anew(&self) {
        self.say(u32::MAX, event::DEVICE_READY, 1);
        assert_eq!(
            (self.heard(), self.heard()),
            (message(1, event::DEVICE_ADD, 1), message(2, event::DEVICE_ADD, 1))
        );
        self.say(1, event::PORT_READY, 1);
        assert_eq!(self.heard()[..8], message(1, event::PORT_NAME, 1));
        assert_eq!(self.heard(), message(1, event::PORT_OPEN, 1));
    }

    pub(super) fn say(&self, port: u32, event: u16, value: u16) {
        self.driver.put(DATA, &Message { port, event, value }.to_bytes());
        self.driver.submit(3, &[(DATA, 8, false)]);
        assert_eq!(self.driver.wait_for(3), 0);
    }

    /// The next message from the device.
    pub(super) fn heard(&self) -> Vec<u8> {
        self.driver.submit(2, &[(MESSAGES, 64, true)]);
        let len = self.driver.wait_for(2) as usize;
        self.driver.get(MESSAGES, len)
    }

    pub(super) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("a")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn write(&self, queue: u16, bytes: &[u8]) {
        self.driver.put(DATA, bytes);
        self.driver.submit(queue, &[(DATA, bytes.len() as u32, false)]);
    }

    /// What comes in by a port.
    fn read(&self, queue: u16) -> Vec<u8> {
        self.driver.submit(queue, &[(INBOX, 4096, true)]);
        let len = self.driver.wait_for(queue) as usize;
        self.driver.get(INBOX, len)
    }
}

pub(super) fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    Message { port, event, value }.to_bytes().to_vec()
}

#[test]
fn configuration_tells_size_and_ports() {
    let (console, driver) = console(&Arc::default());
    assert_eq!(driver.config(0), [111, 0, 33, 0, 1, 0, 0, 0]);
    assert_eq!(console.kind().queues.len(), 2);
    let folder = tempfile::tempdir().unwrap();
    let kind = device(folder.path(), &Arc::default()).kind();
    assert_eq!((kind.features, kind.queues.len()), (feature::MULTIPORT, 8));
}

#[test]
fn output_is_held_back_without_room_and_none_is_lost() {
    let sink = Sink::with_room(5);
    let (_console, driver) = console(&sink);
    driver.put(DATA, b"hello, world");
    driver.submit(1, &[(DATA, 7, false), (DATA + 7, 5, false)]);
    assert_eq!((driver.take(1), sink.take()), (None, b"hello".to_vec()));
    sink.make_room(3);
    assert_eq!((driver.take(1), sink.take()), (None, b", w".to_vec()));
    sink.make_room(100);
    assert_eq!((driver.take(1), sink.take()), (Some(0), b"orld".to_vec()));
}

#[test]
fn emergency_character_needs_no_driver() {
    let sink = Sink::with_room(2);
    let (_console, driver) = console(&sink);
    driver.set(0x14, 1, 0);
    driver.set_config(8, &u32::from(b'!').to_le_bytes());
    driver.set_config(8, b"?");
    driver.set_config(8, b"lost");
    assert_eq!(sink.take(), b"!?");
}

#[test]
fn input_goes_in_as_far_as_there_are_buffers_and_its_source_is_told_of_more() {
    let (console, driver) = console(&Arc::default());
    let (input, told) = (console.input(), Arc::new(Mutex::new(0)));
    let count = Arc::clone(&told);
    input.on_input_room(Box::new(move || *lock(&count) += 1));
    driver.submit(0, &[(INBOX, 4, true)]);
    assert_eq!(input.input(b"abcdef"), 0, "Linux would throw it away");
    speak(&driver);
    driver.wait("room", || *lock(&told) == 1);
    assert_eq!(input.input(b"abcdef"), 4);
    assert_eq!((driver.take(0), driver.get(INBOX, 4)), (Some(4), b"abcd".to_vec()));
    driver.submit(0, &[(INBOX, 4, true)]);
    assert_eq!((*lock(&told), input.input(b"ef")), (2, 2));
    driver.submit(0, &[(INBOX, 4, true)]);
    assert_eq!(*lock(&told), 2, "nobody waits");
}

#[test]
fn new_size_is_told_only_when_the_console_is_up() {
    let (console, driver) = console(&Sink::with_room(100));
    let generation = || {
        let mut byte = [0];
        driver.function.read_registers(0x15, &mut byte);
        byte[0]
    };
    let before = generation();
    console.input().resize(80, 25);
    driver.submit(1, &[(DATA, 1, false)]);
    assert_eq!(generation(), before, "too early for Linux");
    let end = Instant::now() + Duration::from_secs(20);
    while generation() == before {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(100));
        driver.submit(1, &[(DATA, 1, false)]);
    }
    assert_eq!(driver.config(0), [80, 0, 25, 0]);
    let before = generation();
    console.input().resize(80, 25);
    assert_eq!(generation(), before, "it is the same");
    console.input().resize(81, 25);
    assert_ne!(generation(), before);
}

#[test]
fn console_beside_ports_is_told_to_be_one_and_its_size() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("a");
    let end = PortEnd::Socket(PortSocket::new(UnixListener::bind(&socket).unwrap(), socket.clone()).unwrap());
    let config = ConsoleConfig {
        console: Some(Sink::with_room(9)),
        size: Size { columns: 80, rows: 25 },
        ports: vec![PortConfig { name: "a".to_owned(), end }],
    };
    let console = Arc::new(Console::new(config).unwrap());
    let driver = Driver::running(Arc::clone(&console) as _, feature::MULTIPORT | feature::SIZE, 6);
    let lab = Lab { driver, folder };
    lab.say(u32::MAX, event::DEVICE_READY, 1);
    assert_eq!(lab.heard(), message(0, event::DEVICE_ADD, 1));
    assert_eq!(lab.heard(), message(1, event::DEVICE_ADD, 1));
    lab.say(0, event::PORT_READY, 1);
    assert_eq!(lab.heard(), message(0, event::CONSOLE_PORT, 1));
    let resized = |columns, rows| [message(0, event::RESIZE, 1), vec![columns, 0, rows, 0]].concat();
    assert_eq!(lab.heard(), resized(80, 25));
    assert_eq!(lab.heard(), message(0, event::PORT_OPEN, 1));
    console.input().resize(90, 30);
    assert_eq!(lab.heard(), resized(90, 30));
    assert_eq!(console.input().input(b"x"), 0, "not open in the guest yet");
    lab.driver.submit(0, &[(INBOX, 4, true)]);
    lab.say(0, event::PORT_OPEN, 1);
    assert_eq!(console.input().input(b"x"), 1);
    drop((lab, console));
    assert!(!socket.exists(), "the socket's file goes with the device");
}

#[test]
fn bytes_cross_a_socket_both_ways() {
    let sink = Sink::with_room(100);
    let lab = Lab::open(&sink);
    let mut stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    stream.write_all(b"from the host").unwrap();
    assert_eq!(lab.read(4), b"from the host");
    lab.write(5, b"from the guest");
    assert_eq!(lab.driver.wait_for(5), 0);
    let mut got = [0; 14];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"from the guest");
    lab.write(7, b"to the other");
    assert_eq!((lab.driver.wait_for(7), sink.take()), (0, b"to the other".to_vec()));
}

#[test]
fn slow_program_holds_the_guest_back_and_gets_everything() {
    let lab = Lab::open(&Arc::default());
    let mut stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    lab.driver.put(DATA, &bytes);
    for _ in 0..3 {
        lab.driver.submit(5, &[(DATA, 1 << 20, false)]);
    }
    assert!(lab.driver.take(5).is_none(), "no socket holds 1 MiB");
    for round in 0..3 {
        let mut got = vec![0; 1 << 20];
        stream.read_exact(&mut got).unwrap();
        assert!(got == bytes, "round {round}");
        assert_eq!(lab.driver.wait_for(5), 0);
    }
}

#[test]
fn program_that_goes_is_told_after_its_last_bytes_and_the_next_one_is_new() {
    let lab = Lab::open(&Arc::default());
    let mut first = lab.connect();
    let second = lab.connect();
    first.write_all(b"last words").unwrap();
    drop(first);
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    assert_eq!(lab.read(4), b"last words");
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 0));
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    (&second).write_all(b"hello").unwrap();
    assert_eq!(lab.read(4), b"hello");
    drop(second);
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 0));
    // To nobody.
    lab.write(5, b"lost");
    assert_eq!(lab.driver.wait_for(5), 0);
    let mut third = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    lab.write(5, b"found");
    let mut got = [0; 5];
    third.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"found");
}

#[test]
fn program_that_has_no_more_to_say_still_gets_its_answer() {
    let lab = Lab::open(&Arc::default());
    let mut stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(lab.read(4), b"question");
    lab.write(5, b"answer");
    let mut got = [0; 6];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
}

#[test]
fn driver_that_begins_anew_is_told_of_everything_again() {
    let lab = Lab::open(&Arc::default());
    let stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    (&stream).write_all(b"early").unwrap();
    lab.driver.start(feature::MULTIPORT, 8);
    lab.begin_anew();
    lab.driver.submit(4, &[(INBOX, 100, true)]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(lab.driver.take(4), None, "nobody has it open");
    lab.say(1, event::PORT_OPEN, 1);
    assert_eq!((lab.driver.wait_for(4), lab.driver.get(INBOX, 5)), (5, b"early".to_vec()));
}

#[test]
fn restored_guest_is_told_that_its_program_is_gone() {
    let sink = Sink::with_room(0);
    let lab = Lab::open(&sink);
    let _stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    sink.make_room(4);
    lab.write(7, b"half way");
    assert_eq!(sink.take(), b"half");
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();

    let other = Sink::with_room(100);
    let folder = tempfile::tempdir().unwrap();
    let driver = Driver::new(device(folder.path(), &other));
    let mut memory = vec![0; crate::virtio::testing::RAM as usize];
    lab.driver.memory.read_bytes(ringfence_memory::GuestAddress(0), &mut memory).unwrap();
    driver.put(0, &memory);
    driver.function.restore(&saved).unwrap();
    assert_eq!(other.take(), b" way");
    assert_eq!(driver.function.save().name, saved.name);
    // The message needs a buffer, of which the first driver knows that they are used up.
    let told = Lab { driver: lab.driver, folder: lab.folder };
    told.driver.function.restore(&saved).unwrap();
    assert_eq!(told.heard(), message(1, event::PORT_OPEN, 0));
    assert_eq!(told.heard(), message(1, event::PORT_OPEN, 1), "somebody is there again");
}

#[test]
fn saved_device_takes_nothing_until_its_driver_is_heard_of() {
    let lab = Lab::open(&Arc::default());
    let mut stream = lab.connect();
    assert_eq!(lab.heard(), message(1, event::PORT_OPEN, 1));
    lab.driver.submit(4, &[(INBOX, 100, true)]);
    lab.driver.function.quiesce();
    stream.write_all(b"x").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(lab.driver.take(4), None);
    lab.driver.submit(4, &[(INBOX, 100, true)]);
    assert_eq!(lab.driver.wait_for(4), 1);
}

#[test]
fn driver_that_finds_by_itself_that_its_output_is_out_is_not_interrupted() {
    let sink = Sink::with_room(1 << 20);
    let (_console, driver) = console(&sink);
    driver.start(crate::virtio::spec::feature::EVENT_INDEX, 2);
    let told = || {
        let mut byte = [0];
        driver.function.read_registers(0x1000, &mut byte);
        byte[0] != 0
    };
    let mut early = 0;
    for index in 0..100_u16 {
        driver.want_told_at(1, index);
        driver.submit(1, &[(DATA, 1, false)]);
        early += u32::from(told());
        assert_eq!(driver.take(1), Some(0));
        driver.want_told_at(1, index + 1);
    }
    std::thread::sleep(Duration::from_millis(20));
    // The thread may have been faster, on a busy host.
    let _ = told();
    assert!(early < 50, "{early} of 100");
    // One that waits for the interrupt gets it.
    driver.submit(1, &[(DATA, 1, false)]);
    driver.wait("the interrupt", told);
}
