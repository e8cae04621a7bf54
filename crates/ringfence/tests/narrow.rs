//! 32-bit code under a 64-bit kernel: a program that goes from one mode to the other.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::file;
use support::image::{BOOT, Session, ensure, nonce, program};
use support::ringfence;

/// Runs the program in a guest with `options`: 32-bit code must give what 64-bit code of the host gives.
fn program_of_both_modes(options: &[&str], rounds: u64, limit: u64) -> Session {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let built = program("narrow", folder.path());
    let mut archive = ringfence_images::cpio::Writer::new();
    archive.file("narrow", 0o755, &std::fs::read(&built).unwrap()).unwrap();
    let extra = file(&archive.finish());
    let (seed, rounds) = ((nonce() % 1_000_000_000).to_string(), rounds.to_string());
    println!("narrow {seed} {rounds}");

    let reference = std::process::Command::new(&built).args([&seed, &rounds, "reference"]).output().unwrap();
    assert!(reference.status.success(), "on the host: {reference:?}");
    let expected = String::from_utf8(reference.stdout).unwrap();
    let expected = expected.trim().strip_prefix("@64 ").unwrap();

    let mut command = ringfence();
    command.arg("run").args(options).args(["--timeout", &limit.to_string(), "--initrd"]).arg(extra.path());
    command.args(["--", "/narrow", &seed, &rounds]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(limit));
    assert_eq!(session.status, Some(0), "{}", session.text());
    for (name, value) in [("64", expected), ("32", expected), ("wrong", "0")] {
        assert_eq!(session.value(name).0, value, "{}", session.text());
    }
    session
}

#[test]
fn program_that_goes_from_mode_to_mode_computes_the_same_in_both_and_is_translated() {
    let session = program_of_both_modes(&["-v", "--engine", "jit"], 5_000_000, 120);
    // Of the instructions executed, a good fifth are 32-bit code.
    let of_a_million = "instructions interpreted per million executed: ";
    let interpreted = session.err.lines().find_map(|line| line.split_once(of_a_million));
    let interpreted: u64 = interpreted.map(|(_, number)| number.trim().parse().unwrap()).unwrap();
    assert!(interpreted < 10_000, "{}", session.text());
}

#[test]
#[ignore = "the same in lock-step, which is slow"]
fn program_that_goes_from_mode_to_mode_computes_the_same_in_both_in_lock_step() {
    program_of_both_modes(&["--engine", "lockstep"], 20_000, 1200);
    program_of_both_modes(&["--engine", "lockstep", "--lockstep-batch", "1000"], 1_000_000, 1200);
}
