//! A port's end on the host as a Unix socket: programs connect to it, one at a time, and others wait for their turn.
//!
//! The guest is told when somebody has come or gone. What a program has sent before it went still reaches the guest, and what is for
//! a program that is gone reaches nobody. One that only says that it has no more to send stays connected, for the answer: a port
//! cannot be half closed.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::ports::Ports;
use crate::device::lock;
use crate::serial::{SerialOutput, Wakers};

/// Bytes that wait for the guest, at most.
const BUFFER: usize = 32 << 10;
/// Buffers read for one port before others have their turn.
const BATCH: usize = 16;
/// How long to wait before connections are taken again when the host has no descriptor for one.
const PATIENCE: Duration = Duration::from_millis(100);

/// Wakes a thread that waits for descriptors, and tells it to end.
pub(super) struct Wake {
    event: OwnedFd,
    quit: AtomicBool,
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

impl Wake {
    fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, quit: AtomicBool::new(false) })
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    pub(super) fn end(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.ring();
    }
}

/// A socket that waits for programs of the host. Its file goes with it.
pub struct PortSocket {
    path: PathBuf,
    listener: UnixListener,
    peer: Mutex<Peer>,
    wakers: Wakers,
    /// The thread that waits for programs and for what they bring.
    thread: OnceLock<Arc<Wake>>,
}

impl fmt::Debug for PortSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PortSocket({})", self.path.display())
    }
}

/// The program that is connected.
#[derive(Debug, Default)]
struct Peer {
    stream: Option<Arc<UnixStream>>,
    /// It takes nothing more now, and the thread waits until it does.
    blocked: bool,
    /// It takes nothing any more.
    deaf: bool,
}

impl PortSocket {
    /// A socket that listens already, at `path`.
    ///
    /// # Errors
    /// The host cannot make it non-blocking.
    pub fn new(listener: UnixListener, path: PathBuf) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (peer, wakers, thread) = (Mutex::default(), Wakers::default(), OnceLock::new());
        Ok(Self { path, listener, peer, wakers, thread })
    }
}

impl Drop for PortSocket {
    fn drop(&mut self) {
        // Not when the process is killed; the next one finds that nobody listens there.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl SerialOutput for PortSocket {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut peer = lock(&self.peer);
        let Some(stream) = peer.stream.as_deref().filter(|_| !peer.deaf) else { return bytes.len() };
        let sent = match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => sent,
            // No memory for it now is as good as no room.
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => 0,
            Err(_) => {
                peer.deaf = true;
                bytes.len()
            }
        };
        peer.blocked = sent < bytes.len();
        if peer.blocked
            && let Some(thread) = self.thread.get()
        {
            thread.ring();
        }
        sent
    }

    fn on_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        self.wakers.add(wake);
    }
}

/// Starts the thread of a device's sockets, each given with the number of its port. [`Ports::end`] ends it.
pub(super) fn start(ports: Arc<Ports>, sockets: Vec<(usize, Arc<PortSocket>)>) -> io::Result<JoinHandle<()>> {
    let thread = Arc::new(Wake::new()?);
    let _ = ports.thread.set(Arc::clone(&thread));
    for (id, socket) in &sockets {
        let _ = socket.thread.set(Arc::clone(&thread));
        let thread = Arc::clone(&thread);
        ports.on_room(*id, Box::new(move || thread.ring()));
    }
    let of_thread = move || {
        let mut ends: Vec<End> = sockets.into_iter().map(|(id, socket)| End::new(id, socket)).collect();
        work(&ports, &thread, &mut ends);
    };
    std::thread::Builder::new().name("ports".to_owned()).spawn(of_thread)
}

/// A socket, as the thread has it.
struct End {
    id: usize,
    socket: Arc<PortSocket>,
    buffer: Vec<u8>,
    /// The part of the buffer that the guest has not taken.
    waiting: std::ops::Range<usize>,
    /// The program has sent all that it will.
    ended: bool,
    /// The program is gone.
    gone: bool,
}

