//! Measurements of Ringfence, each a ratio or a rate within one run.

#![forbid(unsafe_code)]

mod engines;
mod interpreter;

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
    /// Whole programs natively, under QEMU and under Ringfence, from the same disk.
    Engines(engines::EnginesArguments),
}

fn main() -> ExitCode {
    match Arguments::parse().what {
        What::Interpreter { seconds } => interpreter::measure(seconds),
        What::Engines(arguments) => {
            if let Err(error) = engines::run(&arguments) {
                let mut text = error.to_string();
                let mut cause = error.source();
                while let Some(inner) = cause {
                    text.push_str(&format!(": {inner}"));
                    cause = inner.source();
                }
                eprintln!("error: {text}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
