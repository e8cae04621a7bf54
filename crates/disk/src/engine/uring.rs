//! One thread that owns an io_uring and keeps many operations in flight.
//!
//! Submission is by queue and event rather than from the callers' threads: completions of direct I/O interrupt the
//! thread that submitted them, and a vCPU's thread is to be left alone.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use io_uring::{IoUring, opcode, squeue, types::Fd, types::FsyncFlags};

use super::{Engine, FileOp, Running, Started, Task};
use crate::{ThreadHook, sys};

/// Operations in flight at most; more wait in the queue.
const DEPTH: usize = 128;
/// Marks the completion of the poll that waits for the event.
const WAKE: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Queue {
    tasks: VecDeque<Task>,
    stop: bool,
}

#[derive(Debug)]
pub(crate) struct Uring {
    queue: Mutex<Queue>,
    event: File,
    /// Set while the thread may be asleep, so that a busy one costs no system call.
    asleep: AtomicBool,
}

impl Uring {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // The counter cannot overflow by single steps, so the write cannot fail.
            let _ = (&self.event).write_all(&1_u64.to_ne_bytes());
        }
    }
}

/// Makes the ring and its thread, which calls `hook` when it has its ring.
///
/// # Errors
/// The kernel's reason if it denies io_uring or lacks an operation.
pub(crate) fn start(hook: Option<&ThreadHook>) -> io::Result<Started> {
    let uring =
        Arc::new(Uring { queue: Mutex::default(), event: sys::event()?, asleep: AtomicBool::new(false) });
    let last = Arc::clone(&uring);
    let mut running = Running::new(move || {
        last.lock().stop = true;
        last.asleep.store(true, Ordering::SeqCst);
        last.wake();
    });
    let (sender, receiver) = mpsc::sync_channel(1);
    let (for_thread, hook) = (Arc::clone(&uring), hook.cloned());
    let body = move || match ring() {
        Ok(ring) => {
            if let Some(hook) = hook {
                hook();
            }
            // The maker waits for this message.
            let _ = sender.send(Ok(()));
            Worker::new(&for_thread, ring).run();
        }
        Err(e) => {
            let _ = sender.send(Err(e));
        }
    };
    running.spawn("disk-uring", None, body)?;
    match receiver.recv() {
        Ok(Ok(())) => Ok((uring, running)),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(io::Error::other("the thread ended early")),
    }
}

/// A ring for one thread; the flags for that are of Linux 6.1, and older kernels do without.
fn ring() -> io::Result<IoUring> {
    let entries = DEPTH as u32 + 1;
    let new = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries);
    let ring = new.or_else(|_| IoUring::new(entries))?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    // NODROP: completions that find no room are kept, so that none is ever lost.
    if ring.params().is_feature_nodrop() && needed.iter().all(|code| probe.is_supported(*code)) {
        Ok(ring)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }
}

/// A task the kernel works on, and what it may look at meanwhile.
#[derive(Debug)]
struct Slot {
    task: Task,
    vectors: Vec<libc::iovec>,
}

