use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, mpsc};

use super::*;

/// A vCPU that waits for a kick or for an exit to hand out.
#[derive(Default)]
struct Script {
    exits: Mutex<Vec<VmExit>>,
    kicked: Mutex<bool>,
    wake: Condvar,
    runs: AtomicU64,
    panics: AtomicBool,
    hold: Arc<AtomicBool>,
}

impl Kick for Script {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.wake.notify_all();
    }
}

struct Fake(Arc<Script>, CpuState);

impl Vcpu for Fake {
    fn run(&mut self) -> VmExit {
        self.0.runs.fetch_add(1, Ordering::Relaxed);
        assert!(!self.0.panics.load(Ordering::Relaxed), "asked to");
        if let Some(exit) = self.0.exits.lock().unwrap().pop() {
            return exit;
        }
        let mut kicked = self.0.kicked.lock().unwrap();
        while !*kicked {
            kicked = self.0.wake.wait(kicked).unwrap();
        }
        *kicked = false;
        VmExit::Kicked
    }
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.0) as _
    }
    fn state(&self) -> CpuState {
        self.1.clone()
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        if state.rip == 0xbad {
            return Err(EngineError::BadState("rip".to_owned()));
        }
        self.1 = state.clone();
        Ok(())
    }
    fn reset(&mut self) {
        self.1 = CpuState::default();
    }
    fn instructions(&self) -> u64 {
        7
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("runs", self.0.runs.load(Ordering::Relaxed))]
    }
}

fn start(script: &Arc<Script>) -> (VcpuThread, mpsc::Receiver<VcpuReport>) {
    let (report, reports) = mpsc::channel();
    let vcpu = Box::new(Fake(Arc::clone(script), CpuState::default()));
    (VcpuThread::start(0, vcpu, Arc::clone(&script.hold), move |r| drop(report.send(r))).unwrap(), reports)
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn paused_vcpu_does_not_run() {
    let script = Arc::new(Script::default());
    let (vcpu, _reports) = start(&script);
    assert_eq!(vcpu.statistics().unwrap().counters, [("runs", 0)]);
    vcpu.begin_pause().unwrap().wait().unwrap();
    assert_eq!(script.runs.load(Ordering::Relaxed), 0);
}

#[test]
fn running_vcpu_answers_and_goes_on() {
    let script = Arc::new(Script::default());
    let (vcpu, _reports) = start(&script);
    vcpu.run().unwrap();
    while script.runs.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    assert_eq!(vcpu.state().unwrap().rip, 0xfff0);
    assert_eq!(vcpu.statistics().unwrap().instructions, 7);
    vcpu.begin_pause().unwrap().wait().unwrap();
    let runs = script.runs.load(Ordering::Relaxed);
    vcpu.begin_pause().unwrap().wait().unwrap();
    assert_eq!(script.runs.load(Ordering::Relaxed), runs);
}

#[test]
fn exit_is_reported_and_pauses() {
    let script = Arc::new(Script::default());
    script.exits.lock().unwrap().push(VmExit::Shutdown("why".to_owned()));
    let (vcpu, reports) = start(&script);
    vcpu.run().unwrap();
    let VcpuReport::Stopped { exit, state, instructions } = reports.recv_timeout(SOON).unwrap() else {
        panic!("died")
    };
    assert_eq!((exit, state.rip, instructions), (VmExit::Shutdown("why".to_owned()), 0xfff0, 7));
    let runs = script.runs.load(Ordering::Relaxed);
    assert_eq!(vcpu.statistics().unwrap().counters, [("runs", runs)]);
}

#[test]
fn reset_loads_the_given_state_or_says_why_not() {
    let (vcpu, _reports) = start(&Arc::new(Script::default()));
    vcpu.reset(Some(CpuState { rip: 0x1000, ..CpuState::default() })).unwrap().unwrap();
    assert_eq!(vcpu.state().unwrap().rip, 0x1000);
    vcpu.reset(None).unwrap().unwrap();
    assert_eq!(vcpu.state().unwrap().rip, 0xfff0);
    let bad = CpuState { rip: 0xbad, ..CpuState::default() };
    assert!(matches!(vcpu.reset(Some(bad)).unwrap(), Err(EngineError::BadState(_))));
}

#[test]
fn panicking_thread_is_reported() {
    let script = Arc::new(Script::default());
    script.panics.store(true, Ordering::Relaxed);
    let (vcpu, reports) = start(&script);
    vcpu.run().unwrap();
    assert!(matches!(reports.recv_timeout(SOON).unwrap(), VcpuReport::Died));
    // Its inbox goes away with it; whoever asks is not left waiting.
    assert!(vcpu.statistics().is_err());
}

#[test]
fn dropped_handle_ends_the_thread_without_a_report() {
    let script = Arc::new(Script::default());
    let (vcpu, reports) = start(&script);
    vcpu.run().unwrap();
    drop(vcpu);
    assert!(reports.recv_timeout(SOON).is_err());
}

#[test]
fn held_vcpu_waits_for_the_next_request() {
    let script = Arc::new(Script::default());
    let (vcpu, _reports) = start(&script);
    vcpu.run().unwrap();
    script.hold.store(true, Ordering::Release);
    script.kick();
    // Answered from the pause; the thread has not entered the guest again since.
    while script.runs.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    vcpu.statistics().unwrap();
    thread::sleep(Duration::from_millis(20));
    let runs = script.runs.load(Ordering::Relaxed);
    script.kick();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(script.runs.load(Ordering::Relaxed), runs);
    script.hold.store(false, Ordering::Release);
    vcpu.run().unwrap();
    while script.runs.load(Ordering::Relaxed) == runs {
        thread::yield_now();
    }
}
