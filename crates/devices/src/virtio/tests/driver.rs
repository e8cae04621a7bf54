//! A device that is easy to look through, and its driver.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::device::lock;
use crate::virtio::spec::{descriptor, feature};
use crate::virtio::{Chain, Kind, Port, VirtioDevice, guest, read_bytes, testing};

/// Entries of each of the two queues.
pub(super) const SIZE: u16 = 8;

/// Gives back what it can read as what it can write; or holds chains until told.
#[derive(Debug, Default)]
pub(super) struct Echo {
    port: OnceLock<Port>,
    pub(super) holds: AtomicBool,
    /// Whether it keeps what it holds when it is stopped, as a disk does with requests on their way.
    pub(super) busy: AtomicBool,
    pub(super) held: Mutex<Vec<Chain>>,
    pub(super) activated: Mutex<Vec<u64>>,
}

impl Echo {
    pub(super) fn port(&self) -> &Port {
        self.port.get().unwrap()
    }

    pub(super) fn echo(chain: Chain) {
        let mut bytes = vec![0; chain.readable_len().min(4096) as usize];
        let n = chain.read(0, &mut bytes);
        let written = chain.write(0, &bytes[..n]);
        chain.complete(written as u32);
    }
}

impl VirtioDevice for Echo {
    fn kind(&self) -> Kind {
        Kind { id: 42, class: 0xff_0000, features: 1, queues: vec![SIZE; 2] }
    }

    fn connect(&self, port: Port) {
        self.port.set(port).unwrap();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(b"echo", offset, data);
    }

    fn activate(&self, features: u64) {
        lock(&self.activated).push(features);
    }

    fn notify(&self, queue: u16) {
        while let Some(chain) = self.port().take(queue) {
            if self.holds.load(Ordering::Relaxed) {
                lock(&self.held).push(chain);
            } else {
                Self::echo(chain);
            }
        }
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        if self.busy.load(Ordering::Relaxed) {
            return;
        }
        let held = std::mem::take(&mut *lock(&self.held));
        let (go, stay): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|chain| queue.is_none_or(|queue| chain.queue() == queue));
        *lock(&self.held) = stay;
        for chain in go.into_iter().rev() {
            if saving {
                assert!(chain.put_back());
            }
        }
    }
}

/// Whoever drives an [`Echo`].
pub(super) struct Driver {
    pub(super) echo: Arc<Echo>,
    driver: testing::Driver,
}

impl Deref for Driver {
    type Target = testing::Driver;

    fn deref(&self) -> &testing::Driver {
        &self.driver
    }
}

impl Driver {
    /// A device as after power on, plugged in and bus master.
    pub(super) fn new() -> Self {
        let echo = Arc::new(Echo::default());
        Self { driver: testing::Driver::new(Arc::clone(&echo) as _), echo }
    }

    /// The same with a driver that is ready, both queues and all features.
    pub(super) fn ready() -> Self {
        let driver = Self::new();
        driver.start(feature::CORE);
        driver
    }

    /// From reset to ready, with these features and no others.
    pub(super) fn start(&self, features: u64) {
        guest::Guest::start(self, features, 2);
    }

    pub(super) fn table(queue: u16) -> u64 {
        guest::Guest::table(queue)
    }

    pub(super) fn ring(queue: u16) -> u64 {
        guest::Guest::ring(queue)
    }

    pub(super) fn used(queue: u16) -> u64 {
        guest::Guest::used(queue)
    }

    /// Sends text through a queue with a chain from `head` on, and gives what came back.
    pub(super) fn send(&self, queue: u16, head: u16, text: &str) -> String {
        let before = self.used_index(queue);
        self.put(0x8000, text.as_bytes());
        let table = Self::table(queue);
        self.describe(table, head, (0x8000, text.len() as u32, descriptor::NEXT, head + 1));
        self.describe(table, head + 1, (0x9000, 0x100, descriptor::WRITE, 0));
        self.offer(queue, head);
        self.kick(queue);
        assert_eq!(self.used_index(queue), before.wrapping_add(1), "{:?}", lock(&self.told));
        let (id, len) = self.used_entry(queue, before);
        assert_eq!(id, u32::from(head));
        String::from_utf8(self.get(0x9000, len as usize)).unwrap()
    }

    /// The device is broken, and told so once; a reset makes it whole.
    pub(super) fn assert_broken(&self, message: &str) {
        assert!(self.is_broken(), "not broken: {message}");
        let messages = lock(&self.told).clone();
        assert!(messages.len() == 1 && messages[0].contains(message), "{message}: {messages:?}");
        let before = self.used_index(1);
        self.offer(1, 0);
        self.kick(1);
        assert_eq!(self.used_index(1), before, "a broken device does nothing");
        self.start(feature::CORE);
        assert_eq!(self.send(0, 0, "whole again"), "whole again");
    }
}
