//! The description of a machine.

use std::collections::BTreeSet;
use std::path::PathBuf;

use ringfence_devices::virtio::console::MOST_PORTS;
use ringfence_disk::DiskSpec;
use ringfence_engine::ClockMode;
use ringfence_engine_soft::jit::{LARGEST_CODE, SMALLEST_CODE};
use ringfence_net::NetSpec;
use ringfence_share::ShareSpec;
use ringfence_vsock::VsockSpec;

use crate::cpu_model::CpuModel;
use crate::engine_choice::{self, EngineChoice, NotOffered, Selection};
use crate::host::HostMemory;
use crate::memory_map;
use crate::ports::PortSpec;
use crate::size::ByteSize;
use crate::watchdog::WatchdogAction;

/// Everything that decides what a machine is, as plain data.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Which engine executes it.
    pub engine: EngineChoice,
    /// With [`EngineChoice::Lockstep`]: instructions between two comparisons, at most, instead of one translated block.
    pub lockstep_batch: Option<u64>,
    /// With an engine that translates: most bytes of translated code, instead of its default.
    pub code_memory: Option<u64>,
    /// With [`EngineChoice::Jit`]: find out where the guest's instructions are.
    pub profile: bool,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// The CPU that the guest sees.
    pub cpu: CpuModel,
    /// What makes the guest's time pass.
    pub clock: ClockMode,
    /// Its disks, in the order in which the guest finds them.
    pub disks: Vec<DiskSpec>,
    /// Its network cards, in the order in which the guest finds them.
    pub nets: Vec<NetSpec>,
    /// Folders of the host that it shares.
    pub shares: Vec<ShareSpec>,
    /// Sockets between guest and host, if there are to be any.
    pub vsock: Option<VsockSpec>,
    /// The device that the console is.
    pub console: ConsoleDevice,
    /// Named ports between programs of guest and host.
    pub ports: Vec<PortSpec>,
    /// A watchdog, and what happens when the guest neglects it.
    pub watchdog: Option<WatchdogAction>,
    /// A balloon that asks the guest for so many bytes, and takes what the guest reports as free; no balloon if `None`.
    pub balloon: Option<u64>,
    /// What it boots.
    pub boot: BootSpec,
    /// Port to which the guest writes V to end with status `(V << 1) | 1`.
    pub debug_exit: Option<u16>,
    /// A reset by the guest ends the machine.
    pub no_reboot: bool,
}

/// The device that a machine's console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConsoleDevice {
    /// The first serial port.
    #[default]
    Serial,
    /// A virtio console, of this size at first; the first serial port's output goes to the same place.
    Virtio {
        /// Characters in a row, or 0 if that is not known.
        columns: u16,
        /// Rows, or 0 likewise.
        rows: u16,
    },
}

/// What a machine boots.
#[derive(Clone, Debug, Default)]
pub struct BootSpec {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// Initial RAM disks (or Multiboot modules), in order.
    pub initrds: Vec<Initrd>,
    /// The kernel command line.
    pub command_line: String,
    /// Place the kernel at a random address.
    pub kaslr: bool,
    /// Let the kernel's own stub unpack it, instead of the host.
    pub decompress_in_guest: bool,
}

/// One initial RAM disk.
#[derive(Clone, Debug)]
pub enum Initrd {
    /// A file.
    File(PathBuf),
    /// Bytes made by the host.
    Bytes(Vec<u8>),
}

