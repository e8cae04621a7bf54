//! `ringfence run`: a machine in the foreground.

use std::sync::Arc;
use std::time::Instant;

use ringfence_images::Catalogue;
use ringfence_machine::console::Nowhere;
use ringfence_machine::{
    BootSpec, ClockMode, ConsoleDevice, CrashReport, DiskSpec, EngineChoice, HostMemory, Initrd, Machine,
    MachineError, MachineSpec, NetSpec, Notice, Outcome, SerialOutputs, StopReason,
};

use crate::args::{ConsoleTarget, RunArguments};
use crate::command_status::CommandStatus;
use crate::console::Console;
use crate::exit::{FAILURE, Failure, SIGNAL, SUCCESS, TIMEOUT};
use crate::profile::ProfileFile;
use crate::progress::Bars;
use crate::terminal::tell;
use crate::{report, signals, terminal};

/// SIGINT and SIGPIPE, whose statuses stand for leaving a command and for a console that nobody reads.
const INTERRUPTED: u8 = SIGNAL + 2;
const NO_READER: u8 = SIGNAL + 13;

/// What the images have on the kernel's command line for a console on the serial port.
const SERIAL_CONSOLE: &str = "console=ttyS0";

pub(crate) fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    arguments.refuse_what_is_not_there().map_err(Failure::usage)?;
    let begun = Instant::now();
    signals::survive_size_limit().map_err(Failure::failed)?;
    let mut spec = describe(arguments);
    // Before an image is fetched: wrong values should be told at once.
    spec.check(HostMemory::probe()).map_err(Failure::usage)?;
    spec.boot = boot(arguments, &mut spec.disks)?;

    let command = (!arguments.command.is_empty()).then(CommandStatus::default);
    let console = Console::open(&arguments.console.target).map_err(Failure::failed)?;
    let control = command.clone().map_or_else(|| Arc::new(Nowhere) as _, |status| Arc::new(status) as _);
    let outputs = SerialOutputs { console: console.port(), control };
    let profile = ProfileFile::open(arguments).map_err(Failure::failed)?;
    let mut machine = Machine::new(spec.clone(), outputs).map_err(machine_failure)?;
    if arguments.verbose {
        report::beginning(&machine, &spec);
    }

    signals::watch(machine.handle(), machine.console_input(), arguments.stop_timeout)
        .map_err(Failure::failed)?;
    let raw = console.attach(machine.handle(), machine.console_input()).map_err(Failure::failed)?;
    let start = Instant::now();
    let outcome = machine.run(arguments.timeout, tell_notice);
    console.finish();
    drop(raw);

    if let Some(profile) = profile {
        profile.write(&machine).map_err(Failure::failed)?;
    }
    if arguments.verbose {
        let told = report::end(&machine, console.output(), start, start.saturating_duration_since(begun));
        told.map_err(Failure::failed)?;
    }
    Ok(status(&outcome.map_err(machine_failure)?, arguments, command.as_ref()))
}

fn machine_failure(error: MachineError) -> Failure {
    match error {
        MachineError::Spec(error) => Failure::usage(error),
        MachineError::Cpu(error) => Failure::usage(error),
        error => Failure::failed(error),
    }
}

fn describe(arguments: &RunArguments) -> MachineSpec {
    // Lock-step compares two runs, which must see the same time.
    let counted = arguments.counted || arguments.engine == EngineChoice::Lockstep;
    MachineSpec {
        engine: arguments.engine,
        lockstep_batch: arguments.lockstep_batch,
        code_memory: arguments.code_memory.map(|size| size.0),
        profile: arguments.profile.is_some(),
        cpus: arguments.cpus,
        memory: arguments.memory.0,
        cpu: arguments.cpu,
        clock: if counted { ClockMode::Counted } else { ClockMode::Host },
        disks: arguments.disk.clone(),
        nets: nets(arguments, counted),
        shares: arguments.share.clone(),
        vsock: arguments.vsock.clone(),
        console: console_device(arguments),
        ports: arguments.port.clone(),
        watchdog: arguments.watchdog,
        balloon: arguments.balloon.map(|size| size.0),
        boot: BootSpec::default(),
        debug_exit: arguments.debug_exit,
        // A command runs once: a guest that resets before it is done has failed.
        no_reboot: arguments.no_reboot || !arguments.command.is_empty(),
    }
}

