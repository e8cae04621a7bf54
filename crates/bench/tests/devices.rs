//! `bench devices` from end to end on three tests: disk, files, servers, the host's figures, a guest's, and the report. QEMU is
//! left out, so that it takes seconds.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ringfence_images::Catalogue;
use serde_json::Value;

/// The command beside this test, or why it cannot be measured.
fn ringfence() -> Result<PathBuf, String> {
    let path = Path::new(env!("CARGO_BIN_EXE_ringfence-bench")).with_file_name("ringfence");
    if !path.is_file() {
        return Err(format!("`{}` is not built; `cargo build -p ringfence` first", path.display()));
    }
    let catalogue = Catalogue::builtin().map_err(|error| error.to_string())?;
    catalogue.find("debian:io").map_err(|error| error.to_string())?;
    Ok(path)
}

#[test]
fn disks_and_network_are_measured_on_the_host_and_in_a_guest() {
    let ringfence = match ringfence() {
        Ok(path) => path,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_ringfence-bench"))
        .args(["devices", "--rounds", "1", "--seconds", "1", "--against", "host", "--memory", "256"])
        // A side that does not end fails; making the files takes as long again, once.
        .args(["--tests", "virtio/randwrite-1,nvme/read-1m,net/tcp-1", "--timeout", "90", "--ringfence"])
        .arg(ringfence)
        .arg("--json")
        .arg(&json)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let [text, said] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let missing = ["running in the image's files needs root", "is not on this host", "qemu-img, which makes"];
    if missing.iter().any(|reason| said.contains(reason)) {
        return println!("skipped: {said}");
    }
    assert!(output.status.success(), "{text}{said}");
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let tests = report["tests"].as_array().unwrap();
    assert_eq!(tests.len(), 3, "{report:#}");
    for test in tests {
        for side in ["host", "ringfence"] {
            let figure = &test["figures"][side];
            let busy = figure["failed"].as_str().is_some_and(|reason| reason.starts_with("its clock went"));
            if busy {
                println!("{side}: no figure on this busy host: {figure}");
            } else {
                assert!(figure["median"].as_f64().is_some_and(|value| value > 0.0), "{report:#}");
            }
        }
    }
    for part in ["virtio/randwrite-1 | op/s", "net/tcp-1 | us", "ringfence to host"] {
        assert!(text.contains(part), "no {part:?} in the report:\n{text}");
    }
}
