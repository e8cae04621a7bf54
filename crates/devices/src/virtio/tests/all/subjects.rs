//! The devices, what each has at its other end, and what it should make of chains.

use std::any::Any;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ringfence_disk::{DiskOptions, open};
use ringfence_helper::Link;
use ringfence_net::wire::MAX_MESSAGE;
use ringfence_share::{Server, ShareSpec};
use tempfile::TempDir;

use super::End::{self, Broken, Done, Waits};
use crate::device::lock;
use crate::serial::SerialOutput;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, BlkConfig};
use crate::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd, Size};
use crate::virtio::guest::{Buffer, DATA};
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::rng::Rng;
use crate::virtio::share::{Share, ShareConfig};
use crate::virtio::testing::Driver;
use crate::virtio::tests::driver::Echo;
use crate::virtio::vsock::{Vsock, VsockConfig};
use crate::virtio::{Reporter, SharedDevice};

/// Where requests are, and answers to them.
const REQUEST: u64 = DATA + 0x10_0000;
const ANSWER: u64 = DATA + 0x20_0000;

/// A device that is plugged in, and what is behind it.
pub(super) struct Subject {
    pub(super) driver: Driver,
    /// The other end of the device's link, if it has one that is not a server's.
    pub(super) other: Option<Link>,
    /// Queues that are looked at when something comes from the other end, and not when they are notified.
    inward: &'static [u16],
    /// For each queue that is looked at, what becomes of chains of the odd shapes.
    pub(super) ends: Ends,
    /// More of those, where that depends on what is in the chain.
    others: &'static [u16],
    /// Chains that make work, by queue.
    pub(super) load: Load,
    works: fn(&Self),
    message: fn(u8) -> Vec<u8>,
    _kept: Box<dyn Any + Send + Sync>,
}

/// For each queue, what becomes of chains of the odd shapes.
type Ends = &'static [(u16, [End; 6])];
/// Chains, by queue.
type Load = &'static [(u16, &'static [Buffer])];

/// A server and its folder.
struct Serving(Link, Option<JoinHandle<()>>, #[expect(dead_code, reason = "removed when dropped")] TempDir);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.shutdown();
        let ended = self.1.take().is_none_or(|thread| thread.join().is_ok());
        assert!(std::thread::panicking() || ended, "the server has failed");
    }
}

impl Subject {
    fn new(device: SharedDevice, ends: Ends, load: Load, works: fn(&Self)) -> Self {
        Self {
            driver: Driver::new(device),
            other: None,
            inward: &[],
            ends,
            others: &[],
            load,
            works,
            message: |_| Vec::new(),
            _kept: Box::new(()),
        }
    }

    /// From anywhere to running with all features and queues.
    pub(super) fn start(&self) {
        self.driver.start(self.driver.function.core.features, self.driver.queues());
    }

    /// Queues whose chains the device takes.
    pub(super) fn looked_at(&self) -> impl Iterator<Item = u16> + use<> {
        self.ends.iter().map(|(queue, _)| *queue).chain(self.others.iter().copied())
    }

    /// Has the device look at a queue.
    pub(super) fn stir(&self, queue: u16) {
        self.driver.kick(queue);
        if let (true, Some(other)) = (self.inward.contains(&queue), &self.other) {
            // What does not fit is not needed: the device has enough to look at.
            let _ = other.send(&[IoSlice::new(&self.message())]);
        }
    }

    /// A message of the other end.
    pub(super) fn message(&self) -> Vec<u8> {
        (self.message)(0)
    }

    /// The device, just started or not, does what it is for.
    pub(super) fn works(&self) {
        (self.works)(self);
    }

    /// A message goes out by queue `out` and one comes in by queue `inward`, among others from before.
    fn passes(&self, inward: u16, out: u16) {
        static NUMBER: AtomicU8 = AtomicU8::new(1);
        let (driver, other) = (&self.driver, self.other.as_ref().unwrap());
        let message = (self.message)(NUMBER.fetch_add(1, Ordering::Relaxed) | 1);
        driver.put(REQUEST, &message);
        driver.submit(out, &[(REQUEST, message.len() as u32, false)]);
        let mut buffer = vec![0; 1 << 17];
        driver.wait("the message", || match other.receive(&mut buffer, false) {
            Ok(Some(len)) => buffer[..len] == message,
            _ => false,
        });
        driver.wait_for(out);
        other.send(&[IoSlice::new(&message)]).unwrap();
        let mut got = Vec::new();
        while got != message {
            driver.submit(inward, &[(ANSWER, 0x1000, true)]);
            let len = driver.wait_for(inward);
            got = driver.get(ANSWER, len as usize);
        }
    }
}

fn reporter() -> Reporter {
    Arc::new(|_| ())
}

