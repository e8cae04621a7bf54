//! A side of the comparison: how it is started with the measured devices, and what it says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::catalogue::{Case, Device};
use super::stores::{Ports, file};
use crate::collect;
use crate::root::Prepared;
use crate::root::native::Native;
use crate::sides::Ringfence;

/// What all sides are started with.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    pub(crate) prepared: &'a Prepared,
    pub(crate) cases: &'a [Case],
    pub(crate) devices: &'a [Device],
    pub(crate) ports: Ports,
    /// Seconds of a test.
    pub(crate) seconds: f64,
    /// MiB of a guest's memory.
    pub(crate) memory: u32,
    /// Files past the host's page cache.
    pub(crate) uncached: bool,
    pub(crate) limit: Duration,
}

/// Who does the work.
#[derive(Debug, Clone)]
pub(crate) enum Side {
    Host(Native),
    Qemu { program: PathBuf, thread: String, aio: String, iothread: bool },
    Ringfence(Ringfence),
}

/// What one run of a side gave.
#[derive(Debug, Clone, Default)]
pub(crate) struct Round {
    pub(crate) figures: BTreeMap<String, Result<f64, String>>,
    /// Why it did not run to its end, or why its figures mean nothing.
    pub(crate) failure: Option<String>,
    /// The side's own clock and the host's, at begin and end, in seconds.
    clocks: [Option<(f64, f64)>; 2],
}

impl Side {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Host(_) => "host".to_owned(),
            Self::Qemu { .. } => "qemu".to_owned(),
            Self::Ringfence(ringfence) => ringfence.name(),
        }
    }

    /// Words for the script.
    fn words(&self, setting: &Setting<'_>) -> Vec<String> {
        let is_host = matches!(self, Self::Host(_));
        let mut words = vec!["/bench/run".to_owned(), setting.seconds.to_string()];
        for Case { device, test } in setting.cases {
            let name = device.name();
            words.push(if *device == Device::Net {
                let Ports { throughput, control, data } = setting.ports;
                let host = if is_host { "127.0.0.1" } else { "10.0.2.2" };
                format!("net,{host},{throughput},{control},{data},{}", test.name)
            } else {
                // The host has no qcow2: its figure is that of a plain file.
                let plain = if *device == Device::Qcow2 { Device::Virtio } else { *device };
                let path = file(Path::new("/"), plain).1;
                let path = if is_host { path.as_str() } else { device.in_guest() };
                // A guest's own page cache is not what is measured.
                format!("disk,{name},{path},{},{}", u8::from(!is_host || setting.uncached), test.name)
            });
        }
        words
    }

    fn command(&self, setting: &Setting<'_>) -> Result<Command, String> {
        let (prepared, words) = (setting.prepared, self.words(setting));
        let append = || -> Result<String, String> {
            let word = ringfence_images::command_word(&words).map_err(|error| error.to_string())?;
            Ok(format!("{} quiet panic=-1 {word}", prepared.append))
        };
        let memory = setting.memory;
        let disks: Vec<(Device, String)> = (setting.devices.iter())
            .filter(|device| **device != Device::Net)
            .map(|device| (*device, quoted(&file(&prepared.root, *device).0)))
            .collect();
        let root = quoted(&prepared.disk);
        match self {
            Self::Host(native) => Ok(native.command(&words.iter().map(String::as_str).collect::<Vec<_>>())),
            Self::Qemu { program, thread, aio, iothread } => {
                let mut command = Command::new(program);
                command.args(["-accel", &format!("tcg,thread={thread}"), "-cpu", "max", "-smp", "1", "-m"]);
                command.arg(memory.to_string());
                command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio"]);
                command.args(["-no-reboot", "-kernel"]).arg(&prepared.kernel).args(["-append", &append()?]);
                command.args(["-drive", &format!("file={root},format=raw,if=none,id=root,snapshot=on")]);
                command.args(["-device", "nvme,drive=root,serial=root"]);
                let cache = if setting.uncached { "none" } else { "writeback" };
                for (device, path) in disks {
                    let name = device.name();
                    let format = if device == Device::Qcow2 { "qcow2" } else { "raw" };
                    let drive =
                        format!("file={path},format={format},if=none,id={name},cache={cache},aio={aio}");
                    command.args(["-drive", &drive]);
                    if device == Device::Nvme {
                        command.args(["-device", "nvme,drive=nvme,serial=data"]);
                    } else {
                        let mut device = format!("virtio-blk-pci,drive={name}");
                        if *iothread {
                            command.args(["-object", &format!("iothread,id=thread-{name}")]);
                            device.push_str(&format!(",iothread=thread-{name}"));
                        }
                        command.args(["-device", &device]);
                    }
                }
                if setting.devices.contains(&Device::Net) {
                    command.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]);
                }
                Ok(command)
            }
            Self::Ringfence(Ringfence { program, engine, cpu }) => {
                let mut command = Command::new(program);
                command.args(["run", "--engine", engine, "--cpu", cpu, "--memory", &format!("{memory}M")]);
                command
                    .args(["--no-reboot", "--kernel"])
                    .arg(&prepared.kernel)
                    .args(["--append", &append()?]);
                command.args(["--disk", &format!("{root},bus=nvme,ephemeral")]);
                let cache = if setting.uncached { "none" } else { "writeback" };
                for (device, path) in disks {
                    let (bus, format) = match device {
                        Device::Nvme => ("nvme", "raw"),
                        Device::Qcow2 => ("virtio", "qcow2"),
                        Device::Virtio | Device::Net => ("virtio", "raw"),
                    };
                    command.args(["--disk", &format!("{path},bus={bus},format={format},cache={cache}")]);
                }
                command.args(["--net", if setting.devices.contains(&Device::Net) { "user" } else { "none" }]);
                Ok(command)
            }
        }
    }

    /// Runs the tests on this side.
    pub(crate) fn run(&self, setting: &Setting<'_>) -> Round {
        let mut round = Round::default();
        let ended = self.command(setting).and_then(|command| {
            let ended = collect::run(command, setting.limit, |line| round.line(&line.text, line.at));
            ended.map_err(|error| format!("cannot be started: {error}"))
        });
        round.failure = match ended {
            Err(reason) => Some(reason),
            Ok(ended) => ended.late.or_else(|| round.clocks[1].is_none().then_some(ended.early)),
        };
        if let (None, [Some(begin), Some(end)]) = (&round.failure, round.clocks) {
            let (own, host) = (end.0 - begin.0, end.1 - begin.1);
            // Both are read where the lines are made and where they come, which on a busy host is not the same moment.
            if (own - host).abs() > 0.3 + host * 0.05 {
                round.failure = Some(format!("its clock went {own:.2} s while the host's went {host:.2} s"));
            }
        }
        round
    }
}

