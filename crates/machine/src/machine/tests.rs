//! The machine's own logic on an engine whose vCPU follows a script instead of executing code.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::thread;

use ringfence_engine::{
    Bus, CpuState, Engine, EngineError, InterruptSink, Kick, Placement, SavedState, StateError, Vcpu,
    VmConfig,
};

use super::*;
use crate::console::Nowhere;
use crate::cpu_model::CpuModel;
use crate::engine_choice::EngineChoice;
use crate::spec::{BootSpec, Initrd};

/// What the scripted vCPU does, one after the other. At the end it waits to be kicked.
enum Step {
    Out(u16, Vec<u8>),
    Exit(VmExit),
}

#[derive(Default)]
struct Script {
    steps: Mutex<VecDeque<Step>>,
    kicked: Mutex<bool>,
    wake: Condvar,
    resets: Mutex<u32>,
}

impl Kick for Script {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.wake.notify_all();
    }
}

struct ScriptedVcpu {
    script: Arc<Script>,
    bus: Arc<dyn Bus>,
    state: CpuState,
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self) -> VmExit {
        loop {
            if std::mem::take(&mut *self.script.kicked.lock().unwrap()) {
                return VmExit::Kicked;
            }
            let step = self.script.steps.lock().unwrap().pop_front();
            match step {
                Some(Step::Out(port, data)) => self.bus.port_write(port, &data),
                Some(Step::Exit(exit)) => return exit,
                None => {
                    let kicked = self.script.kicked.lock().unwrap();
                    drop(self.script.wake.wait_while(kicked, |kicked| !*kicked).unwrap());
                }
            }
        }
    }
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.script) as _
    }
    fn state(&self) -> CpuState {
        self.state.clone()
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }
    fn reset(&mut self) {
        *self.script.resets.lock().unwrap() += 1;
        self.state = CpuState::default();
    }
    fn instructions(&self) -> u64 {
        0
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Engine and virtual machine in one.
#[derive(Clone, Default)]
struct Scripted(Arc<Script>);

impl Engine for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }
    fn create_vm(&self, _config: VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        Ok(Box::new(self.clone()))
    }
}

impl Vm for Scripted {
    fn create_vcpu(&self, _index: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(ScriptedVcpu { script: Arc::clone(&self.0), bus, state: CpuState::default() }))
    }
    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::new(Self::default())
    }
    fn placements(&self) -> Vec<Placement> {
        Vec::new()
    }
    fn reset(&self) {}
    fn save(&self) -> Vec<SavedState> {
        Vec::new()
    }
    fn restore(&self, _state: &[SavedState]) -> Result<(), StateError> {
        Ok(())
    }
}

impl InterruptSink for Scripted {
    fn set_gsi(&self, _gsi: u32, _asserted: bool) {}
    fn send_msi(&self, _address: u64, _data: u32) {}
}

/// A Multiboot kernel without any code.
fn kernel() -> tempfile::NamedTempFile {
    const MAGIC: u32 = 0x1bad_b002;
    let header = [
        MAGIC,
        1 << 16,
        0_u32.wrapping_sub(MAGIC + (1 << 16)),
        0x10_0000,
        0x10_0000,
        0x10_0040,
        0x10_0040,
        0x10_0030,
    ];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.resize(0x40, 0xf4);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    file
}

fn machine(
    steps: impl IntoIterator<Item = Step>,
    change: impl FnOnce(&mut MachineSpec),
) -> (Machine, Arc<Script>) {
    let script = Arc::new(Script { steps: Mutex::new(steps.into_iter().collect()), ..Script::default() });
    let kernel = kernel();
    let mut spec = MachineSpec {
        lockstep_batch: None,
        code_memory: None,
        profile: false,
        disks: Vec::new(),
        nets: Vec::new(),
        shares: Vec::new(),
        vsock: None,
        console: Default::default(),
        ports: Vec::new(),
        watchdog: None,
        balloon: None,
        engine: EngineChoice::Auto,
        cpus: 1,
        memory: 16 << 20,
        cpu: CpuModel::default(),
        clock: ringfence_engine::ClockMode::Host,
        boot: BootSpec { kernel: kernel.path().to_owned(), ..BootSpec::default() },
        debug_exit: Some(0xf4),
        no_reboot: false,
    };
    change(&mut spec);
    let selection = Selection { engine: EngineChoice::Interp, reason: "" };
    let outputs = SerialOutputs { console: Arc::new(Nowhere), control: Arc::new(Nowhere) };
    let machine =
        build::build_on(|_| Ok(Box::new(Scripted(Arc::clone(&script)))), selection, spec, outputs).unwrap();
    // The file must be there at a reset too.
    std::mem::forget(kernel);
    (machine, script)
}

const POWER_OFF: (u16, u16) = (0x604, (5 << 10) | (1 << 13));

fn power_off() -> Step {
    Step::Out(POWER_OFF.0, POWER_OFF.1.to_le_bytes().to_vec())
}

fn reset() -> Step {
    Step::Out(0xcf9, vec![6])
}

fn run(machine: &mut Machine) -> (Outcome, Vec<Notice>) {
    let mut notices = Vec::new();
    let outcome = machine.run(Some(Duration::from_secs(10)), |notice| notices.push(notice)).unwrap();
    (outcome, notices)
}

