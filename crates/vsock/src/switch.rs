//! All connections of a guest, and what is sent to it when.
//!
//! Everything that comes in is dealt with at once; everything that goes to the guest waits for its turn ([`Switch::pump`]): answers
//! to strays, then connections in a circle, a packet of data each. While the link has no room nothing is read from the
//! host, and from the guest only as long as answers to strays can be kept.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use ringfence_helper::{Link, listen};
use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::connection::{Connection, Due, Phase};
use crate::error::VsockError;
use crate::spec::VsockSpec;
use crate::wire::{ACTIVE, HOST, Header, MAX_DATA, STREAM, op};

/// Connections of a guest at once.
pub const MOST: usize = 1024;
/// Answers to packets that belong to no connection.
const STRAYS: usize = 256;
/// The first line of a program of the host, with its end, at most.
const LONGEST_GREETING: usize = 32;
/// Ports of the host's side for connections that come from there begin here: below are those that programs ask for.
const FIRST_PORT: u32 = 1 << 30;
/// What the event queue calls the link and the socket; connections come behind.
pub(crate) const LINK: u64 = 0;
pub(crate) const LISTENER: u64 = 1;

/// A guest's connections.
#[derive(Debug)]
pub(crate) struct Switch {
    guest: u64,
    socket: PathBuf,
    pub(crate) link: Link,
    listener: UnixListener,
    pub(crate) epoll: OwnedFd,
    connections: HashMap<u64, Connection>,
    /// By the guest's port and the host's.
    by_ports: HashMap<(u32, u32), u64>,
    queue: VecDeque<u64>,
    strays: VecDeque<Header>,
    next: u64,
    next_port: u32,
    /// The guest's driver is there.
    active: bool,
    /// A message for which the link had no room. Nothing else is sent before it.
    stuck: Option<Vec<u8>>,
    buffer: Vec<u8>,
    /// What the link is watched for: something to read, room.
    watched: (bool, bool),
}

