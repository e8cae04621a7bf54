//! The file system device (5.11): a folder of the host for the guest, served by a process of its own.
//!
//! A request is a FUSE message, which the device passes on, unread, over the link to the process that has the folder
//! (`ringfence_share`); the answer goes into the same chain. Requests go out on the vCPU's thread; where the link has no room the
//! chain goes back into its queue, and the device's thread goes on when there is some. That thread also brings the answers in, in
//! any order. Urgent requests (5.11.2) have a queue of their own and no precedence: nothing blocks the process for long.
//!
//! A request that is longer than any can be is refused here. If the process dies, what was asked, and all that follows, fails with
//! an I/O error in the guest, and the user is told; the machine lives on.
//!
//! The state that belongs to the guest's mount (which number means which file) is the process'. It is not saved: a machine that is
//! restored finds its files stale, and mounts anew.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, OnceLock};

use ringfence_share::{HEAD, Link, MAX_ANSWER, MAX_REQUEST, NUMBER, failure};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::line::{Line, OnLine, READABLE, Threaded};
use super::{Chain, Kind, Port, Reporter, VirtioDevice, read_bytes};
use crate::device::lock;

const DEVICE_TYPE: u16 = 26;
/// Base class 01 (mass storage), subclass 80 (other).
const CLASS: u32 = 0x01_8000;
/// Entries of each queue.
const QUEUE: u16 = 128;
/// Queues: urgent requests, others.
const QUEUES: u16 = 2;
/// Bytes of the tag in the configuration space (5.11.4).
const TAG: usize = 36;
/// Where a FUSE request has the number that its answer repeats.
const UNIQUE: u64 = 8;

/// How a file system device is made.
pub struct ShareConfig {
    /// The name under which the guest finds it: 36 bytes at most.
    pub tag: String,
    /// The way to the process that has the folder.
    pub link: Link,
    /// Told when the other end of the link is gone.
    pub reporter: Reporter,
}

impl std::fmt::Debug for ShareConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShareConfig({})", self.tag)
    }
}

/// Requests on their way to the process.
#[derive(Debug, Default)]
struct Requests {
    /// Those that wait for an answer, by their numbers.
    flying: HashMap<u32, Chain>,
    next: u32,
    buffer: Vec<u8>,
    /// The link had no room, and the device's thread goes on when it has.
    blocked: bool,
    /// From the time when the device is to be saved until the driver is heard of again.
    stopped: bool,
}

struct Shared {
    tag: String,
    reporter: Reporter,
    line: Line,
    port: OnceLock<Port>,
    requests: Mutex<Requests>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Share({})", self.tag)
    }
}

/// A file system device.
#[derive(Debug)]
pub struct Share {
    shared: Threaded<Shared>,
}

impl Share {
    /// A device on the link of `config`, with its thread.
    ///
    /// # Errors
    /// The host has no descriptor or no thread left.
    pub fn new(config: ShareConfig) -> io::Result<Self> {
        let line = Line::new(config.link)?;
        let shared = Shared {
            tag: config.tag,
            reporter: config.reporter,
            line,
            port: OnceLock::new(),
            requests: Mutex::default(),
        };
        Ok(Self { shared: Threaded::start("share", shared)? })
    }
}

/// Answers a request with an error, if it is one that has an answer.
fn refuse(chain: Chain, error: Errno) {
    let mut unique = [0; 8];
    chain.read(UNIQUE, &mut unique);
    let answer = failure(u64::from_le_bytes(unique), error);
    let room = chain.writable_len() >= answer.len() as u64;
    let written = if room { chain.write(0, &answer) } else { 0 };
    chain.complete(written as u32);
}