#[test]
fn power_off_ends_the_run() {
    let (mut machine, _) = machine([power_off()], |_| ());
    assert!(matches!(run(&mut machine).0, Outcome::PoweredOff));
}

#[test]
fn kernel_panic_ends_the_run() {
    let (mut machine, _) = machine([Step::Out(0x505, vec![1])], |_| ());
    assert!(matches!(run(&mut machine).0, Outcome::Panicked));
}

#[test]
fn debug_exit_carries_the_status() {
    let (mut machine, _) = machine([Step::Out(0xf4, vec![21])], |_| ());
    assert!(matches!(run(&mut machine).0, Outcome::DebugExit(43)));
}

#[test]
fn reset_boots_again_and_goes_on() {
    let (mut machine, script) = machine([reset(), power_off()], |_| ());
    let (outcome, notices) = run(&mut machine);
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    assert_eq!(notices, [Notice::Rebooting]);
    assert_eq!(*script.resets.lock().unwrap(), 2);
}

#[test]
fn reset_ends_where_reboot_is_forbidden() {
    let (mut machine, _) = machine([reset(), power_off()], |spec| spec.no_reboot = true);
    assert!(matches!(run(&mut machine).0, Outcome::Reset));
}

#[test]
fn guest_does_nothing_after_it_switched_off() {
    let (mut machine, script) = machine([power_off(), Step::Out(0xf4, vec![1])], |_| ());
    assert!(matches!(run(&mut machine).0, Outcome::PoweredOff));
    assert_eq!(script.steps.lock().unwrap().len(), 1);
}

#[test]
fn triple_fault_is_reported_with_registers() {
    let (mut machine, _) = machine([Step::Exit(VmExit::Shutdown("#DF".to_owned()))], |_| ());
    let Outcome::Crashed(report) = run(&mut machine).0 else { panic!("no crash") };
    assert_eq!((report.vcpu, report.reason.as_str(), report.state.rip), (0, "#DF", 0x10_0030));
    assert_eq!(report.code[0], 0xf4);
}

#[test]
fn engine_failure_is_told_apart() {
    let (mut machine, _) = machine([Step::Exit(VmExit::Internal("limit".to_owned()))], |_| ());
    assert!(matches!(run(&mut machine).0, Outcome::EngineFailed(report) if report.reason == "limit"));
}

#[test]
fn halted_guest_is_noticed_and_timed_out() {
    let (mut machine, _) = machine([Step::Exit(VmExit::HaltedForGood)], |_| ());
    let mut notices = Vec::new();
    let outcome = machine.run(Some(Duration::from_millis(100)), |notice| notices.push(notice)).unwrap();
    assert!(matches!(outcome, Outcome::TimedOut));
    assert_eq!(notices, [Notice::HaltedForGood]);
}

#[test]
fn handle_stops_pauses_and_resumes() {
    let (mut machine, script) = machine([], |_| ());
    let handle = machine.handle();
    let other = thread::spawn(move || {
        handle.pause();
        script.steps.lock().unwrap().push_back(power_off());
        script.kick();
        thread::sleep(Duration::from_millis(50));
        // Still there: nobody ran it.
        let left = script.steps.lock().unwrap().len();
        handle.resume();
        left
    });
    assert!(matches!(run(&mut machine).0, Outcome::PoweredOff));
    assert_eq!(other.join().unwrap(), 1);
    assert!(machine.clock().now().0 + 50_000_000 <= machine.run_time().as_nanos() as u64 + 10_000_000);

    let (mut machine, _) = self::machine([], |_| ());
    machine.handle().stop(StopReason::ConsoleLeft);
    assert!(matches!(run(&mut machine).0, Outcome::Stopped(StopReason::ConsoleLeft)));
}

#[test]
fn every_part_has_a_named_section_and_loads_again() {
    let (saved, _) = machine([], |_| ());
    let sections = saved.save().unwrap();
    let mut names: Vec<&str> = sections.iter().map(|section| section.name.as_str()).collect();
    for name in ["clock", "cpu.0", "serial.0", "serial.1", "pit", "rtc"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
    let (loaded, _) = machine([], |_| ());
    loaded.restore(&sections).unwrap();
    let missing: Vec<_> = sections.into_iter().filter(|section| section.name != "rtc").collect();
    let error = loaded.restore(&missing).unwrap_err();
    assert!(format!("{error:?}").contains("rtc"), "{error:?}");
}

#[test]
fn missing_files_are_told_with_the_kernels_name() {
    let make = |boot| {
        let mut spec = machine([], |_| ()).0.spec.clone();
        spec.boot = boot;
        let outputs = SerialOutputs { console: Arc::new(Nowhere), control: Arc::new(Nowhere) };
        let selection = Selection { engine: EngineChoice::Interp, reason: "" };
        build::build_on(|_| Ok(Box::new(Scripted::default())), selection, spec, outputs).unwrap_err()
    };
    let error = make(BootSpec { kernel: "/no/such/kernel".into(), ..BootSpec::default() });
    assert!(matches!(&error, MachineError::Boot { kernel, .. } if kernel.ends_with("kernel")), "{error:?}");
    let kernel = kernel();
    let initrds = vec![Initrd::File("/no/such/initrd".into())];
    let error = make(BootSpec { kernel: kernel.path().to_owned(), initrds, ..BootSpec::default() });
    assert!(matches!(error, MachineError::Boot { .. }));
}