impl End {
    fn new(id: usize, socket: Arc<PortSocket>) -> Self {
        Self { id, socket, buffer: vec![0; BUFFER], waiting: 0..0, ended: false, gone: false }
    }

    /// What to wait for, if anything.
    fn wanted(&self) -> Option<PollFlags> {
        let peer = lock(&self.socket.peer);
        if peer.stream.is_none() {
            return Some(PollFlags::IN);
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.waiting.is_empty() && !self.ended);
        flags.set(PollFlags::OUT, peer.blocked && !peer.deaf);
        // That a program has gone would be told again and again.
        (!flags.is_empty() || !self.gone).then_some(flags)
    }

    fn serve(&mut self, ports: &Ports, ready: PollFlags) {
        let mut peer = lock(&self.socket.peer);
        if peer.stream.is_none() {
            if ready.is_empty() {
                return;
            }
            match self.socket.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    *peer = Peer { stream: Some(Arc::new(stream)), ..Peer::default() };
                    drop(peer);
                    (self.ended, self.gone) = (false, false);
                    ports.connect(self.id, true);
                }
                Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    drop(peer);
                    std::thread::sleep(PATIENCE);
                }
                _ => {}
            }
            return;
        }
        self.gone |= ready.intersects(PollFlags::HUP | PollFlags::ERR);
        let room = peer.blocked && ready.intersects(PollFlags::OUT | PollFlags::HUP | PollFlags::ERR);
        peer.blocked &= !room;
        drop(peer);
        if room {
            self.socket.wakers.call();
        }
        self.bring(ports);
        if self.ended && self.gone && self.waiting.is_empty() {
            *lock(&self.socket.peer) = Peer::default();
            ports.connect(self.id, false);
        }
    }

    /// Brings what the program has sent to the guest, until one of them has no more or no room.
    fn bring(&mut self, ports: &Ports) {
        for _ in 0..BATCH {
            if self.waiting.is_empty() {
                self.fill();
            }
            let bytes = self.buffer.get(self.waiting.clone()).unwrap_or_default();
            if bytes.is_empty() {
                return;
            }
            self.waiting.start += ports.receive(self.id, bytes);
            if !self.waiting.is_empty() {
                return;
            }
        }
    }

    fn fill(&mut self) {
        if self.ended {
            return;
        }
        let peer = lock(&self.socket.peer);
        let Some(mut stream) = peer.stream.as_deref() else { return };
        match stream.read(&mut self.buffer) {
            Ok(0) => self.ended = true,
            Ok(read) => self.waiting = 0..read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => (self.ended, self.gone) = (true, true),
        }
    }
}

fn work(ports: &Ports, thread: &Wake, ends: &mut [End]) {
    while !thread.quit.load(Ordering::SeqCst) {
        let Ok(ready) = wait(thread, ends) else {
            // The host cannot wait: without sockets, but the machine goes on.
            return;
        };
        for (end, ready) in ends.iter_mut().zip(ready) {
            end.serve(ports, ready);
        }
    }
}

/// Waits until something can be done: what each end is ready for.
fn wait(thread: &Wake, ends: &[End]) -> io::Result<Vec<PollFlags>> {
    let streams: Vec<Option<Arc<UnixStream>>> =
        ends.iter().map(|end| lock(&end.socket.peer).stream.clone()).collect();
    let mut fds = vec![PollFd::new(&thread.event, PollFlags::IN)];
    let mut places = Vec::with_capacity(ends.len());
    for (end, stream) in ends.iter().zip(&streams) {
        let wanted = end.wanted();
        places.push(wanted.map(|_| fds.len()));
        if let Some(flags) = wanted {
            let fd = stream.as_ref().map_or_else(|| end.socket.listener.as_fd(), |stream| stream.as_fd());
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        }
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if fds.first().is_some_and(|fd| !fd.revents().is_empty()) {
        let _ = rustix::io::read(&thread.event, &mut [0; 8]);
    }
    let ready = |place: Option<usize>| place.and_then(|place| fds.get(place)).map(PollFd::revents);
    Ok(places.into_iter().map(|place| ready(place).unwrap_or(PollFlags::empty())).collect())
}