/// A name, and how to make one.
type Maker = (&'static str, fn() -> Subject);

/// Every device; a new kind belongs here.
pub(super) const SUBJECTS: &[Maker] = &[
    ("echo", echo),
    ("blk", blk),
    ("rng", rng),
    ("balloon", balloon),
    ("net", net),
    ("net with many queues", nets),
    ("share", share),
    ("vsock", vsock),
    ("console", console),
    ("ports", ports),
];

fn echo() -> Subject {
    const LOAD: Load = &[(0, &[(DATA, 8, false), (ANSWER, 8, true)]), (1, &[(DATA, 8, false)])];
    Subject::new(Arc::new(Echo::default()), &[(0, [Done; 6]), (1, [Done; 6])], LOAD, |subject| {
        subject.driver.put(REQUEST, b"some text");
        subject.driver.submit(1, &[(REQUEST, 9, false), (ANSWER, 100, true)]);
        assert_eq!((subject.driver.wait_for(1), subject.driver.get(ANSWER, 9)), (9, b"some text".to_vec()));
    })
}

fn blk() -> Subject {
    const CHAIN: &[Buffer] = &[(REQUEST, 16, false), (ANSWER, 512, true), (ANSWER + 512, 1, true)];
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), [0x42; 8192]).unwrap();
    let disk = open(&DiskOptions::new(image.path().display().to_string().parse().unwrap())).unwrap();
    let device = Blk::new(BlkConfig { disk, block_size: None, serial: "x".into(), queues: 2 }).unwrap();
    const LOAD: Load = &[(0, CHAIN), (1, CHAIN)];
    // Without header and status there is no telling what to do.
    let subject = Subject::new(device, &[(0, [Broken; 6]), (1, [Broken; 6])], LOAD, |subject| {
        subject.driver.put(REQUEST, &[0; 16]);
        subject.driver.submit(1, CHAIN);
        assert_eq!(subject.driver.wait_for(1), 513);
        assert_eq!(subject.driver.get(ANSWER, 513), [&[0x42; 512][..], &[0]].concat());
    });
    subject.driver.put(REQUEST, &[0; 16]);
    Subject { _kept: Box::new(image), ..subject }
}

fn rng() -> Subject {
    let ends = &[(0, [Done, Done, Broken, Done, Broken, Done])];
    Subject::new(Arc::new(Rng::default()), ends, &[(0, &[(ANSWER, 64, true)])], |subject| {
        subject.driver.submit(0, &[(ANSWER, 32, true)]);
        assert_eq!(subject.driver.wait_for(0), 32);
    })
}

fn balloon() -> Subject {
    let ends = &[(0, [Done, Done, Done, Broken, Broken, Broken]), (1, [Done; 6]), (2, [Done; 6])];
    const LOAD: Load =
        &[(0, &[(DATA, 64, false)]), (1, &[(DATA, 64, false)]), (2, &[(ANSWER, 0x4000, true)])];
    Subject::new(Balloon::new(0), ends, LOAD, |subject| {
        subject.driver.put(ANSWER, &[9; 0x1000]);
        subject.driver.put(REQUEST, &((ANSWER >> 12) as u32).to_le_bytes());
        subject.driver.submit(0, &[(REQUEST, 4, false)]);
        assert_eq!(subject.driver.wait_for(0), 0);
        assert_eq!(subject.driver.get(ANSWER, 0x1000), [0; 0x1000]);
    })
}

/// A frame waits until there are buffers enough for it.
const FRAMES: [End; 6] = [Waits, Waits, Waits, Waits, Waits, Done];

fn net() -> Subject {
    net_of(1, &[(0, FRAMES), (1, [Done; 6])])
}

/// The second pair's receive queue is looked at when the driver asks for that.
fn nets() -> Subject {
    net_of(2, &[(0, FRAMES), (1, [Done; 6]), (3, [Done; 6]), (4, [Broken; 6])])
}

fn net_of(pairs: u16, ends: Ends) -> Subject {
    let (link, other) = Link::pair_with_rings(MAX_MESSAGE).unwrap();
    let device = Net::new(NetConfig { mac: [2; 6], mtu: 1500, pairs, link, reporter: reporter() }).unwrap();
    const LOAD: Load = &[(0, &[(ANSWER, 2048, true)]), (1, &[(DATA, 72, false)])];
    let subject = Subject::new(Arc::new(device), ends, LOAD, |subject| subject.passes(0, 1));
    // The header says that one buffer was used, as the device will.
    let message = |number| [&[0; 10][..], &[1, 0], &[number; 60]].concat();
    Subject { other: Some(other), inward: &[0], message, ..subject }
}