/// A description that no machine can be made from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// No memory.
    #[error("a machine cannot have 0 bytes of memory; give it some, such as --memory 512M")]
    NoMemory,
    /// Less memory than the first MiB needs.
    #[error("{asked} of memory is too little; the least is {}", ByteSize(memory_map::SMALLEST))]
    LittleMemory {
        /// What was asked for.
        asked: ByteSize,
    },
    /// More memory than there are addresses for.
    #[error("{asked} of memory is too much; the most is {}", ByteSize(memory_map::LARGEST))]
    MuchMemory {
        /// What was asked for.
        asked: ByteSize,
    },
    /// More memory than the host has.
    #[error("{asked} of memory is more than this host has ({total}); ask for less with --memory")]
    MoreThanHost {
        /// What was asked for.
        asked: ByteSize,
        /// What there is.
        total: ByteSize,
    },
    /// A balloon as large as the memory.
    #[error(
        "a balloon of {asked} is as large as the memory of {memory} or larger; ask for less with --balloon"
    )]
    LargeBalloon {
        /// What was asked for.
        asked: ByteSize,
        /// The guest's memory.
        memory: ByteSize,
    },
    /// Not whole pages.
    #[error("{asked} of memory is not a whole number of 4K pages")]
    OddMemory {
        /// What was asked for.
        asked: ByteSize,
    },
    /// No CPU.
    #[error("a machine cannot have 0 CPUs; give it at least one with --cpus")]
    NoCpus,
    /// More vCPUs than the engine runs.
    #[error("{asked} CPUs asked for, but the {engine} engine runs one vCPU so far; use --cpus 1")]
    ManyCpus {
        /// How many were asked for.
        asked: u32,
        /// The engine.
        engine: EngineChoice,
    },
    /// A batch for an engine that compares nothing.
    #[error("--lockstep-batch is for --engine lockstep; the {engine} engine compares nothing")]
    BatchWithoutLockstep {
        /// The engine.
        engine: EngineChoice,
    },
    /// Code memory for an engine that translates nothing.
    #[error("--code-memory is for engines that translate; the {engine} engine keeps no translated code")]
    CodeWithoutTranslator {
        /// The engine.
        engine: EngineChoice,
    },
    /// A profile from an engine that makes none.
    #[error("--profile is for --engine jit; the {engine} engine makes no profile")]
    ProfileWithoutTranslator {
        /// The engine.
        engine: EngineChoice,
    },
    /// Less code memory than the translator can work with.
    #[error("{asked} of code memory is too little; the least is {}", ByteSize(SMALLEST_CODE as u64))]
    LittleCodeMemory {
        /// What was asked for.
        asked: ByteSize,
    },
    /// More code memory than branches reach.
    #[error("{asked} of code memory is too much; the most is {}", ByteSize(LARGEST_CODE as u64))]
    MuchCodeMemory {
        /// What was asked for.
        asked: ByteSize,
    },
    /// Something whose time or data come from outside, in a run that must repeat exactly.
    #[error("a run by the count of instructions (--counted, --engine lockstep) repeats exactly, which {0}")]
    Unrepeatable(&'static str),
    /// Two shared folders that the guest cannot tell apart.
    #[error("two shared folders have the tag {0:?}; give each its own")]
    SameTag(String),
    /// Two ports that the guest cannot tell apart.
    #[error("two ports have the name {0:?}; give each its own")]
    SamePort(String),
    /// More ports than a device has.
    #[error("{0} ports asked for; there can be {MOST_PORTS}")]
    ManyPorts(usize),
    /// An engine that this version does not have.
    #[error(transparent)]
    Engine(#[from] NotOffered),
}

impl MachineSpec {
    /// Checks the description against what can be made on a host with this much memory, and settles the engine.
    ///
    /// # Errors
    /// [`SpecError`] for the first thing that does not fit.
    pub fn check(&self, host: HostMemory) -> Result<Selection, SpecError> {
        let asked = ByteSize(self.memory);
        match self.memory {
            0 => return Err(SpecError::NoMemory),
            n if n < memory_map::SMALLEST => return Err(SpecError::LittleMemory { asked }),
            n if n > memory_map::LARGEST => return Err(SpecError::MuchMemory { asked }),
            n if n % 4096 != 0 => return Err(SpecError::OddMemory { asked }),
            n if n > host.total => {
                return Err(SpecError::MoreThanHost { asked, total: ByteSize(host.total) });
            }
            _ => {}
        }
        if let Some(balloon) = self.balloon.filter(|balloon| *balloon >= self.memory) {
            return Err(SpecError::LargeBalloon { asked: ByteSize(balloon), memory: asked });
        }
        let selection = engine_choice::select(self.engine)?;
        if self.lockstep_batch.is_some() && selection.engine != EngineChoice::Lockstep {
            return Err(SpecError::BatchWithoutLockstep { engine: selection.engine });
        }
        if self.profile && selection.engine != EngineChoice::Jit {
            return Err(SpecError::ProfileWithoutTranslator { engine: selection.engine });
        }
        self.check_code_memory(selection.engine)?;
        self.check_repeatable()?;
        self.check_shares()?;
        self.check_ports()?;
        match self.cpus {
            0 => return Err(SpecError::NoCpus),
            1 => {}
            asked => return Err(SpecError::ManyCpus { asked, engine: selection.engine }),
        }
        Ok(selection)
    }

    /// What a run by the count of instructions cannot have.
    fn check_repeatable(&self) -> Result<(), SpecError> {
        let outside = [
            (!self.nets.is_empty(), "a network does not; use --net none"),
            (
                self.disks.iter().any(DiskSpec::is_limited),
                "a disk with bps= or iops= does not; leave them out",
            ),
            (!self.shares.is_empty(), "a shared folder does not"),
            (self.vsock.is_some(), "sockets to the host do not"),
            (!self.ports.is_empty(), "ports to the host do not"),
            (
                self.console != ConsoleDevice::Serial,
                "a virtio console does not, since its input comes at any time; use a serial one",
            ),
        ];
        match outside.into_iter().find(|(there, _)| *there) {
            Some((_, what)) if self.clock == ClockMode::Counted => Err(SpecError::Unrepeatable(what)),
            _ => Ok(()),
        }
    }

    fn check_shares(&self) -> Result<(), SpecError> {
        let mut tags = BTreeSet::new();
        match self.shares.iter().find(|share| !tags.insert(&share.tag)) {
            Some(share) => Err(SpecError::SameTag(share.tag.clone())),
            None => Ok(()),
        }
    }

    fn check_ports(&self) -> Result<(), SpecError> {
        if self.ports.len() > MOST_PORTS {
            return Err(SpecError::ManyPorts(self.ports.len()));
        }
        let mut names = BTreeSet::new();
        match self.ports.iter().find(|port| !names.insert(&port.name)) {
            Some(port) => Err(SpecError::SamePort(port.name.clone())),
            None => Ok(()),
        }
    }

    fn check_code_memory(&self, engine: EngineChoice) -> Result<(), SpecError> {
        let Some(size) = self.code_memory else { return Ok(()) };
        let asked = ByteSize(size);
        if !matches!(engine, EngineChoice::Jit | EngineChoice::Lockstep) {
            return Err(SpecError::CodeWithoutTranslator { engine });
        }
        match size {
            n if n < SMALLEST_CODE as u64 => Err(SpecError::LittleCodeMemory { asked }),
            n if n > LARGEST_CODE as u64 => Err(SpecError::MuchCodeMemory { asked }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            lockstep_batch: None,
            code_memory: None,
            profile: false,
            engine: EngineChoice::Auto,
            cpus: 1,
            memory: 512 << 20,
            cpu: CpuModel::default(),
            clock: ClockMode::Host,
            disks: Vec::new(),
            nets: Vec::new(),
            shares: Vec::new(),
            vsock: None,
            console: ConsoleDevice::Serial,
            ports: Vec::new(),
            watchdog: None,
            balloon: None,
            boot: BootSpec::default(),
            debug_exit: None,
            no_reboot: false,
        }
    }

    const HOST: HostMemory = HostMemory { total: 8 << 30, available: 1 << 30 };

    #[test]
    fn sensible_machine_is_accepted() {
        assert_eq!(spec().check(HOST).unwrap().engine, EngineChoice::Jit);
    }

    #[test]
    fn each_fault_has_its_error() {
        let check = |change: fn(&mut MachineSpec)| {
            let mut spec = spec();
            change(&mut spec);
            spec.check(HOST).unwrap_err().to_string()
        };
        for (message, expected) in [
            (check(|s| s.memory = 0), "0 bytes"),
            (check(|s| s.memory = 4096), "too little"),
            (check(|s| s.memory = u64::MAX), "too much"),
            (check(|s| s.memory = (64 << 20) + 1), "4K pages"),
            (check(|s| s.memory = 9 << 30), "more than this host has (8G)"),
            (check(|s| s.balloon = Some(512 << 20)), "balloon of 512M"),
            (check(|s| s.shares = vec!["/a:t".parse().unwrap(), "/b:t".parse().unwrap()]), "the tag \"t\""),
            (
                check(|s| {
                    s.shares = vec!["/a:t".parse().unwrap()];
                    s.clock = ClockMode::Counted;
                }),
                "which a shared folder does not",
            ),
            (
                check(|s| {
                    s.vsock = Some("socket=/s".parse().unwrap());
                    s.clock = ClockMode::Counted;
                }),
                "sockets to the host do not",
            ),
            (
                check(|s| s.ports = ["a", "a"].map(|n| format!("name={n},file=x").parse().unwrap()).to_vec()),
                "the name \"a\"",
            ),
            (
                check(|s| s.ports = (0..31).map(|n| format!("name=p{n},file=x").parse().unwrap()).collect()),
                "31 ports asked for; there can be 30",
            ),
            (
                check(|s| {
                    s.ports = vec!["name=a,socket=/s".parse().unwrap()];
                    s.clock = ClockMode::Counted;
                }),
                "ports to the host do not",
            ),
            (
                check(|s| {
                    s.console = ConsoleDevice::Virtio { columns: 0, rows: 0 };
                    s.clock = ClockMode::Counted;
                }),
                "a virtio console does not",
            ),
            (check(|s| s.cpus = 0), "0 CPUs"),
            (check(|s| s.cpus = 2), "one vCPU so far"),
            (check(|s| s.code_memory = Some(4096)), "4K of code memory is too little; the least is 128K"),
            (check(|s| s.code_memory = Some(2 << 30)), "the most is 1G"),
            (
                check(|s| (s.code_memory, s.engine) = (Some(1 << 20), EngineChoice::Interp)),
                "the interp engine keeps no translated code",
            ),
            (check(|s| s.engine = EngineChoice::Kvm), "not in this version"),
        ] {
            assert!(message.contains(expected), "{message}");
        }
    }
}
