#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]
//! The conformance tests: small bare-metal guests, run on every engine through the seam, with results that follow from the
//! manuals. They are what keeps the engines the same machine.
//!
//! A guest ends by HLT with interrupts off. Its results are registers and a log in memory.

mod lab;
mod long;
mod modes;
mod platform;
mod translations;

use lab::{Guest, Lab, Report};
use ringfence_engine::Engine;
use ringfence_engine_soft::engine::{InterpreterEngine, JitEngine};
use ringfence_engine_soft::jit::Options;
use ringfence_engine_soft::lockstep::{LockstepEngine, LockstepOptions};

/// One guest: how it is made, and what must have come of it.
struct Case {
    name: &'static str,
    guest: fn() -> Guest,
    check: fn(&Report),
}

/// Every engine that this host can run.
fn engines() -> Vec<Box<dyn Engine>> {
    // A threshold of one, so that the translator sees every block.
    let jit = JitEngine { options: Options { threshold: 1, ..Options::default() } };
    // Lock-step checks itself, so that the results are only half of what these guests show of it.
    let chained =
        LockstepEngine { options: LockstepOptions { batch: Some(200), ..LockstepOptions::default() } };
    vec![
        Box::new(InterpreterEngine),
        Box::new(JitEngine::default()),
        Box::new(jit),
        Box::new(LockstepEngine::default()),
        Box::new(chained),
    ]
}

fn run_all(cases: &[Case]) {
    for engine in engines() {
        for case in cases {
            let guest = (case.guest)();
            let report = Lab::new(engine.as_ref()).run(&guest);
            println!("{}: {}: {} instructions", engine.name(), case.name, report.instructions);
            (case.check)(&report);
        }
    }
}

#[test]
fn long_mode_guests_give_the_expected_results() {
    run_all(long::CASES);
}

#[test]
fn real_and_protected_mode_guests_give_the_expected_results() {
    run_all(modes::CASES);
}

#[test]
fn platform_guests_get_their_interrupts() {
    run_all(platform::CASES);
}

#[test]
fn guests_that_remap_their_code_run_the_new_one() {
    run_all(translations::CASES);
}
