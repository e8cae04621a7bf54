//! Putting a machine together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use ringfence_devices::{PowerControl, SystemBus};
use ringfence_engine::{Bus, Engine, EngineError, TimerQueue, Vcpu, VirtualClock, Vm, VmConfig};

use crate::control::{Event, MachineHandle, PowerSwitch};
use crate::cpu_model;
use crate::devices::{Devices, SerialOutputs, Wiring};
use crate::disks;
use crate::engine_choice::{self, EngineSettings, Selection};
use crate::error::MachineError;
use crate::host::HostMemory;
use crate::load;
use crate::machine::Machine;
use crate::memory_map;
use crate::nets;
use crate::ports;
use crate::shares;
use crate::spec::MachineSpec;
use crate::vcpu::VcpuThread;
use crate::vsock;

/// The guest's TSC frequency in kHz, the same on every host: one tick a nanosecond.
const TSC_KHZ: u32 = 1_000_000;

/// Assembles the machine that `spec` describes, with its kernel loaded and its vCPUs paused at the entry.
pub(crate) fn build(spec: MachineSpec, outputs: SerialOutputs) -> Result<Machine, MachineError> {
    let selection = spec.check(HostMemory::probe())?;
    let settings = EngineSettings {
        lockstep_batch: spec.lockstep_batch,
        code_memory: spec.code_memory,
        profile: spec.profile,
    };
    build_on(move |selection| engine_choice::make(selection, settings), selection, spec, outputs)
}

/// The same on the engine that `make` gives.
pub(crate) fn build_on(
    make: impl FnOnce(Selection) -> Result<Box<dyn Engine>, EngineError>,
    selection: Selection,
    spec: MachineSpec,
    outputs: SerialOutputs,
) -> Result<Machine, MachineError> {
    let (sender, events) = channel();
    let memory = Arc::new(memory_map::allocate(spec.memory)?);
    // The kernel before everything else: most of what users get wrong shows here.
    let plan = load::load(&spec, &memory)?;
    let disks = disks::open(&spec.disks, spec.clock, &sender)?;
    let mut helpers = Vec::new();
    let cards = nets::open(&spec.nets, spec.cpus, &sender, &mut helpers)?;
    let vsock = spec.vsock.as_ref().map(|spec| vsock::open(spec, &sender, &mut helpers)).transpose()?;
    let ports = ports::open(&spec.ports, &sender)?;
    let shares = shares::open(&spec.shares, &sender, &mut helpers)?;
    let clock = Arc::new(VirtualClock::new(spec.clock, TSC_KHZ));
    let timers = Arc::new(TimerQueue::default());
    let vm = make(selection)?.create_vm(VmConfig {
        memory: Arc::clone(&memory),
        clock: Arc::clone(&clock),
        timers: Arc::clone(&timers),
        cpuid: Arc::new(cpu_model::cpuid(spec.cpu, spec.cpus, clock.tsc_khz())?),
        cpus: spec.cpus,
    })?;
    let power = Arc::new(PowerSwitch::new(sender.clone()));
    let wiring = Wiring {
        memory: &memory,
        clock: &clock,
        timers: &timers,
        interrupts: &vm.interrupts(),
        power: &(Arc::clone(&power) as Arc<dyn PowerControl>),
        debug_exit: spec.debug_exit,
        cpus: spec.cpus,
        balloon: spec.balloon,
        console: spec.console,
        watchdog: spec.watchdog,
        events: &sender,
    };
    let devices = Devices::new(&wiring, outputs, disks, cards, shares, vsock, ports.device)?;
    let bus = Arc::new(SystemBus::new(devices.placements().chain(vm.placements()))?);
    devices.connect(&bus, wiring.interrupts);
    let vcpus = start_vcpus(vm.as_ref(), spec.cpus, bus, &power, &sender)?;
    let machine = Machine {
        handle: MachineHandle::new(sender),
        backlog: VecDeque::new(),
        run_time: Duration::ZERO,
        spec,
        selection,
        memory,
        clock,
        vm,
        vcpus,
        devices,
        power,
        events,
        plan,
        port_files: ports.files,
        _helpers: helpers,
    };
    machine.reset_vcpus()?;
    Ok(machine)
}

/// Makes the vCPUs, each on its thread, and connects the power switch with them.
fn start_vcpus(
    vm: &dyn Vm,
    cpus: u32,
    bus: Arc<dyn Bus>,
    power: &PowerSwitch,
    sender: &Sender<Event>,
) -> Result<Vec<VcpuThread>, MachineError> {
    let made: Result<Vec<Box<dyn Vcpu>>, _> =
        (0..cpus).map(|index| vm.create_vcpu(index, Arc::clone(&bus))).collect();
    let made = made?;
    power.connect(made.iter().map(|vcpu| vcpu.kick()).collect());
    let start = |(index, vcpu)| {
        let sender = sender.clone();
        // A machine that has ended needs no reports.
        let report = move |report| drop(sender.send(Event::Vcpu(index, report)));
        VcpuThread::start(index, vcpu, power.hold(), report)
            .map_err(|source| MachineError::Thread { vcpu: index, source })
    };
    (0..).zip(made).map(start).collect()
}