fn console_device(arguments: &RunArguments) -> ConsoleDevice {
    if !arguments.console.virtio {
        return ConsoleDevice::Serial;
    }
    let size = terminal::size().filter(|_| arguments.console.target == ConsoleTarget::Stdio);
    let (rows, columns) = size.unwrap_or_default();
    ConsoleDevice::Virtio { columns, rows }
}

/// The kernel's words for a virtio console. Until it is there, messages come by the serial port, which goes to the same place; Linux
/// ends that when the console takes over. Behind `quiet`, which holds from where it stands.
const VIRTIO_CONSOLE: &str = "earlycon=uart8250,io,0x3f8 console=hvc0";
/// With a command: where the console's driver is a module, the kernel's complaint that there is none yet is not for the user. The
/// images' init sets the level that holds later.
const NO_COMPLAINTS: &str = "loglevel=3";

/// The networks given; without any, one in user mode, where time passes as on the host.
fn nets(arguments: &RunArguments, counted: bool) -> Vec<NetSpec> {
    match &arguments.net[..] {
        [] if counted => Vec::new(),
        [] => vec![NetSpec::user()],
        given => given.iter().filter_map(|net| net.0.clone()).collect(),
    }
}

/// The kernel given, or that of the image, which is fetched if it is not there yet. An image's disk comes before
/// those given.
fn boot(arguments: &RunArguments, disks: &mut Vec<DiskSpec>) -> Result<BootSpec, Failure> {
    let mut words: Vec<String> = Vec::new();
    let (kernel, initrds) = match &arguments.kernel {
        Some(kernel) => {
            words.push(SERIAL_CONSOLE.to_owned());
            (kernel.clone(), arguments.initrd.iter().cloned().map(Initrd::File).collect())
        }
        None => {
            let name = arguments.image.as_deref().unwrap_or(Catalogue::DEFAULT);
            let catalogue = Catalogue::builtin().map_err(Failure::failed)?;
            let image = catalogue.ensure(name, &mut Bars::new()).map_err(image_failure)?;
            words.push(image.append);
            let mut initrds: Vec<Initrd> = image.initrd.into_iter().map(Initrd::File).collect();
            let in_memory = image.disk.is_none();
            if let Some(disk) = image.disk {
                // The image is everybody's: what this machine writes vanishes with it.
                disks.insert(0, DiskSpec { ephemeral: true, ..DiskSpec::new(disk) });
            }
            initrds.extend(arguments.initrd.iter().cloned().map(Initrd::File));
            if !arguments.command.is_empty() {
                // Nothing but the command's own output, and an end instead of a wait if the kernel panics.
                words.push("quiet panic=-1".to_owned());
                if in_memory {
                    initrds.push(Initrd::Bytes(ringfence_images::command_archive(&arguments.command)));
                } else {
                    words.push(ringfence_images::command_word(&arguments.command).map_err(Failure::usage)?);
                }
            }
            (image.kernel, initrds)
        }
    };
    if arguments.console.target == ConsoleTarget::Stdio
        && let Some((rows, columns)) = terminal::size()
    {
        words.push(format!("ringfence.rows={rows} ringfence.cols={columns}"));
    }
    if arguments.console.virtio {
        words.iter_mut().for_each(|word| *word = word.replace(SERIAL_CONSOLE, ""));
        if !arguments.command.is_empty() {
            words.push(NO_COMPLAINTS.to_owned());
        }
        words.push(VIRTIO_CONSOLE.to_owned());
    }
    words.extend(arguments.port.iter().map(|port| format!("ringfence.port={}", port.name)));
    words.extend(arguments.share.iter().map(|share| format!("ringfence.share={}", share.tag)));
    words.extend(arguments.append.iter().cloned());
    words.retain(|word| !word.trim().is_empty());
    Ok(BootSpec {
        kernel,
        initrds,
        command_line: words.join(" "),
        kaslr: arguments.kaslr,
        decompress_in_guest: arguments.decompress_in_guest,
    })
}

