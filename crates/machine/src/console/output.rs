//! The guest's output, on its way to a file, pipe or terminal that may be slow, stuck or gone.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ringfence_devices::serial::{BufferedOutput, SerialOutput};

use super::Marks;

/// Bytes that may wait for the reader; the guest is held back beyond that.
const CAPACITY: usize = 256 << 10;

/// A console's output: through a thread of its own, so that no reader holds up a vCPU.
#[derive(Clone, Debug)]
pub struct ConsoleOutput {
    queue: Arc<BufferedOutput>,
    marks: Arc<Mutex<Marks>>,
}

impl ConsoleOutput {
    /// Starts a thread that writes to `sink`. If that fails (such as a pipe whose reader is gone), `on_closed` is
    /// called once, on that thread, and all further output is thrown away.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(
        sink: impl Write + Send + 'static,
        on_closed: impl FnOnce(&io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let marks: Arc<Mutex<Marks>> = Arc::default();
        let watched = Watched { sink, marks: Arc::clone(&marks), on_closed: Some(on_closed) };
        Ok(Self { queue: BufferedOutput::new(watched, CAPACITY)?, marks })
    }

    /// The guest's end.
    pub fn port(&self) -> Arc<dyn SerialOutput> {
        Arc::clone(&self.queue) as _
    }

    /// What of interest was seen in the output, and when.
    pub fn marks(&self) -> Marks {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until all output is written, unless the reader takes nothing for `patience`.
    pub fn finish(&self, patience: Duration) {
        loop {
            let before = self.marks().bytes;
            if self.queue.drain(patience) || self.queue.error().is_some() || self.marks().bytes == before {
                return;
            }
        }
    }
}

/// A sink whose passing bytes and first error are noted.
struct Watched<W, F> {
    sink: W,
    marks: Arc<Mutex<Marks>>,
    on_closed: Option<F>,
}

impl<W, F: FnOnce(&io::Error)> Watched<W, F> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::Interrupted
            && let Some(on_closed) = self.on_closed.take()
        {
            on_closed(error);
        }
        result
    }
}

impl<W: Write, F: FnOnce(&io::Error)> Write for Watched<W, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.sink.write(bytes);
        let written = self.note(result)?;
        let seen = bytes.get(..written).unwrap_or(bytes);
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).observe(seen);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.sink.flush();
        self.note(result)
    }
}

/// Takes everything and keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nowhere;

impl SerialOutput for Nowhere {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn on_room(&self, _wake: Box<dyn Fn() + Send + Sync>) {}
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    /// A sink that takes as many writes as there are permits.
    struct Gate {
        permits: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            self.seen.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_and_is_noted() {
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (permit, permits) = mpsc::channel();
        (0..10).for_each(|_| permit.send(()).unwrap());
        let output = ConsoleOutput::start(Gate { permits, seen: Arc::clone(&seen) }, |_| ()).unwrap();
        assert_eq!(output.port().write(b"hello\r\n# "), 9);
        output.finish(Duration::from_secs(5));
        assert_eq!(*seen.lock().unwrap(), b"hello\r\n# ");
        assert!(output.marks().prompt.is_some() && output.marks().bytes == 9);
    }

    #[test]
    fn stuck_reader_is_given_up_in_the_end() {
        let (_permit, permits) = mpsc::channel();
        let output = ConsoleOutput::start(Gate { permits, seen: Arc::default() }, |_| ()).unwrap();
        output.port().write(b"x");
        let start = Instant::now();
        output.finish(Duration::from_millis(50));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn closed_reader_is_told_once_and_the_guest_goes_on() {
        let (permit, permits) = mpsc::channel();
        drop(permit);
        let (told, closed) = mpsc::channel();
        let gate = Gate { permits, seen: Arc::default() };
        let output = ConsoleOutput::start(gate, move |error| told.send(error.kind()).unwrap()).unwrap();
        let port = output.port();
        port.write(b"a");
        assert_eq!(closed.recv_timeout(Duration::from_secs(5)), Ok(io::ErrorKind::BrokenPipe));
        output.finish(Duration::from_secs(5));
        assert_eq!(port.write(&vec![b'y'; 2 * CAPACITY]), 2 * CAPACITY);
    }
}
