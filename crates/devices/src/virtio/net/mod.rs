//! The network device (5.1): a queue of frames in, a queue of frames out, and a link to the process that has the network.
//!
//! The header of the link's messages is the driver's own (5.1.6), so offloads pass through: unfinished checksums and
//! segments of up to 64 KiB in either direction. A frame goes out on the vCPU's thread, straight into the link; where that has no
//! room the chain goes back into the queue, and the device's thread goes on when there is some. That thread also brings frames
//! in; it takes receive chains only when a frame is there, so none are held, and a frame for which there are none waits, and
//! with it, the link fills up and the sender stops. The link is two rings in shared memory: see `ringfence-helper`.
//!
//! With more than one pair of queues the driver says by a control queue how many it uses, and a flow comes in by the pair by which
//! it goes out. All pairs share the link: what they spare is the guest's vCPUs' waiting for each other.
//!
//! If the process at the other end dies, or breaks the link's rules, the link goes down for the guest and the user is told; the machine
//! lives on.
//!
//! A frame is in the link as a whole or not at all, and a chain is given back when its frame is in it. So there is nothing of frames in saved
//! state: those that waited for room are still in the guest's queue, and those that come while the device is stopped are lost.

mod control;
mod feature;
mod steering;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Mutex, OnceLock};

use ringfence_engine::StateError;
use ringfence_net::Link;
use ringfence_net::wire::{MAX_MESSAGE, Mac, NEEDS_CSUM, Offloads, VNET};
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use steering::{Steering, receive_queue, transmit_queue};

use super::line::{Line, OnLine, READABLE, Threaded, WRITABLE};
use super::{Chain, Kind, Port, Reporter, VirtioDevice, read_bytes};
use crate::device::{invalid, lock};

const DEVICE_TYPE: u16 = 1;
/// Base class 02 (network), subclass 00 (Ethernet).
const CLASS: u32 = 0x02_0000;
/// Entries of each queue.
const QUEUE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE: u16 = 64;
/// No control queue.
const NONE: u16 = u16::MAX;
/// The shortest frame: an Ethernet header.
const SHORTEST: u64 = VNET as u64 + 14;
/// Offset of `num_buffers` in the header.
const BUFFERS: usize = 10;

/// How a network device is made.
pub struct NetConfig {
    /// Its Ethernet address.
    pub mac: Mac,
    /// The largest IP packet that it passes, in bytes.
    pub mtu: u16,
    /// Pairs of queues, 1 to [`ringfence_net::MAX_QUEUES`].
    pub pairs: u16,
    /// The way to the network.
    pub link: Link,
    /// Told when the other end of the link is gone.
    pub reporter: Reporter,
}

impl std::fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NetConfig")
    }
}

#[derive(Debug, Default)]
struct Transmit {
    buffer: Vec<u8>,
    /// The link had no room, and the device's thread goes on when it has.
    blocked: bool,
}

struct Shared {
    mac: Mac,
    mtu: u16,
    reporter: Reporter,
    line: Line,
    port: OnceLock<Port>,
    /// One for each pair.
    transmit: Vec<Mutex<Transmit>>,
    steering: Steering,
    /// The control queue, which is where the driver's features have it.
    control: AtomicU16,
    /// The driver is ready.
    active: AtomicBool,
    /// A frame waits for receive buffers.
    starving: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Net")
    }
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    shared: Threaded<Shared>,
}

impl Net {
    /// A device on the link of `config`, with its thread.
    ///
    /// # Errors
    /// The host has no descriptor or no thread left.
    pub fn new(config: NetConfig) -> io::Result<Self> {
        let line = Line::new(config.link)?;
        let shared = Shared {
            mac: config.mac,
            mtu: config.mtu,
            reporter: config.reporter,
            line,
            port: OnceLock::new(),
            transmit: (0..config.pairs).map(|_| Mutex::default()).collect(),
            steering: Steering::new(config.pairs),
            control: AtomicU16::new(NONE),
            active: AtomicBool::new(false),
            starving: AtomicBool::new(false),
        };
        Ok(Self { shared: Threaded::start("net", shared)? })
    }
}