struct Worker<'a> {
    shared: &'a Uring,
    ring: IoUring,
    /// Boxed, so that growth does not move them.
    slots: Vec<Option<Box<Slot>>>,
    free: Vec<usize>,
    ready: VecDeque<Task>,
    /// Whether the ring waits for the event.
    armed: bool,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Uring, ring: IoUring) -> Self {
        Self {
            shared,
            ring,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            ready: VecDeque::new(),
            armed: false,
        }
    }

    fn run(mut self) {
        loop {
            self.arm();
            // From here on a task that `take` does not see makes the event, and so ends the wait below.
            self.shared.asleep.store(true, Ordering::SeqCst);
            let stop = self.take();
            self.start();
            let idle = self.free.len() == DEPTH && self.ready.is_empty();
            if stop && idle {
                break;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => (),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => (),
                Err(e) => return self.fail(&e),
            }
            self.shared.asleep.store(false, Ordering::SeqCst);
            self.reap();
        }
    }

    /// Takes over what was submitted. Returns whether the engine is to end.
    fn take(&mut self) -> bool {
        let mut queue = self.shared.lock();
        self.ready.append(&mut queue.tasks);
        queue.stop
    }

    /// Has the ring wait for the event.
    fn arm(&mut self) {
        if !self.armed {
            let event = Fd(self.shared.event.as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).build().user_data(WAKE);
            // SAFETY: the entry refers to no memory.
            self.armed = unsafe { self.ring.submission().push(&poll) }.is_ok();
        }
    }

    /// Puts ready tasks on the ring while there are free slots.
    fn start(&mut self) {
        while let Some(task) = self.ready.pop_front() {
            let Some(index) = self.free.pop() else {
                self.ready.push_front(task);
                return;
            };
            let vectors = match &task.op {
                FileOp::Read { buffers, .. } | FileOp::Write { buffers, .. } => {
                    buffers.io_vectors(task.position().1, sys::MAX_VECTORS)
                }
                FileOp::Sync | FileOp::Allocate { .. } => Vec::new(),
            };
            let slot = Box::new(Slot { task, vectors });
            let entry = entry(&slot).user_data(index as u64);
            if let Some(place) = self.slots.get_mut(index) {
                *place = Some(slot);
            }
            // SAFETY: file, vectors and buffers stay in the slot until the kernel has completed the entry.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            // The ring has an entry for every slot and one for the event; it is never full.
            debug_assert!(pushed.is_ok(), "the submission ring has room for every slot");
        }
    }

    /// Takes completions and runs their callbacks.
    fn reap(&mut self) {
        let done: Vec<(u64, i32)> = self.ring.completion().map(|c| (c.user_data(), c.result())).collect();
        for (index, result) in done {
            if index == WAKE {
                self.armed = false;
                // Resets the counter, which is not zero, or the poll would not have ended.
                let _ = (&self.shared.event).read(&mut [0; 8]);
                continue;
            }
            let Some(slot) = self.slots.get_mut(index as usize).and_then(Option::take) else { continue };
            self.free.push(index as usize);
            let result = match usize::try_from(result) {
                Ok(n) => Ok(n),
                Err(_) if result == -libc::EAGAIN => Err(io::Error::from(io::ErrorKind::Interrupted)),
                Err(_) => Err(io::Error::from_raw_os_error(-result)),
            };
            if let Some(task) = slot.task.advance(result) {
                self.ready.push_back(task);
            }
        }
    }

    /// The kernel takes no more: everything not yet in its hands fails. What it has may still be written to, so
    /// it is never freed.
    fn fail(mut self, error: &io::Error) {
        let again = || Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)));
        self.slots.drain(..).for_each(std::mem::forget);
        std::mem::forget(self.ring);
        self.ready.drain(..).for_each(|task| task.finish(again()));
        loop {
            let mut queue = self.shared.lock();
            let (stop, task) = (queue.stop, queue.tasks.pop_front());
            drop(queue);
            match task {
                Some(task) => task.finish(again()),
                None if stop => return,
                None => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
    }
}

fn entry(slot: &Slot) -> squeue::Entry {
    let Slot { task, vectors } = slot;
    let fd = Fd(task.file.as_raw_fd());
    let (at, _) = task.position();
    let (pointer, number) = (vectors.as_ptr(), vectors.len() as u32);
    match &task.op {
        FileOp::Read { .. } => opcode::Readv::new(fd, pointer, number).offset(at).build(),
        FileOp::Write { durable, .. } => {
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, pointer, number).offset(at).rw_flags(flags).build()
        }
        FileOp::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        FileOp::Allocate { mode, len } => {
            opcode::Fallocate::new(fd, *len).offset(task.offset).mode(*mode).build()
        }
    }
}

impl Engine for Uring {
    fn submit(&self, task: Task) {
        self.lock().tasks.push_back(task);
    }

    fn kick(&self) {
        self.wake();
    }
}
