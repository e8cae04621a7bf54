//! Memory that a guest gives up, or has free, is the host's again.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use support::image::ensure;
use support::{read_until, ringfence, wait};

/// The process's own memory, in MiB.
fn resident(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// Fills memory and frees it.
const GUEST: &str = r#"
dd if=/dev/urandom of=/tmp/full bs=1M count=200 2>/dev/null; echo "@full"
sleep 1; rm /tmp/full; echo "@freed"
sleep 300
"#;

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    ensure("shell");
    let mut child = ringfence()
        .args(["run", "--engine", "jit", "--memory", "512M", "--balloon", "0", "--timeout", "290"])
        .args(["--", "sh", "-c", GUEST])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    read_until(&mut out, "@full");
    let full = resident(&child);
    assert!(full >= 200, "200 MiB are in use, {full} MiB resident");
    read_until(&mut out, "@freed");
    // Linux reports free pages two seconds after they are.
    let end = Instant::now() + Duration::from_secs(60);
    let mut now = full;
    while now + 150 > full && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
        now = resident(&child);
    }
    child.kill().unwrap();
    wait(&mut child, Duration::from_secs(20));
    assert!(now + 150 <= full, "of {full} MiB, {now} are still resident");
}
