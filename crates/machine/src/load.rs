//! From the description of what to boot to a kernel in memory.

use std::borrow::Cow;

use ringfence_boot::{BootError, BootPlan, Kaslr, MemoryWindow, PlatformDescription, SerialPort, Watchdog};
use ringfence_devices::{platform, watchdog};
use ringfence_engine::ClockMode;
use ringfence_memory::{GuestMemory, GuestRange};

use crate::error::MachineError;
use crate::size::ByteSize;
use crate::spec::{Initrd, MachineSpec};

/// The seed of `--kaslr` in counted mode, where a run must repeat exactly.
const COUNTED_KASLR_SEED: u64 = 0x5269_6e67_6665_6e63;

/// Reads the files and puts everything in its place. Done again at every reset.
pub(crate) fn load(spec: &MachineSpec, memory: &GuestMemory) -> Result<BootPlan, MachineError> {
    read_and_load(spec, memory).map_err(|source| match source {
        BootError::FileTooLarge { what: "initrd", path, .. } => {
            MachineError::LargeInitrd { path, memory: ByteSize(spec.memory) }
        }
        source => MachineError::Boot { kernel: spec.boot.kernel.clone(), source },
    })
}

fn read_and_load(spec: &MachineSpec, memory: &GuestMemory) -> Result<BootPlan, BootError> {
    let boot = &spec.boot;
    let kernel = ringfence_boot::read_kernel(&boot.kernel)?;
    let mut data = Vec::with_capacity(boot.initrds.len());
    for initrd in &boot.initrds {
        data.push(match initrd {
            Initrd::File(path) => Cow::Owned(ringfence_boot::read_initrd(path, spec.memory)?),
            Initrd::Bytes(bytes) => Cow::Borrowed(bytes.as_slice()),
        });
    }
    let name = |initrd: &Initrd| match initrd {
        Initrd::File(path) => path.display().to_string(),
        Initrd::Bytes(_) => String::new(),
    };
    let names: Vec<String> = boot.initrds.iter().map(name).collect();
    let initrds: Vec<ringfence_boot::Initrd<'_>> =
        data.iter().zip(&names).map(|(data, name)| ringfence_boot::Initrd { data, name }).collect();
    let counted = spec.clock == ClockMode::Counted;
    let kaslr = match (boot.kaslr, counted) {
        (false, _) => Kaslr::Off,
        (true, false) => Kaslr::Random,
        (true, true) => Kaslr::Seeded(COUNTED_KASLR_SEED),
    };
    let plan = ringfence_boot::BootSpec {
        initrds: &initrds,
        command_line: &boot.command_line,
        kaslr,
        decompress_in_guest: boot.decompress_in_guest,
        cpus: spec.cpus,
        platform: PlatformDescription {
            generation_id: Some(generation_id(counted)?),
            watchdog: spec.watchdog.is_some().then_some(WATCHDOG),
            ..description()
        },
        ..ringfence_boot::BootSpec::new(&kernel)
    };
    ringfence_boot::load(memory, &plan)
}

/// A value that no other machine has, and no other boot; where a run must repeat exactly, always the same.
fn generation_id(counted: bool) -> Result<[u8; 16], BootError> {
    let mut id = *b"ringfence counts";
    if !counted {
        getrandom::fill(&mut id).map_err(BootError::Random)?;
    }
    Ok(id)
}

/// How the guest works the watchdog.
const WATCHDOG: Watchdog = Watchdog {
    port: platform::WATCHDOG_PORT,
    period_ms: watchdog::PERIOD_MS,
    preset: watchdog::PRESET as u16,
    left: watchdog::LEFT as u16,
    control: watchdog::CONTROL as u16,
    status: watchdog::STATUS as u16,
};

fn window(range: GuestRange) -> MemoryWindow {
    MemoryWindow { start: range.start.0, last: range.end() - 1 }
}

/// What the firmware tables tell: where the devices are that [`crate::devices`] makes.
fn description() -> PlatformDescription {
    let serial = platform::SERIAL_PORTS.iter().zip(platform::SERIAL_IRQS);
    PlatformDescription {
        pm1a_event: platform::PM1A_EVENT_PORT,
        pm1a_control: platform::PM1A_CONTROL_PORT,
        pm_timer: platform::PM_TIMER_PORT,
        gpe0: platform::GPE0_PORT,
        gpe0_len: platform::GPE0_LEN,
        s5_sleep_type: platform::S5_SLEEP_TYPE,
        smi_command: Some((platform::SMI_COMMAND_PORT, platform::ACPI_ENABLE, platform::ACPI_DISABLE)),
        reset_port: platform::RESET_PORT,
        reset_value: platform::RESET_VALUE,
        rtc_port: platform::RTC_PORT,
        century: platform::RTC_CENTURY,
        pci_interrupt_base: platform::PCI_INTERRUPT_BASE as u8,
        pci_ecam: Some(window(platform::PCI_ECAM)),
        pci_window: window(platform::PCI_WINDOW),
        serial: serial.map(|(&port, irq)| SerialPort { port, irq: irq as u8 }).collect(),
        ..PlatformDescription::default()
    }
}
