//! Measurements of Ringfence, each a ratio or a rate within one run.

#![forbid(unsafe_code)]

mod interpreter;

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
}

fn main() {
    match Arguments::parse().what {
        What::Interpreter { seconds } => interpreter::measure(seconds),
    }
}
