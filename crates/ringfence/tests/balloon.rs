//! Memory that a guest gives up, or has free, is the host's again.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::Read;
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

const KERNELS: [&str; 2] = ["shell", "shell:6.12"];

/// A machine of 512 MiB with a balloon, whose guest runs `script`.
fn machine(image: &str, options: &[&str], script: &str) -> Child {
    ensure(image);
    let mut command = ringfence();
    command.args(["run", image, "--memory", "512M", "--timeout", "290", "--net", "none"]).args(options);
    command.args(["--", "sh", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the process has no more than `most` MiB; what it has then.
fn shrinks_to(child: &Child, most: u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let now = resident(child);
        if now <= most || Instant::now() > end {
            return now;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The number that the guest says behind `@name`.
fn said(out: &mut impl Read, name: &str) -> u64 {
    read_until(out, &format!("@{name} "));
    read_until(out, "\n").trim().parse().unwrap()
}

/// Fills memory and frees it.
const FREES: &str = r#"
dd if=/dev/urandom of=/tmp/full bs=1M count=200 2>/dev/null; echo "@full"
sleep 1; rm /tmp/full; echo "@freed"
sleep 300
"#;

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    for image in KERNELS {
        let mut child = machine(image, &["--balloon", "0"], FREES);
        let mut out = child.stdout.take().unwrap();
        read_until(&mut out, "@full");
        let full = resident(&child);
        assert!(full >= 200, "200 MiB are in use, {full} MiB resident");
        read_until(&mut out, "@freed");
        // Linux reports free pages two seconds after they are.
        let now = shrinks_to(&child, full - 150);
        child.kill().unwrap();
        wait(&mut child, Duration::from_secs(20));
        assert!(now + 150 <= full, "{image}: of {full} MiB, {now} are still resident");
    }
}

/// Fills memory without a driver for the balloon, which lets go of what it has, then with one, then without again. Says each time
/// how many MiB are free.
const GIVES_UP: &str = r#"
free() { sed -n 's/^MemFree: *\([0-9]*\).*/\1/p' /proc/meminfo; }
say() { echo "@$1 $(($(free) / 1024))"; }
go() { until [ -e /mnt/t/go ]; do sleep 0.1; done; rm /mnt/t/go; }
rmmod virtio_balloon || exit 9
dd if=/dev/urandom of=/tmp/full bs=1M count=220 2>/dev/null; rm /tmp/full; say freed
go
modprobe virtio_balloon || exit 8
for i in $(seq 300); do [ $(free) -lt 280000 ] && break; sleep 0.1; done; say inflated
go
rmmod virtio_balloon || exit 7
say deflated
dd if=/dev/urandom of=/tmp/full bs=1M count=220 2>/dev/null; sum=$(sha256sum </tmp/full)
[ "$sum" = "$(sha256sum </tmp/full)" ] || exit 6
say full
sleep 300
"#;

/// Linux 6.12 cannot take its driver out again: it loses its way among the queues that a balloon does not have.
#[test]
fn balloon_takes_memory_from_guest_and_process_and_gives_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let (go, share) = (folder.path().join("go"), format!("{}:t", folder.path().display()));
    let mut child = machine("shell", &["--balloon", "200M", "--share", &share], GIVES_UP);
    let mut out = child.stdout.take().unwrap();
    let mut said = |name: &str| said(&mut out, name);
    let (free, full) = (said("freed"), resident(&child));
    assert!(full >= 220, "{full} MiB");
    std::fs::write(&go, "").unwrap();
    let left = said("inflated");
    assert!(left + 190 <= free, "of {free} MiB that were free, {left} are");
    let now = shrinks_to(&child, full - 190);
    assert!(now + 190 <= full, "of {full} MiB, {now} are still resident");
    std::fs::write(&go, "").unwrap();
    let deflated = said("deflated");
    assert!(deflated >= left + 190, "{left} MiB were free, then {deflated}");
    said("full");
    let full = resident(&child);
    assert!(full >= 220, "what was given back is used again: {full} MiB");
    child.kill().unwrap();
    wait(&mut child, Duration::from_secs(20));
}

/// Has less than there is, and then needs more than it has: the balloon gives way.
const NEEDS: &str = r#"
free() { sed -n 's/^MemFree: *\([0-9]*\).*/\1/p' /proc/meminfo; }
for i in $(seq 300); do [ $(free) -lt 260000 ] && break; sleep 0.1; done; echo "@free $(($(free) / 1024))"
mount -t tmpfs -o size=400m none /mnt
dd if=/dev/zero of=/mnt/full bs=1M count=300 2>/dev/null && echo "@wrote $(($(stat -c %s /mnt/full) >> 20))"
"#;

#[test]
fn balloon_gives_way_to_a_guest_that_runs_out_of_memory() {
    for image in KERNELS {
        let mut child = machine(image, &["--balloon", "250M"], NEEDS);
        let mut out = child.stdout.take().unwrap();
        let free = said(&mut out, "free");
        assert!(free < 255, "{image}: {free} MiB are free");
        assert_eq!(said(&mut out, "wrote"), 300, "{image}");
        assert!(wait(&mut child, Duration::from_secs(60)).success());
    }
}
