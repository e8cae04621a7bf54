//! The machine's devices: one table of constructors, and what is done to all of them alike.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use ringfence_devices::acpi_pm::AcpiPm;
use ringfence_devices::debug_exit::DebugExit;
use ringfence_devices::fw_cfg::{FwCfg, FwCfgItems};
use ringfence_devices::i8042::I8042;
use ringfence_devices::pci::{PciBus, PciError, PciFunction, PciHost};
use ringfence_devices::pit::Pit;
use ringfence_devices::port92::Port92;
use ringfence_devices::pvpanic::PvPanic;
use ringfence_devices::rtc::{Rtc, RtcConfig, host_wall_clock};
use ringfence_devices::serial::{Serial, SerialOutput};
use ringfence_devices::virtio::balloon::Balloon;
use ringfence_devices::virtio::console::{Console, ConsoleConfig, Size};
use ringfence_devices::virtio::net::Net;
use ringfence_devices::virtio::rng::Rng;
use ringfence_devices::virtio::share::Share;
use ringfence_devices::virtio::vsock::Vsock;
use ringfence_devices::virtio::{SharedDevice, VirtioConfig, VirtioPci};
use ringfence_devices::watchdog::Watchdog;
use ringfence_devices::{Device, PowerControl, PowerEvent, SystemBus, platform};
use ringfence_disk::DiskBus;
use ringfence_engine::{ClockMode, InterruptSink, IrqLine, Placement, TimerQueue, VirtualClock};
use ringfence_memory::GuestMemory;

use crate::console::ConsoleInput;
use crate::control::{Event, reporter};
use crate::disks::{self, Disk};
use crate::error::MachineError;
use crate::memory_map::ABOVE_4G;
use crate::spec::ConsoleDevice;
use crate::watchdog::WatchdogAction;

/// Where the serial ports' output goes.
pub struct SerialOutputs {
    /// The first port's: the console.
    pub console: Arc<dyn SerialOutput>,
    /// The second port's: what the guest's own tools tell the host.
    pub control: Arc<dyn SerialOutput>,
}

impl std::fmt::Debug for SerialOutputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialOutputs")
    }
}

/// What devices are made from.
pub(crate) struct Wiring<'a> {
    pub(crate) memory: &'a Arc<GuestMemory>,
    pub(crate) clock: &'a Arc<VirtualClock>,
    pub(crate) timers: &'a Arc<TimerQueue>,
    pub(crate) interrupts: &'a Arc<dyn InterruptSink>,
    pub(crate) power: &'a Arc<dyn PowerControl>,
    pub(crate) debug_exit: Option<u16>,
    pub(crate) cpus: u32,
    /// The device that the console is.
    pub(crate) console: ConsoleDevice,
    /// What a watchdog does, if there is one.
    pub(crate) watchdog: Option<WatchdogAction>,
    /// Bytes that a balloon asks the guest for, if there is one.
    pub(crate) balloon: Option<u64>,
    /// Where devices report what the user should know.
    pub(crate) events: &'a Sender<Event>,
}

impl Wiring<'_> {
    /// A PCI function with a virtio device in it. `name` is that of its saved state, unique in the machine.
    pub(crate) fn virtio(&self, name: impl Into<String>, device: SharedDevice) -> Arc<VirtioPci> {
        let reporter = Arc::new(reporter(self.events, Event::DeviceBroken));
        let config = VirtioConfig { name: name.into(), reporter };
        VirtioPci::new(config, device, Arc::clone(self.memory), self.interrupts)
    }

    /// The virtio console, if the console is to be one.
    fn console(&self, output: Arc<dyn SerialOutput>) -> Result<Option<Console>, MachineError> {
        let ConsoleDevice::Virtio { columns, rows } = self.console else { return Ok(None) };
        let config =
            ConsoleConfig { console: Some(output), size: Size { columns, rows }, ..ConsoleConfig::default() };
        Console::new(config).map(Some).map_err(MachineError::Console)
    }

    /// The watchdog, if there is to be one.
    fn watchdog(&self) -> Option<Arc<Watchdog>> {
        let (power, tell) = (Arc::clone(self.power), reporter(self.events, Event::DeviceBroken));
        let action = self.watchdog?;
        let expired = move || match action {
            WatchdogAction::Reset | WatchdogAction::PowerOff => power.request(PowerEvent::Watchdog),
            WatchdogAction::Tell => {
                tell("the guest has neglected its watchdog, which has stopped".to_owned())
            }
        };
        Some(Watchdog::new(Arc::clone(self.clock), self.timers, expired))
    }

    fn line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::clone(self.interrupts), gsi)
    }
}

/// Where devices go that are PCI functions.
struct Plugged<'a> {
    pci: &'a PciBus,
    all: &'a mut Vec<Arc<dyn Device>>,
}

impl Plugged<'_> {
    fn plug(&mut self, function: Arc<impl PciFunction + Device + 'static>) -> Result<(), PciError> {
        self.pci.plug_next(Arc::clone(&function) as _)?;
        self.all.push(function);
        Ok(())
    }
}

/// Every device of a machine.
pub(crate) struct Devices {
    all: Vec<Arc<dyn Device>>,
    pci: Arc<PciBus>,
    console: ConsoleInput,
    power: Arc<AcpiPm>,
}

