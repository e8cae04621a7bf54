//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ringfence_machine::{
    ByteSize, CpuModel, DiskFormat, DiskSpec, EngineChoice, NET_SUBCOMMAND, NetSpec, NetSpecError, PortSpec,
    SHARE_SUBCOMMAND, ShareSpec, VSOCK_SUBCOMMAND, VsockSpec, WatchdogAction,
};

/// Virtual machines that run anywhere.
#[derive(Debug, Parser)]
#[command(name = "ringfence", version, about, max_term_width = 110, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ringfence run                          a shell in a fresh machine (fetches the image `shell` once)
  ringfence run -- sh -c 'uname -a'      run a command there; its status is ours
  ringfence doctor                       what this host offers, and what it lacks

`ringfence run --help` explains every option.";

const RUN_EXAMPLES: &str = "\
Examples:
  ringfence run
  ringfence run -- sh -c 'cat /proc/cpuinfo; exit 3'
  ringfence run --memory 1G --timeout 60 --console file=boot.log
  ringfence run --kernel bzImage --initrd root.cpio --append 'root=/dev/ram0 loglevel=7'
  echo 'date; poweroff' | ringfence run

The console is the guest's first serial port, or with --console virtio a virtio console. On a terminal, Ctrl-] leaves it and ends the machine; every other
key, Ctrl-C too, goes to the guest. Input that is not a terminal is handed to the guest as it is, and its end
changes nothing.

Exit status:
  0        the guest switched itself off, or reset with --no-reboot, or Ctrl-] was typed at a shell
  N        the command's own status, with -- COMMAND
  (V<<1)|1 the guest wrote V to the --debug-exit port
  2        wrong usage: an unknown option or value, or one that this version or host cannot offer
  124      --timeout ran out
  125      a failure of ringfence or of the guest (a triple fault, a kernel panic, a watchdog neglected); the reason is on
           standard error
  128+N    ended by signal N: 129 SIGHUP, 130 SIGINT (or Ctrl-] before COMMAND was done), 131 SIGQUIT,
           141 nobody reads our output any more, 143 SIGTERM";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a machine in the foreground, its console attached
    #[command(after_help = RUN_EXAMPLES, args_override_self = true)]
    Run(Box<RunArguments>),
    /// List, fetch and remove guest images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Tell what this host offers, and what it lacks
    Doctor(Listing),
    /// The process behind a machine's network card
    #[command(name = NET_SUBCOMMAND, hide = true)]
    NetHelper {
        /// As --net has it
        spec: String,
    },
    /// The process behind vsock
    #[command(name = VSOCK_SUBCOMMAND, hide = true)]
    VsockHelper {
        /// As --vsock has it
        spec: String,
    },
    /// The process behind a shared folder
    #[command(name = SHARE_SUBCOMMAND, hide = true)]
    ShareHelper {
        /// As --share has it
        spec: String,
    },
}

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Listing {
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// List the images and what is on disk
    Ls(Listing),
    /// Fetch an image, or a newer version of it
    Pull {
        /// Its name, as `image ls` shows it
        #[arg(default_value = "shell")]
        name: String,
    },
    /// Remove an image from disk
    Rm {
        /// Its name, as `image ls` shows it
        name: String,
    },
    /// Make a disk image for `run --disk`: empty, or standing on another
    Create(NewDisk),
}

#[derive(Debug, Args)]
pub(crate) struct NewDisk {
    /// The file to make; one that is there is left alone
    pub(crate) file: PathBuf,

    /// Size of the disk, such as 10G [default: that of the backing file]
    #[arg(long, value_name = "SIZE", required_unless_present = "backing")]
    pub(crate) size: Option<ByteSize>,

    /// Format of the file: raw (the disk's bytes, in a file with holes) or qcow2 (grows as it is written to) [default: raw,
    /// with --backing qcow2]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<DiskFormat>,

    /// File that the new image stands on: what is not written to the new one is read from it. A relative path starts from
    /// the new image's folder. Nobody may write to it any more
    #[arg(long, value_name = "FILE", requires = "backing_format")]
    pub(crate) backing: Option<PathBuf>,

    /// Format of the backing file: raw or qcow2
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub(crate) backing_format: Option<DiskFormat>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The image to boot [default: shell, unless --kernel is given]
    #[arg(conflicts_with = "kernel")]
    pub(crate) image: Option<String>,

