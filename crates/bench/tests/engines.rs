//! `bench engines` from end to end on one small program: disk, native side, a guest's boot, comparison and report. QEMU is left
//! out, so that it takes seconds.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ringfence_images::Catalogue;
use serde_json::Value;

/// The longest that a side may take, in seconds: a guest boots in a few, on a busy host in more.
const SIDE: &str = "60";
/// The longest that all may take, the disk's making included, which is done once.
const ALL: Duration = Duration::from_secs(200);

/// The command beside this test, or why it cannot be measured.
fn ringfence() -> Result<PathBuf, String> {
    let path = Path::new(env!("CARGO_BIN_EXE_ringfence-bench")).with_file_name("ringfence");
    if !path.is_file() {
        return Err(format!("`{}` is not built; `cargo build -p ringfence` first", path.display()));
    }
    let catalogue = Catalogue::builtin().map_err(|error| error.to_string())?;
    catalogue.find("debian:dev").map_err(|error| error.to_string())?;
    Ok(path)
}

/// Waits for the end, but not for ever.
fn finish(mut child: Child) -> Output {
    let end = Instant::now() + ALL;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            let _ = child.kill();
            let output = child.wait_with_output().unwrap();
            panic!("not done within {ALL:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn one_program_is_measured_natively_and_in_a_guest() {
    let ringfence = match ringfence() {
        Ok(path) => path,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let child = Command::new(env!("CARGO_BIN_EXE_ringfence-bench"))
        .args(["engines", "--programs", "getppid", "--rounds", "1", "--repeats", "1", "--against", "native"])
        .args(["--memory", "256", "--timeout", SIDE, "--ringfence"])
        .arg(ringfence)
        .arg("--json")
        .arg(&json)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = finish(child);
    let [text, said] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    if said.contains("running in the image's files needs root") || said.contains("is not on this host") {
        return println!("skipped: {said}");
    }
    assert!(output.status.success(), "{text}{said}");

    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let program = |name: &str| {
        let all = report["programs"].as_array().unwrap();
        all.iter().find(|program| program["name"] == name).unwrap_or_else(|| panic!("no {name}: {report:#}"))
    };
    // Every run has a time, whatever became of it.
    let runs = &report["rounds"]["ringfence"][0];
    assert_eq!(runs["failure"], Value::Null, "{report:#}");
    let times = runs["seconds"]["getppid"]["wall"].as_array().unwrap();
    assert!(times.len() == 2 && times.iter().all(|time| time.as_f64().unwrap() > 0.0), "{times:?}");
    assert!(program("boot")["figures"]["ringfence"]["seconds"].as_f64().unwrap() > 0.0, "{report:#}");
    // A figure stands for the native result.
    let figures = &program("getppid")["figures"];
    for side in ["native", "ringfence"] {
        let busy =
            figures[side]["failed"].as_str().is_some_and(|reason| reason.starts_with("its clock went"));
        if busy {
            println!("{side}: no figure on this busy host: {}", figures[side]);
        } else {
            assert!(figures[side]["seconds"].as_f64().is_some_and(|time| time > 0.0), "{figures:#}");
        }
    }
    for part in ["getppid", "kernel-heavy", "ringfence/native", "geometric mean, all", "CPU weaknesses"] {
        assert!(text.contains(part), "no {part:?} in the report:\n{text}");
    }
}