fn vsock() -> Subject {
    let (link, other) = Link::pair().unwrap();
    let device = Vsock::new(VsockConfig { cid: 3, link, reporter: reporter() }).unwrap();
    // A buffer without room for a header and some data is of no use.
    let ends = &[(0, [Broken, Broken, Broken, Done, Broken, Done]), (1, [Done; 6])];
    const LOAD: Load = &[(0, &[(ANSWER, 2048, true)]), (1, &[(DATA, 72, false)]), (2, &[(ANSWER, 8, true)])];
    let subject = Subject::new(Arc::new(device), ends, LOAD, |subject| subject.passes(0, 1));
    let message = |number| {
        let mut bytes = vec![number; 44 + 16];
        bytes[24..28].copy_from_slice(&16_u32.to_le_bytes());
        bytes
    };
    Subject { other: Some(other), inward: &[0], message, ..subject }
}

fn share() -> Subject {
    let folder = tempfile::tempdir().unwrap();
    let (link, other) = Link::pair().unwrap();
    let spec = ShareSpec { folder: folder.path().to_owned(), tag: "t".into(), read_only: false };
    let (server, served) = (Server::new(&spec).unwrap(), other.try_clone().unwrap());
    let serving = std::thread::spawn(move || ringfence_share::serve(&served, &server).unwrap());
    let device = Share::new(ShareConfig { tag: "data".into(), link, reporter: reporter() }).unwrap();
    // Requests that are none are answered as far as there is room.
    let ends = &[(0, [Done; 6]), (1, [Done; 6])];
    const LOAD: Load = &[(0, &[(DATA, 40, false)]), (1, &[(REQUEST, 56, false), (ANSWER, 0x1000, true)])];
    let subject = Subject::new(Arc::new(device), ends, LOAD, |subject| {
        // FUSE_INIT of version 7.37.
        let words = [56, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 37, 0, 0];
        let request: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        subject.driver.put(REQUEST, &request);
        subject.driver.submit(1, &[(REQUEST, 56, false), (ANSWER, 0x1000, true)]);
        let written = subject.driver.wait_for(1);
        assert!(written > 16, "{written}");
        assert_eq!(subject.driver.get(ANSWER + 4, 4), [0; 4], "no error");
    });
    Subject { _kept: Box::new(Serving(other, Some(serving), folder)), ..subject }
}

/// A terminal that shows everything.
#[derive(Default)]
struct Screen(Mutex<Vec<u8>>);

impl SerialOutput for Screen {
    fn write(&self, bytes: &[u8]) -> usize {
        lock(&self.0).extend_from_slice(bytes);
        bytes.len()
    }

    fn on_room(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

fn console() -> Subject {
    let screen = Arc::new(Screen::default());
    let size = Size { columns: 80, rows: 25 };
    let config = ConsoleConfig { console: Some(Arc::clone(&screen) as _), size, ports: Vec::new() };
    let device = Console::new(config).unwrap();
    // Nobody types, so only output is looked at.
    let ends = &[(1, [Done, Done, Done, Done, Broken, Done])];
    const LOAD: Load = &[(0, &[(ANSWER, 64, true)]), (1, &[(DATA, 72, false)])];
    let subject = Subject::new(Arc::new(device), ends, LOAD, |subject| {
        let screen = subject._kept.downcast_ref::<Arc<Screen>>().unwrap();
        lock(&screen.0).clear();
        subject.driver.put(REQUEST, b"some text");
        subject.driver.submit(1, &[(REQUEST, 9, false)]);
        subject.driver.wait_for(1);
        subject.driver.wait("the text", || lock(&screen.0).ends_with(b"some text"));
    });
    Subject { _kept: Box::new(screen), ..subject }
}

fn ports() -> Subject {
    let end = PortEnd::Output(Arc::new(Screen::default()));
    let ports = vec![PortConfig { name: "a".to_owned(), end }];
    let device = Console::new(ConsoleConfig { ports, ..ConsoleConfig::default() }).unwrap();
    // What is written before anybody hears it is for nobody; messages of the device wait until there are some.
    const WRITTEN: [End; 6] = [Done, Done, Done, Done, Broken, Done];
    let ends = &[(1, WRITTEN), (2, [Waits; 6]), (5, WRITTEN)];
    const LOAD: Load = &[(1, &[(DATA, 72, false)]), (2, &[(ANSWER, 64, true)]), (5, &[(DATA, 72, false)])];
    let subject = Subject::new(Arc::new(device), ends, LOAD, |subject| {
        // The driver is ready (5.3.6.2), and is told of the port.
        subject.driver.put(REQUEST, &[0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0]);
        subject.driver.submit(3, &[(REQUEST, 8, false)]);
        assert_eq!(subject.driver.wait_for(3), 0);
        subject.driver.submit(2, &[(ANSWER, 64, true)]);
        assert_eq!(
            (subject.driver.wait_for(2), subject.driver.get(ANSWER, 8)),
            (8, vec![1, 0, 0, 0, 1, 0, 1, 0])
        );
    });
    Subject { others: &[3], ..subject }
}
