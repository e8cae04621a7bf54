//! The command line: help, listings, and everything that is refused before a machine runs.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use support::{file, finish, ringfence};

/// A guest that would run; refusals must come before it does.
fn run(arguments: &[&str]) -> support::Finished {
    let kernel = support::guest::Guest::new().print("ran").power_off().kernel();
    finish(ringfence().args(["run", "--timeout", "20", "--kernel"]).arg(kernel.path()).args(arguments))
}

#[test]
fn help_teaches_by_example() {
    let general = finish(ringfence().arg("--help"));
    general.expect(0, &[]);
    assert!(general.out.contains("ringfence run") && general.out.contains("doctor"), "{general:?}");
    let help = finish(ringfence().args(["run", "--help"]));
    help.expect(0, &[]);
    for part in ["Examples:", "Exit status:", "Ctrl-]", "--memory", "--debug-exit", "124", "125"] {
        assert!(help.out.contains(part), "{part}: {}", help.out);
    }
}

#[test]
fn no_command_is_wrong_usage() {
    finish(&mut ringfence()).expect(2, &["Usage"]);
}

#[test]
fn missing_kernel_file_is_named() {
    let run = finish(ringfence().args(["run", "--kernel", "/no/such/kernel"]));
    run.expect(125, &["error: ", "/no/such/kernel", "No such file"]);
    assert_eq!(run.err.matches("No such file").count(), 1, "{run:?}");
}

#[test]
fn missing_initrd_is_named() {
    run(&["--initrd", "/no/such/initrd"]).expect(125, &["/no/such/initrd"]);
}

#[test]
fn file_that_is_no_kernel_is_refused() {
    let text = file(b"#!/bin/sh\necho I am a script\n");
    let run = finish(ringfence().args(["run", "--kernel"]).arg(text.path()));
    run.expect(125, &["no kernel of a known format"]);
}

#[test]
fn empty_kernel_is_refused() {
    let empty = file(b"");
    finish(ringfence().args(["run", "--kernel"]).arg(empty.path())).expect(125, &["error: "]);
}

#[test]
fn initrd_that_does_not_fit_is_refused() {
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(80 << 20).unwrap();
    let path = large.path().to_str().unwrap().to_owned();
    run(&["--memory", "64M", "--initrd", &path]).expect(125, &["initrd", "--memory"]);
    // Small enough to be read, but not beside a kernel that lies in between.
    large.as_file().set_len(64 << 20).unwrap();
    run(&["--memory", "64M", "--initrd", &path]).expect(125, &["--memory"]);
}

#[test]
fn impossible_memory_is_refused() {
    for (memory, reason) in [
        ("0", "0 bytes of memory"),
        ("64K", "too little"),
        ("100T", "too much"),
        ("7T", "more than this host has"),
        ("99999999999999999999", "any machine"),
        ("much", "is not a size"),
    ] {
        let run = run(&["--memory", memory]);
        run.expect(2, &[reason]);
        assert!(run.out.is_empty(), "{run:?}");
    }
}

#[test]
fn unknown_values_are_refused() {
    for (arguments, reason) in [
        (["--engine", "tcg"], "auto, kvm, jit"),
        (["--cpu", "z80"], "x86-64-v2"),
        (["--cpus", "many"], "--cpus"),
        (["--cpus", "0"], "0 CPUs"),
        (["--lockstep-batch", "0"], "--lockstep-batch"),
        (["--console", "printer"], "stdio, file=PATH or none"),
        (["--timeout", "soon"], "seconds"),
        (["--debug-exit", "x"], "I/O port"),
        (["--colour", "red"], "--colour"),
    ] {
        run(&arguments).expect(2, &[reason]);
    }
}

#[test]
fn what_is_not_there_yet_is_refused() {
    for (arguments, reason) in [
        (["--engine", "kvm"], "kvm engine is not in this version"),
        (["--code-memory", "64K"], "64K of code memory is too little; the least is 128K"),
        (["--code-memory", "2G"], "the most is 1G"),
        (["--profile-symbols", "map"], "--profile"),
        (["--lockstep-batch", "100"], "--lockstep-batch is for --engine lockstep"),
        (["--cpus", "2"], "one vCPU so far"),
        (["--net", "users"], "is no network"),
        (["--disk", "disk.raw,cache=fast"], "cache can be none, writeback or unsafe"),
        (["--share", ".:../up"], "is no tag"),
        (["--fence", "strict"], "--fence is not in this version"),
    ] {
        run(&arguments).expect(2, &[reason]);
    }
}

#[test]
fn unknown_image_is_refused() {
    finish(ringfence().args(["run", "no-such-image"])).expect(2, &["no-such-image", "shell"]);
}

#[test]
fn console_file_in_a_missing_folder_is_refused() {
    run(&["--console", "file=/no/such/folder/log"]).expect(125, &["/no/such/folder/log"]);
}

#[test]
fn doctor_speaks_to_people_and_programs() {
    let table = finish(ringfence().arg("doctor"));
    table.expect(0, &[]);
    for part in ["CPU", "x86-64", "memory", "/dev/kvm", "apt-get", "transparent huge pages"] {
        assert!(table.out.contains(part), "{part}: {}", table.out);
    }
    let json = finish(ringfence().args(["doctor", "--format", "json"]));
    json.expect(0, &[]);
    let findings: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    let named = |name| findings.as_array().unwrap().iter().any(|f| f["name"] == name);
    assert!(named("FSGSBASE") && named("usable cores"), "{findings:#}");
}

#[test]
fn images_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    // Both: the first would lead to the user's own images, one of which is removed below.
    let image = |arguments: &[&str]| {
        let mut command = ringfence();
        command.env_remove("RINGFENCE_CACHE").env("XDG_CACHE_HOME", folder.path());
        finish(command.arg("image").args(arguments))
    };
    let list = image(&["ls", "--format", "json"]);
    list.expect(0, &[]);
    let images: serde_json::Value = serde_json::from_str(&list.out).unwrap();
    assert!(images.as_array().unwrap().iter().any(|image| image["name"] == "shell"), "{images:#}");
    let rm = image(&["rm", "shell"]);
    rm.expect(0, &[]);
    assert!(rm.out.contains("was not on disk"), "{rm:?}");
    image(&["rm", "x"]).expect(125, &["no image"]);
}
