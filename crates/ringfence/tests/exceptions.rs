//! A program that does not mask floating-point exceptions, in a guest and on the host.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::file;
use support::image::{BOOT, Session, ensure, nonce, program};
use support::ringfence;

/// Runs the program in a guest with `options`: its handler must find what it finds on the host.
fn program_that_raises(options: &[&str], rounds: u64, limit: u64) -> Session {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let built = program("exceptions", folder.path());
    let mut archive = ringfence_images::cpio::Writer::new();
    archive.file("exceptions", 0o755, &std::fs::read(&built).unwrap()).unwrap();
    let extra = file(&archive.finish());
    let (seed, rounds) = ((nonce() % 1_000_000_000).to_string(), rounds.to_string());
    println!("exceptions {seed} {rounds}");

    let reference = std::process::Command::new(&built).args([&seed, &rounds]).output().unwrap();
    assert!(reference.status.success(), "on the host: {reference:?}");
    let expected = String::from_utf8(reference.stdout).unwrap();

    let mut command = ringfence();
    command.arg("run").args(options).args(["--timeout", &limit.to_string(), "--initrd"]).arg(extra.path());
    command.args(["--", "/exceptions", &seed, &rounds]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(limit));
    assert_eq!(session.status, Some(0), "{}", session.text());
    for line in expected.lines() {
        let (name, value) = line.strip_prefix('@').unwrap().split_once(' ').unwrap();
        assert_eq!(session.value(name).0, value, "{name} of {expected}: {}", session.text());
    }
    for unit in ["simd", "x87"] {
        let raised: u64 = session.value(unit).0.parse().unwrap();
        assert!(raised > rounds.parse::<u64>().unwrap() / 20, "{raised} of {unit}");
    }
    session
}

#[test]
fn handler_of_unmasked_exceptions_finds_in_translated_code_what_it_finds_on_the_host() {
    let session = program_that_raises(&["-v", "--engine", "jit"], 50_000, 120);
    let of_a_million = "instructions interpreted per million executed: ";
    let interpreted = session.err.lines().find_map(|line| line.split_once(of_a_million));
    let interpreted: u64 = interpreted.map(|(_, number)| number.trim().parse().unwrap()).unwrap();
    assert!(interpreted < 3_000, "{}", session.text());
}

#[test]
fn handler_of_unmasked_exceptions_finds_in_interpreted_code_what_it_finds_on_the_host() {
    program_that_raises(&["--engine", "interp"], 20_000, 120);
}

#[test]
#[ignore = "the same in lock-step, which is slow"]
fn handler_of_unmasked_exceptions_finds_the_same_in_lock_step() {
    program_that_raises(&["--engine", "lockstep"], 2_000, 1200);
    program_that_raises(&["--engine", "lockstep", "--lockstep-batch", "1000"], 20_000, 1200);
}
