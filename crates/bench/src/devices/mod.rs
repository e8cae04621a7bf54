//! Disks and the network on the host itself, under QEMU's translator and under Ringfence, in turn, in one run.
//!
//! [`root`] makes the disk with fio, iperf3 and qperf from Debian's packages; [`stores`] are the files behind the measured disks
//! and the servers behind the network, the same for all; a [`side`] runs the tests of [`catalogue`] in one go; [`report`]
//! shows medians and ratios.

mod catalogue;
mod report;
mod side;
mod stores;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::host::{self, FileError, NoRingfence, Steps};
use crate::root::native::{Native, NativeError};
use crate::root::{self, PrepareError};
use crate::sides::{self, SideArguments, UnknownSide};
use catalogue::Device;
use report::SideRounds;
use side::{Setting, Side};
use stores::{Servers, StoreError};

/// Options of `bench devices`.
///
/// Guests have one vCPU, their root on NVMe, and the measured devices: a raw disk on virtio, one on NVMe, a qcow2 disk on
/// virtio, each of 512 MiB that are in the host's page cache (unless --cache none), and a virtio network card behind
/// user networking, whose peers are on the host's loopback. QEMU has its best options: an I/O thread for each virtio
/// disk, io_uring (or native asynchronous I/O without the page cache). The host runs the same programs from the same files, on one
/// processor, on the files behind the disks and on its loopback.
///
/// The first run makes the image debian:io (about 100 MB of packages) and 1.5 GiB of files in the cache, under bench.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct DevicesArguments {
    /// What to measure, separated by commas: devices (virtio, nvme, qcow2, net), tests (randread-1, randwrite-1, randread-32,
    /// randwrite-32: 4 KiB, so many at a time; read-1m, write-1m; to-host, to-guest: TCP; tcp-1, udp-1: round trips of
    /// one byte), or both as virtio/read-1m [default: all]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    tests: Vec<String>,

    /// How often each side runs all tests, the sides in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How long a test takes, in whole seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..600))]
    seconds: u32,

    /// Whether disks go through the host's page cache: writeback or none
    #[arg(long, default_value = "writeback", value_parser = ["writeback", "none"], value_name = "MODE")]
    cache: String,

    /// Sides to run besides Ringfence, separated by commas: host, qemu
    #[arg(long, value_delimiter = ',', default_value = "host,qemu", value_name = "LIST")]
    against: Vec<String>,

    /// Threads of QEMU's translator: single or multi
    #[arg(long, default_value = "multi", value_parser = ["single", "multi"], value_name = "MODE")]
    qemu_thread: String,

    /// How QEMU reads and writes files: io_uring, native (without the page cache only) or threads [default: native with
    /// --cache none, else io_uring]
    #[arg(long, value_parser = ["io_uring", "native", "threads"], value_name = "WAY")]
    qemu_aio: Option<String>,

    /// Has QEMU's virtio disks on its main thread instead of one thread for each
    #[arg(long)]
    qemu_no_iothread: bool,

    /// Gives a side up that takes longer for a round, in seconds
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,

    #[command(flatten)]
    sides: SideArguments,
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevicesError {
    #[error(transparent)]
    Test(#[from] catalogue::UnknownTest),
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error("the image's programs, which serve the network too, cannot run on the host")]
    Native(#[from] NativeError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    NoRingfence(#[from] NoRingfence),
    #[error(transparent)]
    Side(#[from] UnknownSide),
    #[error(transparent)]
    File(#[from] FileError),
}

/// What `--against` takes.
const KNOWN: [&str; 2] = ["host", "qemu"];

/// Measures, and prints the report.
pub(crate) fn run(arguments: &DevicesArguments) -> Result<(), DevicesError> {
    let cases = catalogue::choose(&arguments.tests)?;
    sides::check(&arguments.against, &KNOWN)?;
    let ringfence = arguments.sides.program()?;
    let prepared = root::prepare(&catalogue::kit(), &mut Steps)?;
    let native = Native::new(&prepared.root)?;
    // All disks are there whenever one is, so that their names in the guest are the same.
    let disks = cases.iter().any(|case| case.device != Device::Net);
    let net = cases.iter().any(|case| case.device == Device::Net);
    let devices: Vec<Device> =
        Device::ALL.into_iter().filter(|device| if *device == Device::Net { net } else { disks }).collect();
    stores::make(&prepared.root, &devices)?;
    let servers = Servers::start(&native)?;

    let mut notes = vec![
        format!(
            "guests: Linux {}, one vCPU, {} MiB; {} rounds, {} s a test, disks with cache={}",
            prepared.kernel_release,
            arguments.sides.memory,
            arguments.rounds,
            arguments.seconds,
            arguments.cache
        ),
        format!("host: {}", host::cpu()),
    ];
    let sides = sides(arguments, ringfence, native, &mut notes);
    let setting = Setting {
        prepared: &prepared,
        cases: &cases,
        devices: &devices,
        ports: servers.ports,
        seconds: arguments.seconds.into(),
        memory: arguments.sides.memory,
        uncached: arguments.cache == "none",
        limit: Duration::from_secs(arguments.timeout),
    };
    let mut measured: Vec<SideRounds> =
        sides.iter().map(|side| SideRounds { name: side.name(), rounds: Vec::new() }).collect();
    for number in 1..=arguments.rounds {
        for (side, into) in sides.iter().zip(&mut measured) {
            eprintln!("round {number} of {}: {}", arguments.rounds, into.name);
            stores::warm(&prepared.root, &devices)?;
            into.rounds.push(side.run(&setting));
        }
    }
    print!("{}", report::text(&cases, &measured, &notes));
    arguments.sides.write(|| report::json(&cases, &measured, &notes))?;
    Ok(())
}

/// The sides; the notes say what they are, and why one is missing.
fn sides(
    arguments: &DevicesArguments,
    ringfence: PathBuf,
    native: Native,
    notes: &mut Vec<String>,
) -> Vec<Side> {
    let mut sides = Vec::new();
    let wanted = |name: &str| arguments.against.iter().any(|side| side == name);
    if wanted("host") {
        sides.push(Side::Host(native));
    }
    if wanted("qemu")
        && let Some((program, version)) = sides::qemu(notes)
    {
        let thread = arguments.qemu_thread.clone();
        let default = if arguments.cache == "none" { "native" } else { "io_uring" };
        let aio = arguments.qemu_aio.clone().unwrap_or_else(|| default.to_owned());
        let iothread = !arguments.qemu_no_iothread;
        notes.push(format!(
            "qemu: {version}; -accel tcg,thread={thread} -cpu max; aio={aio}, I/O threads for virtio disks: {}",
            if iothread { "yes" } else { "no" }
        ));
        sides.push(Side::Qemu { program, thread, aio, iothread });
    }
    sides.extend(arguments.sides.ringfence(ringfence, notes).into_iter().map(Side::Ringfence));
    sides
}
