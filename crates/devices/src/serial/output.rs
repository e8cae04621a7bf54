//! Where a serial port's output goes.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::device::lock;

/// The receiving end of a serial port's transmitter.
pub trait SerialOutput: Send + Sync {
    /// Takes as many of `bytes` as there is room for and returns how many. Must not block: it is called on a
    /// vCPU's thread with the port locked.
    fn write(&self, bytes: &[u8]) -> usize;
    /// Registers what to call, with no lock of the output held, when there is room again after [`write`] took
    /// less than all. All that are registered are called.
    ///
    /// [`write`]: SerialOutput::write
    fn on_room(&self, wake: Box<dyn Fn() + Send + Sync>);
}

/// Who is to be called when there is room.
#[derive(Default)]
pub(crate) struct Wakers(Mutex<Vec<Arc<dyn Fn() + Send + Sync>>>);

impl Wakers {
    pub(crate) fn add(&self, wake: Box<dyn Fn() + Send + Sync>) {
        lock(&self.0).push(wake.into());
    }

    /// Calls them, with no lock held.
    pub(crate) fn call(&self) {
        let wakers = lock(&self.0).clone();
        wakers.iter().for_each(|wake| wake());
    }
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Bytes that the thread has taken out and not written yet.
    in_flight: bool,
    refused: bool,
    closed: bool,
    error: Option<io::ErrorKind>,
}

struct Shared {
    capacity: usize,
    queue: Mutex<Queue>,
    changed: Condvar,
    wakers: Wakers,
}

/// Output through a bounded buffer and a thread of its own, so that a slow or stopped reader (a terminal after
/// Ctrl-S, a full pipe) holds up that thread and never a vCPU. When the buffer is full, the guest sees a
/// transmitter that does not empty. After a write error everything is thrown away, so the guest runs on.
pub struct BufferedOutput {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for BufferedOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BufferedOutput {{ waiting: {} bytes }}", lock(&self.shared.queue).bytes.len())
    }
}

impl BufferedOutput {
    /// Starts the thread that writes to `writer`. `capacity` is in bytes. The thread ends, having written what
    /// waits, when the output is dropped; it is not waited for.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn new(writer: impl Write + Send + 'static, capacity: usize) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            capacity: capacity.max(1),
            queue: Mutex::default(),
            changed: Condvar::new(),
            wakers: Wakers::default(),
        });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("serial-out".into()).spawn(move || of_thread.run(writer))?;
        Ok(Arc::new(Self { shared }))
    }

    /// Waits until everything is written, at most for `timeout`. Returns whether it was.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut queue = lock(&self.shared.queue);
        while !queue.bytes.is_empty() || queue.in_flight {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The error that made the output give up, if one did.
    pub fn error(&self) -> Option<io::ErrorKind> {
        lock(&self.shared.queue).error
    }
}

impl Drop for BufferedOutput {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.changed.notify_all();
    }
}

impl SerialOutput for BufferedOutput {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut queue = lock(&self.shared.queue);
        if queue.error.is_some() {
            return bytes.len();
        }
        let taken = bytes.len().min(self.shared.capacity.saturating_sub(queue.bytes.len()));
        let idle = queue.bytes.is_empty();
        queue.bytes.extend(bytes.iter().take(taken));
        queue.refused |= taken < bytes.len();
        drop(queue);
        if idle {
            self.shared.changed.notify_all();
        }
        taken
    }

    fn on_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        self.shared.wakers.add(wake);
    }
}

impl Shared {
    /// The thread: takes everything that waits, writes it, tells who wants to know.
    fn run(&self, mut writer: impl Write) {
        let mut bytes = Vec::new();
        loop {
            let mut queue = lock(&self.queue);
            queue.in_flight = false;
            self.changed.notify_all();
            while queue.bytes.is_empty() {
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            bytes.clear();
            std::mem::swap(&mut bytes, &mut queue.bytes);
            queue.in_flight = true;
            let refused = std::mem::take(&mut queue.refused);
            drop(queue);
            if refused {
                self.tell();
            }
            if let Err(error) = writer.write_all(&bytes).and_then(|()| writer.flush()) {
                let mut queue = lock(&self.queue);
                queue.error = Some(error.kind());
                queue.bytes.clear();
                queue.in_flight = false;
                drop(queue);
                self.changed.notify_all();
                self.tell();
                return;
            }
        }
    }

    fn tell(&self) {
        self.wakers.call();
    }
}
