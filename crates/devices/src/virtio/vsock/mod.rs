//! The socket device (5.10): connections between programs of the guest and of the host, without a network.
//!
//! The device passes packets, and knows nothing of connections: their other end is in a process of its own (`ringfence_vsock`), over a
//! link. A packet goes out on the vCPU's thread, straight into the link; where that has no room the chain goes back into the queue,
//! and the device's thread goes on when there is some. That thread also brings packets in; it takes receive chains only when a
//! packet is there, and cuts data that is longer than a chain into several packets. A packet for which there are no chains waits, and
//! with it, the link fills up. The process then stops taking the guest's packets only when it has too much to answer (5.10.6.1.1).
//!
//! The process is told when the driver begins anew, which ends all connections. They are not saved either: a driver
//! that is restored is told by an event that it has none any more (5.10.6.7).
//!
//! If the process dies, the user is told, the driver hears by the same event that its connections are gone, and its packets go nowhere; the
//! machine lives on.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use ringfence_engine::StateError;
use ringfence_vsock::Link;
use ringfence_vsock::wire::{ACTIVE, HEADER, INACTIVE, LEN, MAX_MESSAGE};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};

use super::line::{Line, OnLine, READABLE, Threaded, WRITABLE};
use super::{Kind, Port, Reporter, VirtioDevice, read_bytes};
use crate::device::{invalid, lock};

const DEVICE_TYPE: u16 = 19;
/// Base class 07 (simple communication), subclass 80 (other).
const CLASS: u32 = 0x07_8000;
/// Entries of each queue.
const QUEUE: u16 = 256;
/// Queues (5.10.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone.
const TRANSPORT_RESET: u32 = 0;

/// Feature bits (5.10.3).
mod feature {
    pub(super) const STREAM: u64 = 1 << 0;
}

/// How a socket device is made.
pub struct VsockConfig {
    /// The guest's number (context identifier).
    pub cid: u32,
    /// The way to the process with the other ends.
    pub link: Link,
    /// Told when the other end of the link is gone.
    pub reporter: Reporter,
}

impl std::fmt::Debug for VsockConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VsockConfig({})", self.cid)
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    cid: u32,
}

#[derive(Debug, Default)]
struct Transmit {
    buffer: Vec<u8>,
    /// What the process is to be told of the driver, before anything else.
    news: Option<u8>,
    /// The link had no room, and the device's thread goes on when it has.
    blocked: bool,
}

/// A packet that is being brought in.
#[derive(Debug)]
struct Incoming {
    buffer: Vec<u8>,
    /// The bytes of header and data, if there is a packet; and how many of the data the guest has.
    packet: Option<(usize, usize)>,
    /// For which life of the driver it is.
    life: u32,
}

struct Shared {
    cid: u32,
    reporter: Reporter,
    line: Line,
    port: OnceLock<Port>,
    transmit: Mutex<Transmit>,
    /// Held while a chain is taken; true from the time when the device is to be saved until the driver is heard of again.
    stopped: Mutex<bool>,
    /// The driver is ready.
    active: AtomicBool,
    /// How often the driver has begun anew.
    life: AtomicU32,
    /// The driver is to be told that it has no connections any more.
    cut: AtomicBool,
    /// A packet waits for receive chains.
    starving: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vsock({})", self.cid)
    }
}

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    shared: Threaded<Shared>,
}

impl Vsock {
    /// A device on the link of `config`, with its thread.
    ///
    /// # Errors
    /// The host has no descriptor or no thread left.
    pub fn new(config: VsockConfig) -> io::Result<Self> {
        let line = Line::new(config.link)?;
        let shared = Shared {
            cid: config.cid,
            reporter: config.reporter,
            line,
            port: OnceLock::new(),
            transmit: Mutex::default(),
            stopped: Mutex::default(),
            active: AtomicBool::new(false),
            life: AtomicU32::new(0),
            cut: AtomicBool::new(false),
            starving: AtomicBool::new(false),
        };
        Ok(Self { shared: Threaded::start("vsock", shared)? })
    }
}