/// All programs here write a comma in a file's name twice.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Round {
    /// Takes a line that came `at` seconds after the side was started.
    fn line(&mut self, line: &str, at: f64) {
        // A console ends its lines as typewriters did, and a kernel may have left half a line before.
        let line = line.trim_end();
        let Some((word, rest)) = line.find('@').and_then(|start| line.get(start + 1..)?.split_once(' '))
        else {
            return;
        };
        let clock = || Some((rest.parse().ok()?, at));
        match (word, rest.split_once(' ')) {
            ("begin", _) => self.clocks[0] = clock(),
            ("end", _) => self.clocks[1] = clock(),
            ("figure", Some((name, value))) => {
                let figure = value.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
                self.figures.insert(name.to_owned(), figure.ok_or_else(|| format!("gave {value:?}")));
            }
            ("failed", Some((name, reason))) => {
                self.figures.insert(name.to_owned(), Err(reason.to_owned()));
            }
            _ => {}
        }
    }

    /// A case's figure, or why there is none.
    pub(crate) fn figure(&self, name: &str) -> Result<f64, String> {
        match (&self.failure, self.figures.get(name)) {
            (Some(reason), Some(Ok(_)) | None) => Err(reason.clone()),
            (_, Some(figure)) => figure.clone(),
            (None, None) => Err("was not run".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_figures_or_reasons() {
        let mut round = Round::default();
        for line in [
            "@begin 1.5\r",
            "[ 2.0] noise @figure virtio/randread-1 5120.5\r",
            "@figure net/to-host 0",
            "@failed net/udp-1 no server @ all",
            "@end 4",
        ] {
            round.line(line, 2.0);
        }
        assert_eq!(round.figure("virtio/randread-1"), Ok(5120.5));
        assert!(round.figure("net/to-host").is_err());
        assert_eq!(round.figure("net/udp-1"), Err("no server @ all".to_owned()));
        assert_eq!(round.figure("net/tcp-1"), Err("was not run".to_owned()));
        assert_eq!(round.clocks, [Some((1.5, 2.0)), Some((4.0, 2.0))]);
        round.failure = Some("late".to_owned());
        assert_eq!(round.figure("virtio/randread-1"), Err("late".to_owned()));
    }
}