impl Switch {
    /// A guest at the other end of `link`, whose driver is not there yet.
    pub(crate) fn new(link: Link, spec: &VsockSpec) -> Result<Self, VsockError> {
        let listener = listen(&spec.socket)
            .map_err(|source| VsockError::Listen { socket: spec.socket.clone(), source })?;
        let host = |error: rustix::io::Errno| VsockError::Host(error.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host)?;
        for (fd, token) in [(link.as_fd(), LINK), (listener.as_fd(), LISTENER)] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN).map_err(host)?;
        }
        Ok(Self {
            guest: spec.cid.into(),
            socket: spec.socket.clone(),
            link,
            listener,
            epoll,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            queue: VecDeque::new(),
            strays: VecDeque::new(),
            next: LISTENER + 1,
            next_port: FIRST_PORT,
            active: false,
            stuck: None,
            buffer: vec![0; MAX_DATA],
            watched: (true, false),
        })
    }

    /// Whether more can be taken from the guest.
    pub(crate) fn reads(&self) -> bool {
        self.strays.len() < STRAYS
    }

    /// Watches the link for what is wanted of it now.
    pub(crate) fn watch_link(&mut self) {
        let wanted = (self.reads(), self.stuck.is_some());
        if wanted != self.watched {
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, wanted.0);
            flags.set(epoll::EventFlags::OUT, wanted.1);
            let _ = epoll::modify(&self.epoll, &self.link, epoll::EventData::new_u64(LINK), flags);
            self.watched = wanted;
        }
    }

    /// A message has come over the link.
    pub(crate) fn message(&mut self, bytes: &[u8]) {
        if let [state] = bytes {
            self.active = *state == ACTIVE;
            self.connections.clear();
            self.by_ports.clear();
            self.queue.clear();
            self.strays.clear();
            self.stuck = None;
        } else if let Some((header, data)) = Header::parse(bytes).filter(|_| self.active) {
            self.packet(&header, data);
        }
    }

    fn packet(&mut self, header: &Header, data: &[u8]) {
        // In somebody else's name there is nobody to answer to.
        if header.from_cid != self.guest {
            return;
        }
        let ports = (header.from_port, header.to_port);
        let known = self.by_ports.get(&ports).copied();
        let found = known.and_then(|id| Some((id, self.connections.get_mut(&id)?)));
        match found {
            _ if header.to_cid != HOST || header.kind != STREAM => self.stray(header),
            Some((id, connection)) => {
                connection.credit(header);
                let open = connection.phase == Phase::Open;
                let right = match header.op {
                    op::RST => return self.ended_by_guest(id),
                    op::RESPONSE if connection.phase == Phase::Asked => {
                        connection.phase = Phase::Open;
                        connection.greet(&format!("OK {}\n", header.to_port));
                        true
                    }
                    op::RW => open && header.len as usize == data.len() && connection.push(data),
                    op::SHUTDOWN if open => {
                        connection.guest_ends(header.flags);
                        true
                    }
                    op::CREDIT_UPDATE => open,
                    op::CREDIT_REQUEST => {
                        connection.due.credit_update = true;
                        open
                    }
                    _ => false,
                };
                if !right {
                    connection.due = Due { reset: true, ..Due::default() };
                }
                self.enqueue(id);
            }
            None if header.op == op::REQUEST => self.open(header),
            None => self.stray(header),
        }
    }

    fn stray(&mut self, header: &Header) {
        if header.op != op::RST && self.strays.len() < STRAYS {
            self.strays.push_back(header.reset());
        }
    }

    /// The guest wants a port of the host.
    fn open(&mut self, header: &Header) {
        let stream = if self.connections.len() < MOST { self.connect(header.to_port) } else { None };
        let Some(stream) = stream else { return self.stray(header) };
        let mut connection = Connection::new(stream, Phase::Open, header.to_port, header.from_port);
        connection.credit(header);
        connection.due.response = true;
        self.add(connection);
    }

    /// Connects to the program that listens for a port of the host, without waiting.
    fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path.as_os_str()).ok()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
        connect(&socket, &address).ok()?;
        Some(socket.into())
    }

    fn add(&mut self, connection: Connection) {
        let id = self.next;
        self.next += 1;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let watched = epoll::add(&self.epoll, &connection.stream, epoll::EventData::new_u64(id), flags);
        if watched.is_err() {
            return;
        }
        if connection.phase != Phase::Greeting {
            self.by_ports.insert((connection.guest_port, connection.host_port), id);
        }
        self.connections.insert(id, connection);
        self.enqueue(id);
    }

    /// Programs of the host have connected.
    pub(crate) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            // One too many, or one for a guest that is not there, is closed.
            if self.active && self.connections.len() < MOST && stream.set_nonblocking(true).is_ok() {
                self.add(Connection::new(stream, Phase::Greeting, 0, 0));
            }
        }
    }

    /// A connection's socket has something to read, or has room.
    pub(crate) fn ready(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.readable = true;
        match connection.phase {
            Phase::Greeting => self.greeted(id),
            _ => {
                connection.write();
                self.enqueue(id);
            }
        }
    }

    /// Reads a program's first line, and nothing behind it.
    fn greeted(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut byte = [0];
        while connection.greeting.len() < LONGEST_GREETING {
            match connection.stream.read(&mut byte) {
                Ok(1) if byte != *b"\n" => connection.greeting.extend(byte),
                Ok(1) => break,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return drop(self.connections.remove(&id)),
            }
        }
        let text = str::from_utf8(&connection.greeting).unwrap_or_default();
        let port = text.trim_end_matches('\r').strip_prefix("CONNECT ").and_then(|port| port.parse().ok());
        let Some(port) = port.filter(|_| byte == *b"\n") else {
            self.connections.remove(&id);
            return;
        };
        // There are more ports than connections.
        while self.by_ports.contains_key(&(port, self.next_port)) {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        }
        (connection.guest_port, connection.host_port) = (port, self.next_port);
        connection.phase = Phase::Asked;
        connection.due.request = true;
        self.by_ports.insert((port, self.next_port), id);
        self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        self.enqueue(id);
    }

    fn ended_by_guest(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.by_ports.remove(&(connection.guest_port, connection.host_port));
        if !connection.abandon() {
            self.connections.remove(&id);
        }
    }

    fn enqueue(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id).filter(|connection| !connection.queued) {
            connection.queued = true;
            self.queue.push_back(id);
        }
    }

    /// Sends what there is to send, as far as the link has room.
    ///
    /// # Errors
    /// The other end of the link is gone.
    pub(crate) fn pump(&mut self) -> io::Result<()> {
        if let Some(message) = self.stuck.take() {
            self.send(&message, &[])?;
        }
        while self.stuck.is_none() {
            if let Some(header) = self.strays.pop_front() {
                self.send(&header.bytes(), &[])?;
                continue;
            }
            let Some(id) = self.queue.pop_front() else { break };
            let Some(mut connection) = self.connections.remove(&id) else { continue };
            connection.queued = false;
            let stays = self.serve(&mut connection);
            let ports = (connection.guest_port, connection.host_port);
            match stays {
                Ok((true, again)) => {
                    self.connections.insert(id, connection);
                    if again {
                        self.enqueue(id);
                    }
                }
                Ok((false, _)) => {
                    // Its ports may be another's already if the guest had ended it.
                    if self.by_ports.get(&ports) == Some(&id) {
                        self.by_ports.remove(&ports);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends one packet of a connection. Whether the connection stays, and whether there is more.
    fn serve(&mut self, connection: &mut Connection) -> io::Result<(bool, bool)> {
        if connection.orphan {
            return Ok((!connection.due.reset, false));
        }
        let reads = connection.may_read();
        let due = &mut connection.due;
        let next = [
            (&mut due.request, op::REQUEST),
            (&mut due.response, op::RESPONSE),
            (&mut due.credit_request, op::CREDIT_REQUEST),
        ]
        .into_iter()
        .find_map(|(flag, operation)| std::mem::take(flag).then_some(operation));
        if let Some(operation) = next {
            self.tell(connection, operation)?;
            return Ok((true, true));
        }
        if reads && !connection.due.reset {
            let len = (connection.window() as usize).min(MAX_DATA);
            let mut buffer = std::mem::take(&mut self.buffer);
            let got = connection.read(buffer.get_mut(..len).unwrap_or_default());
            let sent = if got > 0 {
                let header = Header { len: got as u32, ..connection.header(self.guest, op::RW) };
                connection.has_told();
                connection.due.credit_update = false;
                self.send(&header.bytes(), buffer.get(..got).unwrap_or_default())
            } else {
                Ok(())
            };
            self.buffer = buffer;
            return sent.map(|()| (true, true));
        }
        if std::mem::take(&mut connection.due.shutdown) {
            self.tell(connection, op::SHUTDOWN)?;
            connection.end_if_done();
            return Ok((true, true));
        }
        if connection.due.reset {
            self.tell(connection, op::RST)?;
            return Ok((false, false));
        }
        if std::mem::take(&mut connection.due.credit_update) {
            self.tell(connection, op::CREDIT_UPDATE)?;
        }
        Ok((true, false))
    }

    fn tell(&mut self, connection: &mut Connection, operation: u16) -> io::Result<()> {
        connection.has_told();
        connection.due.credit_update = false;
        self.send(&connection.header(self.guest, operation).bytes(), &[])
    }

    /// Sends a message, or keeps it until there is room.
    fn send(&mut self, head: &[u8], data: &[u8]) -> io::Result<()> {
        match self.link.send(&[IoSlice::new(head), IoSlice::new(data)]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.stuck = Some([head, data].concat());
                Ok(())
            }
            other => other,
        }
    }

    /// Connections, and what waits.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn kept(&self) -> (usize, usize) {
        (self.connections.len(), self.queue.len() + self.strays.len())
    }
}
