//! Vsock under Debian's own kernel: connections both ways, with everything that crosses them checked.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::image::{BOOT, ensure, nonce, program, random_bytes};
use support::{Finished, finish, ringfence, wait};

fn machine(image: &str, folder: &Path, script: &str) -> Command {
    ensure(image);
    let mut command = ringfence();
    let (share, vsock) = (format!("{}:t", folder.display()), format!("cid=77,socket={}/s", folder.display()));
    command.args(["run", image, "--timeout", "240", "--net", "none", "--share", &share, "--vsock", &vsock]);
    command.args(["--", "sh", "-c", script]);
    command
}

/// Gives everything back on every connection to a port of the host, and counts.
fn echo(folder: &Path, port: u32) -> (Arc<AtomicUsize>, Arc<AtomicU64>) {
    let listener = UnixListener::bind(folder.join(format!("s_{port}"))).unwrap();
    let (connections, sum) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let counters = (Arc::clone(&connections), Arc::clone(&sum));
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            connections.fetch_add(1, Ordering::SeqCst);
            let sum = Arc::clone(&sum);
            thread::spawn(move || {
                let mut buffer = vec![0; 100_000];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    sum.fetch_add(buffer[..n].iter().map(|byte| u64::from(*byte)).sum(), Ordering::SeqCst);
                    stream.write_all(&buffer[..n]).unwrap();
                }
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    counters
}

fn guest_connects(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    program("vsock", folder.path());
    let (connections, sum) = echo(folder.path(), 1234);
    let seed = nonce();
    let run: Finished = finish(&mut machine(
        image,
        folder.path(),
        &format!(
            "/mnt/t/vsock send 1234 1 {} {seed}; for i in 1 2 3 4; do /mnt/t/vsock send 1234 50 100000 {seed}; done
             /mnt/t/vsock send 4321 1 1 1; cat /sys/bus/virtio/devices/*/device | grep -c 0x0013",
            32 << 20
        ),
    ));
    run.expect(0, &[]);
    let sums: Vec<u64> =
        run.out.lines().filter_map(|line| line.strip_prefix("ok ")?.trim().parse().ok()).collect();
    assert_eq!(sums.len(), 5, "{run:#?}");
    assert_eq!(sums.iter().sum::<u64>(), sum.load(Ordering::SeqCst), "what the host has seen");
    assert_eq!(connections.load(Ordering::SeqCst), 201);
    assert!(run.out.contains("failed: Connection reset by peer"), "nobody listens there: {run:#?}");
    assert!(run.out.trim_end().ends_with('1'), "{run:#?}");
}

#[test]
fn guest_connects_to_the_host_many_times_and_with_much() {
    guest_connects("shell");
}

#[test]
fn guest_connects_to_the_host_with_linux_6_12() {
    guest_connects("shell:6.12");
}

/// A connection to a port of the guest, when somebody listens there.
fn connect(folder: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(folder.join("s")).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    writeln!(stream, "CONNECT {port}").ok()?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    Some(stream)
}

/// Sends, ends, and demands the same back.
fn exchange(mut stream: UnixStream, data: Vec<u8>) {
    let mut reading = stream.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut back = Vec::new();
        reading.read_to_end(&mut back).unwrap();
        back
    });
    stream.write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(reader.join().unwrap() == data, "something else came back");
}

fn host_connects(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    program("vsock", folder.path());
    let mut child =
        machine(image, folder.path(), "exec /mnt/t/vsock echo 22").stdout(Stdio::null()).spawn().unwrap();
    let (end, path) = (Instant::now() + BOOT, folder.path().to_owned());
    let first = loop {
        if let Some(stream) = connect(&path, 22) {
            break stream;
        }
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "nobody answers");
        thread::sleep(Duration::from_millis(50));
    };
    exchange(first, random_bytes(32 << 20));
    for _ in 0..5 {
        let streams: Vec<UnixStream> = (0..60).map(|_| connect(&path, 22).unwrap()).collect();
        let threads: Vec<_> = streams
            .into_iter()
            .map(|stream| (stream, random_bytes(70_000)))
            .map(|(stream, data)| thread::spawn(move || exchange(stream, data)))
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
    assert!(connect(&path, 23).is_none(), "nobody listens there");
    child.kill().unwrap();
    wait(&mut child, Duration::from_secs(20));
}

#[test]
fn host_connects_to_the_guest_many_times_and_with_much() {
    host_connects("shell");
}

#[test]
fn host_connects_to_the_guest_with_linux_6_12() {
    host_connects("shell:6.12");
}

fn outlives_the_process_of_vsock(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    program("vsock", folder.path());
    let listener = UnixListener::bind(folder.path().join("s_1234")).unwrap();
    // One connection waits for an answer when it happens; the next finds nobody.
    let script = "/mnt/t/vsock send 1234 1 1000 7; /mnt/t/vsock send 1234 1 1000 7; exit 7";
    let mut machine = machine(image, folder.path(), script);
    let child = machine.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 1000]).unwrap();
    let is_helper = |pid: &i32| {
        let read = |what| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
        read("status").contains(&format!("PPid:\t{}\n", child.id()))
            && read("cmdline").contains("vsock-helper")
    };
    let pids = fs::read_dir("/proc").unwrap();
    let helper = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).find(is_helper);
    let pid = rustix::process::Pid::from_raw(helper.unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "the program of the host notices too");
    let run = Finished::from(child.wait_with_output().unwrap());
    run.expect(7, &["the process of vsock has ended"]);
    let failed: Vec<&str> =
        run.out.lines().map(str::trim).filter(|line| line.starts_with("failed: ")).collect();
    assert_eq!(failed.len(), 2, "{run:#?}");
    // By which of its calls it notices first.
    let told = ["Connection reset", "not connected"].iter().any(|text| failed[0].contains(text));
    assert!(told && failed[1].contains("timed out"), "{run:#?}");
}

#[test]
fn machine_outlives_the_process_of_vsock() {
    outlives_the_process_of_vsock("shell");
}

#[test]
fn machine_outlives_the_process_of_vsock_with_linux_6_12() {
    outlives_the_process_of_vsock("shell:6.12");
}

#[test]
fn socket_that_cannot_be_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let vsock = |path: &str| format!("socket={}", folder.path().join(path).display());
    let run =
        |path| finish(ringfence().args(["run", "--timeout", "60", "--vsock", &vsock(path), "--", "true"]));
    run("no/folder").expect(125, &["cannot listen on", "No such file"]);
    fs::write(folder.path().join("file"), "stays").unwrap();
    run("file").expect(125, &["cannot listen on", "in use"]);
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "stays");
    // What a machine that was killed leaves behind is in nobody's way.
    drop(UnixListener::bind(folder.path().join("old")).unwrap());
    assert!(fs::metadata(folder.path().join("old")).unwrap().file_type().is_socket());
    ensure("shell");
    run("old").expect(0, &[]);
}