impl Shared {
    /// Sends what the driver has made available in a pair, until there is no more or the link has no room.
    fn transmit(&self, port: &Port, pair: u16) {
        let Some(transmit) = self.transmit.get(usize::from(pair)) else { return };
        let mut transmit = lock(transmit);
        let Transmit { buffer, blocked } = &mut *transmit;
        if *blocked || !self.active.load(Ordering::SeqCst) {
            return;
        }
        while let Some(chain) = port.take(transmit_queue(pair)) {
            let len = chain.readable_len();
            // What cannot be a frame is sent nowhere.
            if !(SHORTEST..=MAX_MESSAGE as u64).contains(&len) || !self.line.is_up() {
                chain.complete(0);
                continue;
            }
            buffer.resize(len as usize, 0);
            if chain.read(0, buffer) != buffer.len() {
                chain.complete(0);
                continue;
            }
            // The one flag that a driver may set (5.1.6.2). Others mean something else on the link.
            buffer[0] &= NEEDS_CSUM;
            self.steering.sent(buffer, pair);
            match self.line.send(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    chain.put_back();
                    *blocked = true;
                    self.line.wake();
                    return;
                }
                // One that the other end does not get is lost, as on any wire; the thread sees to it that it is gone.
                Err(_) => {
                    chain.complete(0);
                    self.line.wake();
                }
                Ok(()) => chain.complete(0),
            }
        }
    }

    /// Brings in what has come, until a frame must wait: its length then.
    fn receive(&self, port: &Port, buffer: &mut [u8]) -> Option<usize> {
        for _ in 0..QUEUE {
            match self.line.receive(buffer) {
                Ok(Some(len)) => {
                    let waiting = self.deliver(port, buffer, len);
                    if waiting.is_some() {
                        return waiting;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(None) | Err(_) => {
                    self.down();
                    return None;
                }
            }
        }
        None
    }

    /// Puts a frame into receive buffers. If there are too few, it has to wait: its length then.
    fn deliver(&self, port: &Port, buffer: &mut [u8], len: usize) -> Option<usize> {
        let frame = &mut buffer[..len];
        if !self.active.load(Ordering::SeqCst) || (len as u64) < SHORTEST {
            return None;
        }
        self.starving.store(true, Ordering::SeqCst);
        let mergeable = port.features() & feature::MERGEABLE != 0;
        let pairs = self.steering.pairs();
        let queue = receive_queue(self.steering.pair(frame, *pairs));
        let (mut chains, mut room): (Vec<Chain>, u64) = (Vec::new(), 0);
        while room < len as u64 {
            // A driver's buffers of no bytes do not keep this thread busy.
            let next = if chains.len() < usize::from(QUEUE) { port.take(queue) } else { None };
            match next {
                Some(chain) if mergeable || chain.writable_len() >= len as u64 => {
                    room += chain.writable_len();
                    chains.push(chain);
                }
                // Too small, and one is all it may have: the frame is lost, the buffer is for the next.
                Some(chain) => {
                    chain.put_back();
                    self.starving.store(false, Ordering::SeqCst);
                    return None;
                }
                None => {
                    // What was taken goes back; the queue's next kick wakes this thread. All of a queue's buffers
                    // may be less than a frame: then it never fits, and is lost.
                    let all = chains.len() >= usize::from(QUEUE);
                    while let Some(chain) = chains.pop() {
                        chain.put_back();
                    }
                    return (!all).then_some(len);
                }
            }
        }
        self.starving.store(false, Ordering::SeqCst);
        frame[BUFFERS..VNET].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut at = 0;
        let written = chains.into_iter().map(|chain| {
            let n = chain.write(0, &frame[at..]);
            at += n;
            (chain, n as u32)
        });
        let written = written.collect();
        port.complete_all(written);
        None
    }

    /// The other end is gone.
    fn down(&self) {
        if !self.line.take_down() || self.line.is_ending() {
            return;
        }
        self.transmit.iter().for_each(|transmit| lock(transmit).blocked = false);
        (self.reporter)(match self.line.fault() {
            Some(fault) => format!("{fault}, and is left alone; the guest's network link is down"),
            None => "the network's process has ended; the guest's link is down".to_owned(),
        });
        if let Some(port) = self.port.get() {
            port.config_changed();
            // Frames that wait go nowhere, but their buffers go back.
            (0..self.steering.most()).for_each(|pair| self.transmit(port, pair));
        }
    }
}

impl OnLine for Shared {
    fn line(&self) -> &Line {
        &self.line
    }

    fn work(&self) {
        let mut buffer = vec![0; MAX_MESSAGE];
        // The length of a frame that waits for receive buffers.
        let mut waiting = None;
        while !self.line.is_ending() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, waiting.is_none());
            flags.set(PollFlags::OUT, self.transmit.iter().any(|transmit| lock(transmit).blocked));
            let Ok(ready) = self.line.wait(flags) else { return self.down() };
            let Some(port) = self.port.get() else { continue };
            if ready.intersects(WRITABLE) {
                for (transmit, pair) in self.transmit.iter().zip(0..) {
                    if std::mem::take(&mut lock(transmit).blocked) {
                        self.transmit(port, pair);
                    }
                }
            }
            if let Some(len) = waiting {
                waiting = self.deliver(port, &mut buffer, len);
            }
            if ready.intersects(READABLE) && waiting.is_none() {
                waiting = self.receive(port, &mut buffer);
            } else if ready.contains(PollFlags::HUP) {
                waiting = None;
                self.down();
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Pairs that the driver uses.
    pairs: u16,
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        let pairs = self.shared.steering.most();
        let mut kind = Kind {
            id: DEVICE_TYPE,
            class: CLASS,
            features: feature::ALL,
            queues: vec![QUEUE; usize::from(pairs) * 2],
        };
        if pairs > 1 {
            kind.features |= feature::CONTROL | feature::MULTIQUEUE;
            kind.queues.push(CONTROL_QUEUE);
        }
        kind
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.shared.port.set(port);
    }

    /// `struct virtio_net_config` (5.1.4) up to `mtu`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Shared { mac, mtu, line, steering, .. } = &*self.shared;
        let mut config = [0; 12];
        config[..6].copy_from_slice(mac);
        config[6] = u8::from(line.is_up());
        config[8..10].copy_from_slice(&steering.most().to_le_bytes());
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&self, features: u64) {
        let has = |bit| features & bit != 0;
        let offloads = Offloads {
            checksum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
        };
        // Behind all pairs; without the feature there is one (5.1.2).
        let pairs = if has(feature::MULTIQUEUE) { self.shared.steering.most() } else { 1 };
        let control = if has(feature::CONTROL) { pairs * 2 } else { NONE };
        self.shared.control.store(control, Ordering::SeqCst);
        // If the link is full, it stays as it was before the reset: the other end then reads this with the frames.
        let _ = self.shared.line.send(&offloads.message());
        self.shared.active.store(true, Ordering::SeqCst);
        // The thread looks at all queues: what waited when the machine was saved has been announced already.
        let set = |blocked| self.shared.transmit.iter().for_each(|transmit| lock(transmit).blocked = blocked);
        set(true);
        if !self.shared.line.is_up() {
            set(false);
        }
        self.shared.line.wake();
    }

    fn notify(&self, queue: u16) {
        let shared = &self.shared;
        let Some(port) = shared.port.get() else { return };
        if queue == shared.control.load(Ordering::SeqCst) {
            control::serve(port, queue, |pairs| shared.steering.set(pairs));
            // A frame may wait for buffers of another pair than before.
            shared.line.wake();
        } else if queue % 2 == 1 {
            shared.transmit(port, queue / 2);
        } else if shared.starving.load(Ordering::SeqCst) {
            shared.line.wake();
        }
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        // No chains are held. A frame that waits is let go by the thread.
        if queue.is_none() {
            self.shared.active.store(false, Ordering::SeqCst);
            // Whoever is sending is done then, and nobody begins.
            self.shared.transmit.iter().for_each(|transmit| drop(lock(transmit)));
            self.shared.line.wake();
            if !saving {
                self.shared.steering.reset();
            }
        }
    }

    fn save(&self) -> serde_json::Value {
        serde_json::to_value(Saved { pairs: *self.shared.steering.pairs() }).unwrap_or_default()
    }

    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let saved =
            Saved::deserialize(state).map_err(|_| invalid(name, "it has no state of a network card"))?;
        let set = self.shared.steering.set(saved.pairs);
        if set { Ok(()) } else { Err(invalid(name, "its driver uses more queues than there are")) }
    }
}
