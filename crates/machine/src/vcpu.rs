//! vCPU threads.
//!
//! Each vCPU lives on a thread of its own, which is a small state machine: it is paused, running or finished, and
//! requests reach it through a channel. A request to a running vCPU kicks it out of [`Vcpu::run`] first. No lock
//! is held while it runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringfence_engine::{CpuState, EngineError, GuestProfile, Kick, Vcpu, VmExit};

/// What a vCPU thread reports of its own accord.
#[derive(Debug)]
pub(crate) enum VcpuReport {
    /// The guest stopped itself; the vCPU is paused now.
    Stopped { exit: VmExit, state: Box<CpuState>, instructions: u64 },
    /// The thread is gone without having been asked: a bug of ours.
    Died,
}

/// Numbers about a vCPU.
#[derive(Clone, Debug, Default)]
pub struct VcpuStatistics {
    /// Instructions retired since power-on.
    pub instructions: u64,
    /// Processor time that its thread has used, on the guest and on devices.
    pub cpu_time: Duration,
    /// The engine's counters.
    pub counters: Vec<(&'static str, u64)>,
    /// Where its instructions were, if that was asked for.
    pub profile: Option<GuestProfile>,
}

enum Request {
    Run,
    Pause(Sender<()>),
    /// Back to the state after power-on, or to the given one.
    Reset(Option<Box<CpuState>>, Sender<Result<(), EngineError>>),
    State(Sender<Box<CpuState>>),
    Statistics(Sender<VcpuStatistics>),
    Finish,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Paused,
    Running,
    Finished,
}

/// A vCPU's thread as the rest of the machine sees it.
pub(crate) struct VcpuThread {
    requests: Sender<Request>,
    kick: Arc<dyn Kick>,
    thread: Option<JoinHandle<()>>,
}

/// A vCPU did not answer in time or its thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("vCPU does not answer")]
pub(crate) struct NoAnswer;

/// An answer that has not come yet.
pub(crate) struct Answer<T>(Receiver<T>);

impl<T> Answer<T> {
    pub(crate) fn wait(self) -> Result<T, NoAnswer> {
        self.0.recv_timeout(ANSWER_TIME).map_err(|_| NoAnswer)
    }
}

/// How long a vCPU may take to answer. A kick takes microseconds; only a stuck host makes it longer.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// How long a thread may take to end before it is left alone; it holds on to everything it uses.
const FAREWELL_TIME: Duration = Duration::from_secs(2);

impl VcpuThread {
    /// Starts the thread, paused. While `hold` is set, a vCPU that was kicked waits for the next request instead of
    /// entering the guest again. `report` is called on the thread.
    pub(crate) fn start(
        index: u32,
        vcpu: Box<dyn Vcpu>,
        hold: Arc<AtomicBool>,
        report: impl Fn(VcpuReport) + Send + 'static,
    ) -> io::Result<Self> {
        let (requests, inbox) = channel();
        let kick = vcpu.kick();
        let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
            let mut worker = Worker { vcpu, inbox, hold, farewell: Farewell { report, expected: false } };
            worker.work();
            worker.farewell.expected = true;
        })?;
        Ok(Self { requests, kick, thread: Some(thread) })
    }

    pub(crate) fn run(&self) -> Result<(), NoAnswer> {
        self.requests.send(Request::Run).map_err(|_| NoAnswer)
    }

    /// Asks the vCPU to leave the guest and stay outside. The answer comes when it has.
    pub(crate) fn begin_pause(&self) -> Result<Answer<()>, NoAnswer> {
        self.begin(Request::Pause)
    }

    pub(crate) fn reset(&self, state: Option<CpuState>) -> Result<Result<(), EngineError>, NoAnswer> {
        self.ask(|reply| Request::Reset(state.map(Box::new), reply))
    }

    pub(crate) fn state(&self) -> Result<Box<CpuState>, NoAnswer> {
        self.ask(Request::State)
    }

    pub(crate) fn statistics(&self) -> Result<VcpuStatistics, NoAnswer> {
        self.ask(Request::Statistics)
    }

    fn send(&self, request: Request) -> Result<(), NoAnswer> {
        self.requests.send(request).map_err(|_| NoAnswer)?;
        self.kick.kick();
        Ok(())
    }

    fn begin<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Result<Answer<T>, NoAnswer> {
        let (reply, answer) = channel();
        self.send(request(reply))?;
        Ok(Answer(answer))
    }

    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Result<T, NoAnswer> {
        self.begin(request)?.wait()
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let _ = self.send(Request::Finish);
        let until = Instant::now() + FAREWELL_TIME;
        while let Some(thread) = self.thread.take() {
            if thread.is_finished() {
                // A panic there has been reported already.
                let _ = thread.join();
            } else if Instant::now() < until {
                self.thread = Some(thread);
                thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

/// Reports a thread that ends without being asked, which happens only if it panics.
struct Farewell<F: Fn(VcpuReport)> {
    report: F,
    expected: bool,
}

impl<F: Fn(VcpuReport)> Drop for Farewell<F> {
    fn drop(&mut self) {
        if !self.expected {
            (self.report)(VcpuReport::Died);
        }
    }
}

struct Worker<F: Fn(VcpuReport)> {
    vcpu: Box<dyn Vcpu>,
    inbox: Receiver<Request>,
    hold: Arc<AtomicBool>,
    farewell: Farewell<F>,
}

impl<F: Fn(VcpuReport)> Worker<F> {
    fn work(&mut self) {
        let mut state = State::Paused;
        while state != State::Finished {
            state = match state {
                State::Paused => self.paused(),
                State::Running => self.running(),
                State::Finished => State::Finished,
            };
        }
    }

    fn paused(&mut self) -> State {
        match self.inbox.recv() {
            Ok(request) => self.serve(request, State::Paused),
            Err(RecvError) => State::Finished,
        }
    }

    fn running(&mut self) -> State {
        match self.inbox.try_recv() {
            Ok(request) => return self.serve(request, State::Running),
            Err(TryRecvError::Disconnected) => return State::Finished,
            Err(TryRecvError::Empty) => {}
        }
        match self.vcpu.run() {
            VmExit::Kicked if self.hold.load(Ordering::Acquire) => State::Paused,
            VmExit::Kicked => State::Running,
            exit => {
                let state = Box::new(self.vcpu.state());
                let instructions = self.vcpu.instructions();
                (self.farewell.report)(VcpuReport::Stopped { exit, state, instructions });
                State::Paused
            }
        }
    }

    /// Answers a request in `state`; a reply that nobody waits for any more is dropped.
    fn serve(&mut self, request: Request, state: State) -> State {
        match request {
            Request::Run => return State::Running,
            Request::Finish => return State::Finished,
            Request::Pause(reply) => {
                let _ = reply.send(());
                return State::Paused;
            }
            Request::Reset(to, reply) => {
                self.vcpu.reset();
                let _ = reply.send(to.map_or(Ok(()), |to| self.vcpu.set_state(&to)));
            }
            Request::State(reply) => {
                let _ = reply.send(Box::new(self.vcpu.state()));
            }
            Request::Statistics(reply) => {
                let _ = reply.send(VcpuStatistics {
                    instructions: self.vcpu.instructions(),
                    cpu_time: thread_cpu_time(),
                    counters: self.vcpu.counters(),
                    profile: self.vcpu.profile(),
                });
            }
        }
        state
    }
}

/// Processor time of the calling thread.
fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests;