fn image_failure(error: ringfence_images::ImageError) -> Failure {
    match error {
        error @ ringfence_images::ImageError::Unknown { .. } => Failure::usage(error),
        error => Failure::failed(error),
    }
}

fn tell_notice(notice: Notice) {
    tell(match notice {
        Notice::HaltedForGood => {
            "ringfence: the guest has halted with interrupts off, and nothing will wake it; it stays so until \
             --timeout, Ctrl-] or a signal"
        }
        Notice::Rebooting => "ringfence: the guest resets; booting it again",
        Notice::WatchdogResets => {
            "ringfence: the guest has neglected its watchdog, which resets it; booting it again"
        }
        Notice::AskedToStop(patience) => {
            return tell(&format!(
                "ringfence: pressed the power button; the guest has {} s to switch itself off (--stop-timeout), a second \
                 signal ends it at once",
                patience.as_secs_f64()
            ));
        }
        Notice::DiskFault(text) | Notice::DeviceBroken(text) => return tell(&format!("ringfence: {text}")),
    });
}

/// The exit status for an outcome; what the user should know of it goes to standard error.
fn status(outcome: &Outcome, arguments: &RunArguments, command: Option<&CommandStatus>) -> u8 {
    match outcome {
        Outcome::PoweredOff | Outcome::Reset => match command.map(CommandStatus::get) {
            None => SUCCESS,
            Some(Some(status)) => status,
            Some(None) => {
                tell("error: the guest ended before the command did; see its console output, or add -v");
                FAILURE
            }
        },
        Outcome::DebugExit(status) => *status,
        Outcome::TimedOut => {
            let limit = arguments.timeout.unwrap_or_default().as_secs_f64();
            tell(&format!("ringfence: the machine was ended after {limit} s (--timeout)"));
            TIMEOUT
        }
        Outcome::Panicked => {
            tell("error: the guest's kernel panicked; its last messages on the console tell why");
            FAILURE
        }
        Outcome::Neglected => {
            tell("error: the guest has neglected its watchdog (--watchdog), which ended the machine");
            FAILURE
        }
        Outcome::Crashed(report) => {
            tell(&crash("the guest crashed (triple fault)", report, CrashReport::advice()));
            FAILURE
        }
        Outcome::EngineFailed(report) => {
            let advice =
                ["report it, with the lines above and the kernel's version; the guest is not to blame"];
            tell(&crash("the engine cannot go on", report, &advice));
            FAILURE
        }
        Outcome::Stopped(StopReason::Signal(signal)) => {
            tell(&format!("ringfence: the machine was ended by signal {signal}"));
            u8::try_from(*signal).map_or(FAILURE, |signal| SIGNAL.saturating_add(signal))
        }
        Outcome::Stopped(StopReason::ConsoleLeft) if command.is_some() => INTERRUPTED,
        Outcome::Stopped(StopReason::ConsoleLeft) => SUCCESS,
        Outcome::Stopped(StopReason::ConsoleClosed) => {
            tell("ringfence: nobody reads the console any more; the machine was ended");
            NO_READER
        }
    }
}

fn crash(what: &str, report: &CrashReport, advice: &[&str]) -> String {
    let advice: Vec<String> = advice.iter().map(|line| format!("  - {line}")).collect();
    format!("error: {what}\n{report}\nwhat to try:\n{}", advice.join("\n"))
}
