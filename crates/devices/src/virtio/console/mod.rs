//! The console device (5.3): a terminal, or named ports, each a stream of bytes both ways.
//!
//! The guest's bytes go straight to whoever takes them on the host ([`SerialOutput`]), on the vCPU's thread. Where that has no room
//! the chain goes back into the queue and is taken again when there is some. Bytes for the guest go straight into receive chains, on
//! the thread of whoever has them ([`SerialInput`]); where there are no chains, the source is told to wait. So nothing is buffered
//! here, and whoever is slow holds the other side back. Linux waits in a loop until its console's output has been taken: a guest whose
//! console nobody reads stands still then, and loses nothing.
//!
//! A device has a console, which is port 0, or named ports from number 1 on, or both. Named ports need control messages ([`control`]),
//! which also tell the size of a console in a device that has both. Linux reads its two fields in one order in some versions and in
//! the other in others; the configuration's are read in the specification's by all, but only in a device without named
//! ports. So whoever needs both makes two devices.
//!
//! The driver is told of a new size only when its console is sure to be up: Linux looks for the console when it is told, and crashes if it
//! has not got that far. For the same reason input waits for a moment after the driver's first output.
//!
//! Ports at a Unix socket ([`socket`]) have one thread for all, which waits for connections and for what they bring.

mod control;
mod ports;
mod reminder;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use ringfence_engine::StateError;
use serde::{Deserialize, Serialize};

use self::control::{PortState, Role};
use self::ports::{Channel, Ports};
pub use self::socket::PortSocket;
use super::{Kind, Port, VirtioDevice, read_bytes};
use crate::device::{invalid, lock};
use crate::serial::{SerialInput, SerialOutput};

const DEVICE_TYPE: u16 = 3;
/// Base class 07 (simple communication), subclass 80 (other).
const CLASS: u32 = 0x07_8000;
/// Entries of each queue.
const QUEUE: u16 = 64;
/// Named ports of a device at most. Linux refuses devices with many more queues.
pub const MOST_PORTS: usize = 30;

/// Feature bits (5.3.3).
mod feature {
    pub(super) const SIZE: u64 = 1 << 0;
    pub(super) const MULTIPORT: u64 = 1 << 1;
    pub(super) const EMERGENCY_WRITE: u64 = 1 << 2;
}

/// Offset of the field for emergency writes (5.3.4).
const EMERGENCY: u64 = 8;

/// The size of a terminal, in characters; zeroes where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A named port.
#[derive(Debug)]
pub struct PortConfig {
    /// Its name in the guest: `/dev/virtio-ports/NAME` in Linux.
    pub name: String,
    /// What is at its other end.
    pub end: PortEnd,
}

/// What is at the host's end of a port.
pub enum PortEnd {
    /// Something that takes what the guest writes, and is always there.
    Output(Arc<dyn SerialOutput>),
    /// A Unix socket that programs of the host connect to, one at a time.
    Socket(PortSocket),
}

/// How a console device is made.
#[derive(Default)]
pub struct ConsoleConfig {
    /// Where the console's output goes, if the device has a console.
    pub console: Option<Arc<dyn SerialOutput>>,
    /// The console's size.
    pub size: Size,
    /// Named ports.
    pub ports: Vec<PortConfig>,
}

impl std::fmt::Debug for PortEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Output(_) => f.write_str("Output"),
            Self::Socket(socket) => socket.fmt(f),
        }
    }
}

impl std::fmt::Debug for ConsoleConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConsoleConfig(console: {}, ports: {:?})", self.console.is_some(), self.ports)
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Which ports there are.
    names: Vec<String>,
    ports: Vec<PortState>,
    /// By port, bytes of the next chain that are out already.
    sent: Vec<u64>,
}

/// A console device.
#[derive(Debug)]
pub struct Console {
    ports: Arc<Ports>,
    threads: Vec<JoinHandle<()>>,
}