impl Shared {
    /// Sends to the process. False if there is no room now; what cannot be sent at all is lost with the process.
    fn send(&self, transmit: &mut Transmit, message: &[u8]) -> bool {
        match self.line.send(message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                transmit.blocked = true;
                self.line.wake();
                false
            }
            _ => true,
        }
    }

    /// Tells the process of the driver.
    fn tell(&self, news: u8) {
        let mut transmit = lock(&self.transmit);
        transmit.news = Some(news);
        self.send_news(&mut transmit);
    }

    fn send_news(&self, transmit: &mut Transmit) {
        if let Some(news) = transmit.news.filter(|_| !transmit.blocked)
            && self.send(transmit, &[news])
        {
            transmit.news = None;
        }
    }

    /// Sends what the driver has made available, until there is no more or the link has no room.
    fn transmit(&self, port: &Port) {
        let mut transmit = lock(&self.transmit);
        self.send_news(&mut transmit);
        while !transmit.blocked {
            let stopped = lock(&self.stopped);
            if *stopped {
                return;
            }
            let Some(chain) = port.take(TRANSMIT) else { return };
            let len = chain.readable_len();
            // What cannot be a packet is sent nowhere.
            if len < HEADER as u64 || !self.line.is_up() {
                chain.complete(0);
                continue;
            }
            // More than a connection may have on its way: the process sees that data is missing, and ends the connection.
            let len = if len > MAX_MESSAGE as u64 { HEADER } else { len as usize };
            let mut buffer = std::mem::take(&mut transmit.buffer);
            buffer.resize(len, 0);
            chain.read(0, &mut buffer);
            if self.send(&mut transmit, &buffer) {
                chain.complete(0);
            } else {
                chain.put_back();
            }
            transmit.buffer = buffer;
        }
    }

    /// Brings in what has come, until a packet must wait.
    fn receive(&self, port: &Port, incoming: &mut Incoming) {
        for _ in 0..QUEUE {
            if incoming.packet.is_some() {
                return;
            }
            match self.line.receive(&mut incoming.buffer) {
                Ok(Some(len)) => {
                    // Ours are whole.
                    incoming.packet = (len >= HEADER).then_some((len, 0));
                    incoming.life = self.life.load(Ordering::SeqCst);
                    self.deliver(port, incoming);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => return self.down(),
            }
        }
    }

    /// Puts a packet into receive chains, in as many pieces as it takes. If there are too few, the rest has to wait.
    fn deliver(&self, port: &Port, incoming: &mut Incoming) {
        while let Some((len, done)) = incoming.packet {
            let same = incoming.life == self.life.load(Ordering::SeqCst);
            if !same || !self.active.load(Ordering::SeqCst) {
                incoming.packet = None;
                return;
            }
            self.starving.store(true, Ordering::SeqCst);
            let stopped = lock(&self.stopped);
            if *stopped {
                return;
            }
            let Some(chain) = port.take(RECEIVE) else { return };
            self.starving.store(false, Ordering::SeqCst);
            let room = chain.writable_len().saturating_sub(HEADER as u64);
            let left = len - HEADER - done;
            let now = left.min(usize::try_from(room).unwrap_or(usize::MAX));
            if chain.writable_len() < HEADER as u64 || now == 0 && left > 0 {
                return port.fail("a buffer for packets has no room for one");
            }
            let from = HEADER + done;
            let (head, data) = incoming.buffer.split_at_mut(HEADER);
            head[LEN..LEN + 4].copy_from_slice(&(now as u32).to_le_bytes());
            let written =
                chain.write(0, head) + chain.write(HEADER as u64, &data[from - HEADER..from - HEADER + now]);
            chain.complete(written as u32);
            incoming.packet = (now < left).then_some((len, done + now));
        }
    }

    /// The other end is gone.
    fn down(&self) {
        if !self.line.take_down() || self.line.is_ending() {
            return;
        }
        lock(&self.transmit).blocked = false;
        (self.reporter)("the process of vsock has ended; the guest reaches nobody there".to_owned());
        if let Some(port) = self.port.get() {
            // Packets that wait go nowhere, but their chains go back.
            self.transmit(port);
            self.cut.store(self.active.load(Ordering::SeqCst), Ordering::SeqCst);
            self.tell_cut(port);
        }
    }

    /// Tells a driver whose connections are gone so, when it has a chain for that.
    fn tell_cut(&self, port: &Port) {
        if !self.cut.load(Ordering::SeqCst) {
            return;
        }
        if let Some(chain) = port.take(EVENT) {
            self.cut.store(false, Ordering::SeqCst);
            let written = chain.write(0, &TRANSPORT_RESET.to_le_bytes());
            chain.complete(written as u32);
        }
    }
}

impl OnLine for Shared {
    fn line(&self) -> &Line {
        &self.line
    }

    fn work(&self) {
        let mut incoming = Incoming { buffer: vec![0; MAX_MESSAGE], packet: None, life: 0 };
        while !self.line.is_ending() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, incoming.packet.is_none());
            flags.set(PollFlags::OUT, lock(&self.transmit).blocked);
            let Ok(ready) = self.line.wait(flags) else { return self.down() };
            let Some(port) = self.port.get() else { continue };
            if ready.intersects(WRITABLE) && std::mem::take(&mut lock(&self.transmit).blocked) {
                self.transmit(port);
            }
            self.deliver(port, &mut incoming);
            if ready.intersects(READABLE) {
                self.receive(port, &mut incoming);
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind { id: DEVICE_TYPE, class: CLASS, features: feature::STREAM, queues: vec![QUEUE; 3] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.shared.port.set(port);
    }

    /// `struct virtio_vsock_config` (5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&u64::from(self.shared.cid).to_le_bytes(), offset, data);
    }

    fn activate(&self, _: u64) {
        *lock(&self.shared.stopped) = false;
        self.shared.tell(ACTIVE);
        self.shared.active.store(true, Ordering::SeqCst);
        self.shared.line.wake();
        if let Some(port) = self.shared.port.get() {
            self.shared.tell_cut(port);
        }
    }

    fn notify(&self, queue: u16) {
        let Some(port) = self.shared.port.get() else { return };
        if std::mem::take(&mut *lock(&self.shared.stopped)) {
            // It may have come by while the device was stopped.
            self.shared.transmit(port);
            self.shared.line.wake();
        }
        match queue {
            TRANSMIT => self.shared.transmit(port),
            EVENT => self.shared.tell_cut(port),
            _ if self.shared.starving.load(Ordering::SeqCst) => self.shared.line.wake(),
            _ => {}
        }
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        // No chains are held. A packet that waits is let go by the thread; if the device is only saved, it waits on.
        if saving {
            *lock(&self.shared.stopped) = true;
        }
        if queue.is_none() && !saving && self.shared.active.swap(false, Ordering::SeqCst) {
            self.shared.life.fetch_add(1, Ordering::SeqCst);
            self.shared.cut.store(false, Ordering::SeqCst);
            self.shared.tell(INACTIVE);
            self.shared.line.wake();
        }
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(Saved { cid: self.shared.cid }).unwrap_or_default()
    }

    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let saved =
            Saved::deserialize(state).map_err(|_| invalid(name, "it has no state of a socket device"))?;
        if saved.cid != self.shared.cid {
            return Err(invalid(name, "the guest has another cid"));
        }
        self.shared.cut.store(true, Ordering::SeqCst);
        Ok(())
    }
}
