//! What devices have in common whose other side is a process of its own: the link to it, and a thread that waits for it.

use std::io::{self, IoSlice};
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ringfence_helper::{Link, RingError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// A link that has something to read, or that is gone, which reading tells.
pub(super) const READABLE: PollFlags = PollFlags::IN.union(PollFlags::HUP).union(PollFlags::ERR);
/// A link that has room, or that is gone, which sending tells.
pub(super) const WRITABLE: PollFlags = PollFlags::OUT.union(PollFlags::HUP).union(PollFlags::ERR);

/// A link, and the way to wake the thread that waits for it.
#[derive(Debug)]
pub(super) struct Line {
    link: Link,
    wake: OwnedFd,
    up: AtomicBool,
    quit: AtomicBool,
}

impl Line {
    /// A link whose other end is there.
    ///
    /// # Errors
    /// No descriptors left.
    pub(super) fn new(link: Link) -> io::Result<Self> {
        Ok(Self {
            link,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            up: AtomicBool::new(true),
            quit: AtomicBool::new(false),
        })
    }

    /// Has [`Line::wait`] return.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Sends a message, whole or not at all, without waiting.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub(super) fn send(&self, message: &[u8]) -> io::Result<()> {
        self.link.send(&[IoSlice::new(message)])
    }

    /// Receives a message, without waiting. `None` when the other end is closed.
    ///
    /// # Errors
    /// As [`Link::receive`].
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.link.receive(buffer, false)
    }

    /// The rule of the link that the other end has broken, if it has.
    pub(super) fn fault(&self) -> Option<RingError> {
        self.link.fault()
    }

    /// Whether the other end is not known to be gone.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    /// Notes that the other end is gone. Whether that is news.
    pub(super) fn take_down(&self) -> bool {
        self.up.swap(false, Ordering::SeqCst)
    }

    /// Whether the device is going away.
    pub(super) fn is_ending(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    /// Waits until somebody wakes the thread or the link is ready for what is `wanted` of it: what it is ready for. A link that
    /// is down is not looked at: it would be ready all the time.
    ///
    /// # Errors
    /// The host cannot wait.
    pub(super) fn wait(&self, wanted: PollFlags) -> io::Result<PollFlags> {
        if !self.is_up() {
            return self.sleep(None, false);
        }
        self.link.wait(wanted, |watched, at_once| self.sleep(Some(watched), at_once))
    }

    /// Waits until somebody wakes the thread or, if it is `watched` for something, for the link's socket: what that is ready for.
    fn sleep(&self, watched: Option<PollFlags>, at_once: bool) -> io::Result<PollFlags> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.link.as_fd(), watched.unwrap_or(PollFlags::empty())),
        ];
        let fds = if watched.is_some() { &mut fds[..] } else { &mut fds[..1] };
        match poll(fds, at_once.then_some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        Ok(fds.get(1).map_or(PollFlags::empty(), PollFd::revents))
    }
}

/// What a device has that is on a line.
pub(super) trait OnLine: Send + Sync + 'static {
    /// The line.
    fn line(&self) -> &Line;
    /// What the device's thread does until [`Line::is_ending`].
    fn work(&self);
}

/// What a device shares with its thread, which ends with it.
#[derive(Debug)]
pub(super) struct Threaded<T: OnLine> {
    shared: Arc<T>,
    thread: Option<JoinHandle<()>>,
}

impl<T: OnLine> Threaded<T> {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(super) fn start(name: &str, shared: T) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || worker.work())?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl<T: OnLine> Deref for Threaded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.shared
    }
}

impl<T: OnLine> Drop for Threaded<T> {
    fn drop(&mut self) {
        let line = self.shared.line();
        line.quit.store(true, Ordering::SeqCst);
        line.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
