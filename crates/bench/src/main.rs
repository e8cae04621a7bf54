//! Measurements of Ringfence, each a ratio or a rate within one run.

#![forbid(unsafe_code)]

mod collect;
mod devices;
mod engines;
mod host;
mod interpreter;
mod privileged;
mod root;
mod sides;
mod translation;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Ringfence on this host.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Guest instructions per second on integer code, interpreted and translated.
    Interpreter {
        /// How long to measure each program, in seconds.
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Nanoseconds for changes of privilege, exceptions and privileged instructions.
    Privileged(privileged::PrivilegedArguments),
    /// Whole programs natively, under QEMU and under Ringfence, from the same disk.
    Engines(engines::EnginesArguments),
    /// Disks and the network beside QEMU's translator and the host itself: operations, throughput, round trips.
    Devices(devices::DevicesArguments),
    /// What translating a program's code costs; nothing is executed.
    Translation(translation::TranslationArguments),
}

fn main() -> ExitCode {
    let result: Result<(), Box<dyn Error>> = match Arguments::parse().what {
        What::Interpreter { seconds } => {
            interpreter::measure(seconds);
            Ok(())
        }
        What::Privileged(arguments) => privileged::measure(&arguments).map_err(Into::into),
        What::Engines(arguments) => engines::run(&arguments).map_err(Into::into),
        What::Devices(arguments) => devices::run(&arguments).map_err(Into::into),
        What::Translation(arguments) => translation::measure(&arguments).map_err(Into::into),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    eprintln!("error: {text}");
    ExitCode::FAILURE
}