impl Console {
    /// A device with the ports of `config`, and if some are at sockets, its thread.
    ///
    /// # Errors
    /// The host has no descriptor or no thread left.
    pub fn new(config: ConsoleConfig) -> io::Result<Self> {
        let mut channels = vec![Channel::new(config.console.clone())];
        let mut roles = vec![if config.console.is_some() { Role::Console } else { Role::Missing }];
        let mut sockets = Vec::new();
        for port in config.ports.into_iter().take(MOST_PORTS) {
            let output = match port.end {
                PortEnd::Output(output) => output,
                PortEnd::Socket(socket) => {
                    let socket = Arc::new(socket);
                    sockets.push((channels.len(), Arc::clone(&socket)));
                    socket
                }
            };
            channels.push(Channel::new(Some(output)));
            roles.push(Role::Named(port.name));
        }
        let ports = Arc::new(Ports::new(channels, roles, config.size));
        for (id, channel) in ports.channels.iter().enumerate() {
            let weak = Arc::downgrade(&ports);
            channel.on_output_room(move || {
                if let Some(ports) = weak.upgrade() {
                    ports.transmit(id);
                }
            });
            if !sockets.iter().any(|(at_socket, _)| *at_socket == id) {
                lock(&ports.control).connect_for_good(id);
            }
        }
        let mut console = Self { ports: Arc::clone(&ports), threads: Vec::new() };
        if ports.reminder.is_some() {
            console.threads.push(reminder::start(Arc::clone(&ports))?);
        }
        if !sockets.is_empty() {
            console.threads.push(socket::start(ports, sockets)?);
        }
        Ok(console)
    }

    /// The console's end for input.
    pub fn input(&self) -> Arc<dyn SerialInput> {
        Arc::clone(&self.ports) as _
    }

    fn has_console(&self) -> bool {
        self.ports.channels.first().is_some_and(Channel::exists)
    }

    fn has_named_ports(&self) -> bool {
        self.ports.channels.len() > 1
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.ports.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        let console = if self.has_console() { feature::SIZE | feature::EMERGENCY_WRITE } else { 0 };
        let named = if self.has_named_ports() { feature::MULTIPORT } else { 0 };
        // Two of the first port, two for control, and two of each further one (5.3.2).
        let queues = if self.has_named_ports() { 2 + 2 * self.ports.channels.len() } else { 2 };
        Kind { id: DEVICE_TYPE, class: CLASS, features: console | named, queues: vec![QUEUE; queues] }
    }

    fn connect(&self, port: Port) {
        // Called once.
        let _ = self.ports.port.set(port);
    }

    /// `struct virtio_console_config` (5.3.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.ports.size();
        let mut config = [size.columns, size.rows].map(u16::to_le_bytes).concat();
        config.extend((self.ports.channels.len() as u32).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    /// A character that is to be seen even if nothing else works (5.3.6.2.1). If there is no room for it, it is lost.
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (EMERGENCY, [byte, ..], Some(console)) = (offset, data, self.ports.channels.first()) {
            console.write(&[*byte]);
        }
    }

    fn activate(&self, features: u64) {
        *lock(&self.ports.stopped) = false;
        self.ports.multiport.store(features & feature::MULTIPORT != 0, Ordering::SeqCst);
        self.ports.begin();
    }

    fn notify(&self, queue: u16) {
        if std::mem::take(&mut *lock(&self.ports.stopped)) {
            self.ports.go_on();
        }
        self.ports.notify(queue);
    }

    fn stop(&self, queue: Option<u16>, saving: bool) {
        // No chains are held.
        if saving {
            *lock(&self.ports.stopped) = true;
            self.ports.remind();
        } else {
            self.ports.forget(queue);
        }
    }

    fn save(&self) -> serde_json::Value {
        let sent = self.ports.channels.iter().map(Channel::sent).collect();
        let control = lock(&self.ports.control);
        let saved = Saved { names: control.names(), ports: control.save(), sent };
        serde_json::to_value(saved).unwrap_or_default()
    }

    fn restore(&self, name: &str, state: &serde_json::Value) -> Result<(), StateError> {
        let saved =
            Saved::deserialize(state).map_err(|_| invalid(name, "it has no state of a console device"))?;
        let mut control = lock(&self.ports.control);
        if saved.names != control.names() || saved.sent.len() != self.ports.channels.len() {
            return Err(invalid(name, format!("it has other ports: {}", saved.names.join(", "))));
        }
        if !control.restore(saved.ports) {
            return Err(invalid(name, "its ports cannot be in such a state"));
        }
        drop(control);
        for (channel, sent) in self.ports.channels.iter().zip(saved.sent) {
            channel.set_sent(sent);
        }
        Ok(())
    }
}
