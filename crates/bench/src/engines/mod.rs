//! The same programs natively, under QEMU's translator and under Ringfence, in turn, from one disk image.
//!
//! [`root`] makes the disk and compiles the programs of [`catalogue`] once; a [`side`] runs them all in one go and prints what
//! [`transcript`] understands; [`results`] turns rounds into figures, and [`report`] shows them. A figure exists only if every
//! round of a side gave the native result.

mod catalogue;
mod report;
mod results;
mod side;
mod transcript;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::host::{self, FileError, NoRingfence, Steps};
use crate::root::native::{Native, NativeError};
use crate::root::{self, PrepareError};
use crate::sides::{self, SideArguments, UnknownSide};
use results::{Measure, SideRounds, Take};
use side::Side;

/// Options of `bench engines`.
#[derive(Debug, Args)]
pub(crate) struct EnginesArguments {
    /// Programs to measure, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    programs: Vec<String>,

    /// How often each side runs all programs, the sides in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How often a program runs in a round, after one run that is not counted
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..100))]
    repeats: u32,

    /// Sides to run besides Ringfence, separated by commas: native, qemu
    #[arg(long, value_delimiter = ',', default_value = "native,qemu", value_name = "LIST")]
    against: Vec<String>,

    /// What to compare
    #[arg(long, value_enum, default_value_t = Measure::Wall)]
    by: Measure,

    /// Which of a program's times stands for all
    #[arg(long, value_enum, default_value_t = Take::Median)]
    take: Take,

    /// The CPU that QEMU's guest sees
    #[arg(long, default_value = "max", value_name = "MODEL")]
    qemu_cpu: String,

    /// Gives a side up that takes longer for a round, in seconds
    #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
    timeout: u64,

    #[command(flatten)]
    sides: SideArguments,
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnginesError {
    #[error(transparent)]
    Program(#[from] catalogue::UnknownProgram),
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    NoRingfence(#[from] NoRingfence),
    #[error(transparent)]
    Side(#[from] UnknownSide),
    #[error(transparent)]
    File(#[from] FileError),
}

/// What `--against` takes.
const KNOWN: [&str; 2] = ["native", "qemu"];

/// Measures, and prints the report.
pub(crate) fn run(arguments: &EnginesArguments) -> Result<(), EnginesError> {
    let programs = catalogue::choose(&arguments.programs)?;
    sides::check(&arguments.against, &KNOWN)?;
    let ringfence = arguments.sides.program()?;
    let prepared = root::prepare(&catalogue::kit(), &mut Steps)?;
    let mut notes = vec![format!(
        "guests: Linux {}, one vCPU, {} MiB, root on NVMe; {} rounds of 1 + {} runs",
        prepared.kernel_release, arguments.sides.memory, arguments.rounds, arguments.repeats
    )];
    notes.push(match arguments.by {
        Measure::Wall => "compared: time as it passes".to_owned(),
        Measure::Cpu => "compared: processor time, of a guest that of the whole process".to_owned(),
    });
    if arguments.take == Take::Least {
        notes.push("taken: the shortest of all runs, on every side".to_owned());
    }
    let sides = sides(arguments, ringfence, Native::new(&prepared.root), &mut notes);

    let mut words = vec!["/bench/run".to_owned(), (arguments.repeats + 1).to_string()];
    words.extend(programs.iter().map(|program| program.name.to_owned()));
    let mut measured: Vec<SideRounds> = sides
        .iter()
        .map(|side| SideRounds { name: side.name(), is_guest: side.is_guest(), rounds: Vec::new() })
        .collect();
    for number in 1..=arguments.rounds {
        for (side, into) in sides.iter().zip(&mut measured) {
            eprintln!("round {number} of {}: {}", arguments.rounds, into.name);
            let limit = Duration::from_secs(arguments.timeout);
            into.rounds.push(side.run(&prepared, &words, arguments.sides.memory, limit));
        }
    }
    let rows = results::rows(&programs, &measured, arguments.by, arguments.take);
    let facts = report::Facts { host_cpu: host::cpu(), notes };
    print!("{}", report::text(&rows, &measured, &facts));
    arguments.sides.write(|| report::json(&rows, &measured, &facts))?;
    Ok(())
}

/// The sides that can run here; the notes say what they are, and why one cannot.
fn sides(
    arguments: &EnginesArguments,
    ringfence: PathBuf,
    native: Result<Native, NativeError>,
    notes: &mut Vec<String>,
) -> Vec<Side> {
    let mut sides = Vec::new();
    let wanted = |name: &str| arguments.against.iter().any(|side| side == name);
    if wanted("native") {
        match native {
            Ok(native) => sides.push(Side::Native(native)),
            Err(error) => notes.push(format!("native: left out: {error}")),
        }
    }
    if wanted("qemu")
        && let Some((program, version)) = sides::qemu(notes)
    {
        notes.push(format!("qemu: {version}; -accel tcg,thread=single -cpu {}", arguments.qemu_cpu));
        sides.push(Side::Qemu { program, cpu: arguments.qemu_cpu.clone() });
    }
    sides.extend(arguments.sides.ringfence(ringfence, notes).into_iter().map(Side::Ringfence));
    sides
}