    /// Command to run in the image instead of a shell; its exit status becomes ours
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "kernel")]
    pub(crate) command: Vec<String>,

    /// Who executes the guest: auto (the fastest that works here), kvm, jit, interp or lockstep (jit and interp side by
    /// side; the first difference stops them)
    #[arg(long, value_name = "ENGINE", default_value_t)]
    pub(crate) engine: EngineChoice,

    /// With --engine lockstep: compare after so many instructions, instead of after each translated block, so that
    /// blocks lead to one another as they do with --engine jit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) lockstep_batch: Option<u64>,

    /// With --engine jit or lockstep: most memory for translated code, from 128K to 1G; when it is full, everything is
    /// translated anew [default: 128M]
    #[arg(long, value_name = "SIZE")]
    pub(crate) code_memory: Option<ByteSize>,

    /// With --engine jit: write to this file, at the end, where the guest's instructions were: symbols, pages and blocks,
    /// and which instructions were left to the interpreter. Samples are taken every 16381 instructions, so that shares are
    /// of instructions executed, not of time
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,

    /// With --profile: the guest kernel's symbols, as in System.map or the guest's own /proc/kallsyms (without --kaslr they
    /// are the same in every run)
    #[arg(long, value_name = "FILE", requires = "profile")]
    pub(crate) profile_symbols: Option<PathBuf>,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,

    /// Size of the guest's memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(512 << 20))]
    pub(crate) memory: ByteSize,

    /// Give the machine a balloon: the guest gives SIZE of its memory up from the start (0 for none of it), and what it
    /// has free goes back to the host by and by
    #[arg(long, value_name = "SIZE")]
    pub(crate) balloon: Option<ByteSize>,

    /// The CPU that the guest sees: x86-64-v2, x86-64-v3, host (all that this host has), or auto (the same without what the
    /// translator would run slowly)
    #[arg(long, value_name = "MODEL", default_value_t)]
    pub(crate) cpu: CpuModel,

    /// Kernel to boot: a bzImage, an ELF vmlinux, or a PVH or Multiboot kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Disk: an image or block device, with options format=raw|qcow2 (never guessed) [default: raw], backing=FOLDER (where
    /// a qcow2 image's backing files may be), readonly, ephemeral (writes vanish with the machine), cache=none|writeback|unsafe,
    /// block-size=512|4096, bus=nvme|virtio, bps=BYTES and iops=OPERATIONS (limits per second), io=auto|uring|threads|sync
    /// (repeatable)
    #[arg(long, value_name = "FILE[,OPTION]...")]
    pub(crate) disk: Vec<DiskSpec>,

    /// Initial RAM disk, or Multiboot module; with an image, files to add to its own (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Vec<PathBuf>,

    /// More kernel command line, behind ours (repeatable)
    #[arg(long, value_name = "STRING")]
    pub(crate) append: Vec<String>,

    /// Network card: user (a NAT of our own, which needs no rights), tap=NAME or none [default: user]. Options of user:
    /// forward=tcp:127.0.0.1:2222:22 or udp:… (a port of the host that leads to the guest; repeatable), restrict=yes (no
    /// way out but forwards), dns=ADDRESS or ADDRESS:PORT (instead of the host's resolver); of every card: mac=ADDRESS, mtu=BYTES,
    /// bps=BYTES and pps=PACKETS (limits per second in each direction), queues=N (pairs of queues, up to 16; one for each CPU if not
    /// given). The host is 10.0.2.2 there (repeatable)
    #[arg(long, value_name = "NET[,OPTION]...")]
    pub(crate) net: Vec<NetArgument>,

    /// Share the folder DIR with the guest, as the virtio-fs device TAG; readonly for a guest that may change nothing. Our images
    /// mount it at /mnt/TAG, others by `mount -t virtiofs TAG PLACE`. Files of the user who runs Ringfence are root's in the
    /// guest, all others nobody's, unless root runs it (repeatable)
    #[arg(long, value_name = "DIR:TAG[,readonly]")]
    pub(crate) share: Vec<ShareSpec>,

    /// Sockets between guest and host, without a network: cid=N,socket=PATH, where N (3 if it is not given) is the guest's number. A
    /// guest's connection to port P of the host goes to the socket PATH_P; a program of the host that connects to PATH and writes
    /// `CONNECT P` and a line feed is connected to port P of the guest when it reads `OK` and a number
    #[arg(long, value_name = "[cid=N,]socket=PATH")]
    pub(crate) vsock: Option<VsockSpec>,

    /// A stream of bytes between a program of the guest, which has /dev/virtio-ports/NAME, and the host: at socket=PATH, a Unix
    /// socket that one program at a time connects to, or into file=PATH, which is made anew (repeatable)
    #[arg(long, value_name = "name=NAME,socket=PATH|file=PATH")]
    pub(crate) port: Vec<PortSpec>,

    /// Where the guest's console goes: stdio, file=PATH (output only) or none; and which device it is: serial (/dev/ttyS0) or virtio
    /// (/dev/hvc0, which follows the size of the terminal's window) [default: stdio,device=serial]. A device alone means stdio
    #[arg(long, value_name = "WHERE[,device=DEVICE]", default_value = "stdio", hide_default_value = true)]
    pub(crate) console: ConsoleArgument,

    /// Give the machine a watchdog, and say what happens when the guest, having started it, neglects it: reset, poweroff (the
    /// machine ends, with status 125) or none (you are told). With --no-reboot or a COMMAND, reset ends the machine too
    #[arg(long, value_name = "ACTION")]
    pub(crate) watchdog: Option<WatchdogAction>,

    /// End the machine after so many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) timeout: Option<Duration>,

    /// After SIGTERM presses the guest's power button, end the machine after so many seconds if it is still on; a guest
    /// that does not listen to the button is ended at once
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "10")]
    pub(crate) stop_timeout: Duration,

    /// End the machine when the guest resets, instead of booting it again
    #[arg(long)]
    pub(crate) no_reboot: bool,

    /// Place the kernel at a random address, as its own boot code would
    #[arg(long)]
    pub(crate) kaslr: bool,

    /// Let the kernel unpack itself in the guest (slower), instead of unpacking it on the host
    #[arg(long)]
    pub(crate) decompress_in_guest: bool,

    /// Let the guest's time follow its count of instructions, one nanosecond each, so that a run repeats exactly
    #[arg(long)]
    pub(crate) counted: bool,

    /// Keep no translated code between runs (accepted; the engine of this version keeps none anyway)
    #[arg(long)]
    pub(crate) no_code_cache: bool,

    /// Port for the guest to end the machine: writing V there gives exit status (V<<1)|1
    #[arg(long, value_name = "PORT", value_parser = parse_port)]
    pub(crate) debug_exit: Option<u16>,

    /// Tell on standard error what is done, and figures at the end
    #[arg(short, long)]
    pub(crate) verbose: bool,

    // Known, so that the refusal can say what the matter is instead of "unexpected argument".
    #[arg(long, hide = true, value_name = "LEVEL")]
    fence: Option<String>,
}