impl Shared {
    /// Sends what the driver has made available in a queue, until there is no more or the link has no room.
    fn send(&self, port: &Port, queue: u16) {
        let mut requests = lock(&self.requests);
        while !requests.blocked && !requests.stopped {
            let Some(chain) = port.take(queue) else { return };
            let len = chain.readable_len();
            if !self.line.is_up() {
                refuse(chain, Errno::IO);
                continue;
            }
            if len > MAX_REQUEST as u64 {
                refuse(chain, Errno::INVAL);
                continue;
            }
            let Requests { flying, next, buffer, blocked, .. } = &mut *requests;
            *next = next.wrapping_add(1);
            let room = chain.writable_len().min(MAX_ANSWER as u64) as u32;
            buffer.clear();
            buffer.extend(next.to_le_bytes());
            buffer.extend(room.to_le_bytes());
            buffer.resize(HEAD + len as usize, 0);
            chain.read(0, buffer.get_mut(HEAD..).unwrap_or_default());
            match self.line.send(buffer) {
                Ok(()) => drop(flying.insert(*next, chain)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    chain.put_back();
                    *blocked = true;
                    self.line.wake();
                }
                // The thread notices too, and tells the user.
                Err(_) => refuse(chain, Errno::IO),
            }
        }
    }

    /// The driver is heard of, perhaps for the first time after the device was saved.
    fn go_on(&self) {
        let mut requests = lock(&self.requests);
        if std::mem::take(&mut requests.stopped) {
            requests.blocked = true;
            drop(requests);
            self.resume();
        }
    }

    /// Goes on with all queues after the link had no room.
    fn resume(&self) {
        let Some(port) = self.port.get() else { return };
        if std::mem::take(&mut lock(&self.requests).blocked) {
            (0..QUEUES).for_each(|queue| self.send(port, queue));
        }
    }

    /// Brings in the answers that have come.
    fn receive(&self, buffer: &mut [u8]) {
        for _ in 0..QUEUE {
            match self.line.receive(buffer) {
                Ok(Some(len)) => {
                    let Some((number, answer)) =
                        buffer.get(..len).and_then(|message| message.split_first_chunk::<NUMBER>())
                    else {
                        continue;
                    };
                    let chain = lock(&self.requests).flying.remove(&u32::from_le_bytes(*number));
                    if let Some(chain) = chain {
                        let written = chain.write(0, answer);
                        chain.complete(written as u32);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => return self.down(),
            }
        }
    }

    /// The other end is gone: what was asked fails.
    fn down(&self) {
        if !self.line.take_down() {
            return;
        }
        let mut requests = lock(&self.requests);
        let flying = std::mem::take(&mut requests.flying);
        drop(requests);
        flying.into_values().for_each(|chain| refuse(chain, Errno::IO));
        if !self.line.is_ending() {
            let tag = &self.tag;
            (self.reporter)(format!(
                "the process of the shared folder {tag} has ended; the guest gets I/O errors there"
            ));
        }
        self.resume();
    }
}

impl OnLine for Shared {
    fn line(&self) -> &Line {
        &self.line
    }

    fn work(&self) {
        let mut buffer = vec![0; NUMBER + MAX_ANSWER];
        while !self.line.is_ending() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, lock(&self.requests).blocked);
            let Ok(ready) = self.line.wait(flags) else { return self.down() };
            if ready.intersects(READABLE) {
                self.receive(&mut buffer);
            }
            if ready.contains(PollFlags::OUT) {
                self.resume();
            }
        }
    }
}

impl VirtioDevice for Share {
    fn kind(&self) -> Kind {
        Kind { id: DEVICE_TYPE, class: CLASS, features: 0, queues: vec![QUEUE; QUEUES.into()] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.shared.port.set(port);
    }

    /// `struct virtio_fs_config`: the tag, and how many queues there are for requests that are not urgent.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG + 4];
        for (to, from) in config.iter_mut().zip(self.shared.tag.bytes().take(TAG)) {
            *to = from;
        }
        config[TAG..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&self, _: u64) {
        self.shared.go_on();
    }

    fn notify(&self, queue: u16) {
        self.shared.go_on();
        if let Some(port) = self.shared.port.get() {
            self.shared.send(port, queue);
        }
    }

    fn stop(&self, _: Option<u16>, saving: bool) {
        // No chains are held that may wait for ever: requests on their way are answered soon.
        if saving {
            lock(&self.shared.requests).stopped = true;
        }
    }
}