impl Devices {
    /// Makes them all.
    pub(crate) fn new(
        wiring: &Wiring<'_>,
        outputs: SerialOutputs,
        disks: Vec<Disk>,
        cards: Vec<Arc<Net>>,
        shares: Vec<Arc<Share>>,
        vsock: Option<Arc<Vsock>>,
        ports: Option<Console>,
    ) -> Result<Self, MachineError> {
        let pci = PciBus::new();
        let &Wiring { memory, clock, timers, power, .. } = wiring;
        let [console_irq, control_irq] = platform::SERIAL_IRQS;
        let acpi = AcpiPm::new(Arc::clone(clock), timers, wiring.line(platform::SCI_IRQ), Arc::clone(power));
        let serial = Serial::new(0, wiring.line(console_irq), Arc::clone(&outputs.console));
        let console = wiring.console(outputs.console)?;
        let mut all: Vec<Arc<dyn Device>> = vec![
            Pit::new(Arc::clone(clock), timers, wiring.line(platform::PIT_IRQ)),
            Rtc::new(
                Arc::clone(clock),
                timers,
                wiring.line(platform::RTC_IRQ),
                rtc_config(memory, clock.mode()),
            ),
            Arc::clone(&serial) as _,
            Serial::new(1, wiring.line(control_irq), outputs.control),
            I8042::new(wiring.line(platform::I8042_IRQ), Arc::clone(memory), Arc::clone(power)),
            Port92::new(Arc::clone(memory), Arc::clone(power)),
            Arc::clone(&acpi) as _,
            PciHost::new(Arc::clone(&pci), Arc::clone(power)),
            FwCfg::new(FwCfgItems::new(), Arc::clone(memory)),
            PvPanic::new(Arc::clone(power)),
        ];
        all.extend(wiring.watchdog().map(|watchdog| watchdog as _));
        all.extend(wiring.debug_exit.map(|port| DebugExit::new(port, Arc::clone(power)) as _));
        let mut plugged = Plugged { pci: &pci, all: &mut all };
        for (index, disk) in disks.into_iter().enumerate() {
            if disk.bus() == DiskBus::Virtio {
                let device = disks::virtio(index, disk, wiring.cpus)?;
                plugged.plug(wiring.virtio(format!("virtio-blk.{index}"), device))?;
            } else {
                plugged.plug(disks::nvme(index, disk, wiring.cpus, memory, wiring.interrupts)?)?;
            }
        }
        for (index, card) in cards.into_iter().enumerate() {
            plugged.plug(wiring.virtio(format!("virtio-net.{index}"), card))?;
        }
        for (index, share) in shares.into_iter().enumerate() {
            plugged.plug(wiring.virtio(format!("virtio-fs.{index}"), share))?;
        }
        if let Some(vsock) = vsock {
            plugged.plug(wiring.virtio("virtio-vsock.0", vsock))?;
        }
        // A run by the count of instructions repeats exactly, which the host's entropy would spoil.
        if clock.mode() == ClockMode::Host {
            plugged.plug(wiring.virtio("virtio-rng.0", Arc::new(Rng::default())))?;
        }
        if let Some(bytes) = wiring.balloon {
            plugged.plug(wiring.virtio("virtio-balloon.0", Balloon::new(bytes)))?;
        }
        let input = console.as_ref().map_or(serial as _, |console| console.input());
        if let Some(console) = console {
            plugged.plug(wiring.virtio("virtio-console.0", Arc::new(console)))?;
        }
        if let Some(ports) = ports {
            plugged.plug(wiring.virtio("virtio-ports.0", Arc::new(ports)))?;
        }
        Ok(Self { all, pci, console: ConsoleInput::new(input), power: acpi })
    }

    /// Connects what is placed on the bus by the guest.
    pub(crate) fn connect(&self, bus: &Arc<SystemBus>, interrupts: &Arc<dyn InterruptSink>) {
        self.pci.connect(bus, interrupts);
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.all.iter()
    }

    /// Where they answer on the bus.
    pub(crate) fn placements(&self) -> impl Iterator<Item = Placement> {
        self.all.iter().flat_map(|device| Arc::clone(device).placements())
    }

    pub(crate) fn reset(&self) {
        self.all.iter().for_each(|device| device.reset());
    }

    /// Presses the power button. Returns whether the guest listens to it.
    pub(crate) fn press_power_button(&self) -> bool {
        self.power.press_power_button()
    }

    pub(crate) fn console_input(&self) -> &ConsoleInput {
        &self.console
    }
}

fn rtc_config(memory: &GuestMemory, mode: ClockMode) -> RtcConfig {
    let (low, high): (Vec<_>, Vec<_>) = memory.ram().partition(|range| range.start.0 < ABOVE_4G);
    RtcConfig {
        wall_clock: match mode {
            ClockMode::Host => host_wall_clock(),
            ClockMode::Counted => VirtualClock::COUNTED_EPOCH,
        },
        memory_below_4g: low.last().map_or(0, |range| range.end()),
        memory_above_4g: high.iter().map(|range| range.len).sum(),
    }
}