/// An option that is planned but not there.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not in this version{1}")]
pub(crate) struct NotYet(String, &'static str);

impl RunArguments {
    /// Refuses options whose feature does not exist yet; silently ignoring them would be worse.
    pub(crate) fn refuse_what_is_not_there(&self) -> Result<(), NotYet> {
        if self.fence.is_some() {
            return Err(NotYet("--fence".to_owned(), "; the machine runs with the rights of its user"));
        }
        Ok(())
    }
}

/// A network card, or that there is to be none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetArgument(pub(crate) Option<NetSpec>);

impl FromStr for NetArgument {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|spec| Self(Some(spec))) }
    }
}

/// Where the guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConsoleTarget {
    Stdio,
    File(PathBuf),
    None,
}

/// The guest's console: where it goes, and whether it is a virtio device instead of a serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConsoleArgument {
    pub(crate) target: ConsoleTarget,
    pub(crate) virtio: bool,
}

impl FromStr for ConsoleArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut console = Self { target: ConsoleTarget::Stdio, virtio: false };
        for part in text.split(',') {
            match (part, part.split_once('=')) {
                ("stdio", _) => console.target = ConsoleTarget::Stdio,
                ("none", _) => console.target = ConsoleTarget::None,
                (_, Some(("file", path))) if !path.is_empty() => {
                    console.target = ConsoleTarget::File(path.into());
                }
                ("serial", _) | (_, Some(("device", "serial"))) => console.virtio = false,
                ("virtio", _) | (_, Some(("device", "virtio"))) => console.virtio = true,
                _ => {
                    return Err(
                        "choose stdio, file=PATH or none, and device=serial or device=virtio".to_owned()
                    );
                }
            }
        }
        Ok(console)
    }
}

/// The longest timeout, in seconds: a hundred years.
const LONGEST_TIMEOUT: f64 = 100.0 * 365.25 * 86_400.0;

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give a number of seconds, such as 30 or 0.5".to_owned())?;
    if !(0.001..=LONGEST_TIMEOUT).contains(&seconds) {
        return Err("give a number of seconds from 0.001 to a hundred years".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn parse_port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "give an I/O port from 0 to 0xffff, such as 0xf4".to_owned())
}

#[cfg(test)]
mod tests;
