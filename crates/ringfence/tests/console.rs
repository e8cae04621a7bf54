//! The virtio console and named ports under Debian's own kernels: a shell on hvc0, and streams between programs of guest and host.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::image::{BOOT, Session, ensure, errors, nonce, random_bytes, sha256, sha256_of};
use support::pty::Pty;
use support::{finish, read_until, ringfence, wait};

const KERNELS: [&str; 2] = ["shell", "shell:6.12"];
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn shell_is_on_hvc0_and_follows_the_window() {
    for image in KERNELS {
        ensure(image);
        let nonce = nonce();
        let mut pty = Pty::new();
        let words = format!("nonce={nonce}");
        let mut child =
            pty.spawn(ringfence().args(["run", image, "--console", "virtio", "--append", &words]));
        pty.expect("Linux version", BOOT);
        pty.expect(":~# ", BOOT);
        // The quotes keep the answer from being found in the echo of the question.
        pty.send(
            "echo han''d:$(sed 's/.*nonce=//;s/ .*//' /proc/cmdline | tr -d '\\n' | sha256sum) $(tty)\n",
        );
        pty.expect(&format!("hand:{} - /dev/hvc0", sha256(&nonce.to_string())), MINUTE);
        pty.send("stty si''ze\n");
        pty.expect("33 111", MINUTE);
        pty.send("trap 'echo new size: $(stty si''ze)' WINCH\n");
        thread::sleep(Duration::from_secs(3));
        pty.resize(&child, 44, 122);
        // A shell that reads a line does not look at traps before the next one.
        let end = Instant::now() + MINUTE;
        loop {
            pty.send("stty si''ze; echo en''d\n");
            if pty.expect("end", MINUTE).contains("44 122") {
                break;
            }
            assert!(Instant::now() < end, "{}", pty.text());
        }
        pty.send("sleep 1000; echo inter''rupted=$?\n");
        thread::sleep(Duration::from_secs(1));
        pty.send("\x03");
        pty.expect(":~# ", MINUTE);
        // More than all buffers on the way hold, in both directions.
        pty.send("seq 200000 | tee /dev/stderr 2>/dev/null | sha256sum | cut -c1-64 | sed 's/^/su''m /'\n");
        let all: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
        pty.expect(&format!("sum {}", sha256(&all)), MINUTE);
        pty.send("seq 200000; echo don''e\n");
        let shown = pty.expect("done", MINUTE);
        let mut expected = 1;
        for line in shown.lines() {
            expected += u32::from(line.trim() == expected.to_string());
        }
        let around: Vec<&str> = shown.lines().skip(expected as usize - 3).take(8).collect();
        assert_eq!(expected, 200_001, "{image}: {around:?}");
        // Words of the kernel come once.
        assert_eq!(pty.text().matches("Linux version").count(), 1, "{image}");
        pty.send("reboot\n");
        pty.expect("booting it again", MINUTE);
        pty.expect(":~# ", BOOT);
        pty.send("poweroff\n");
        assert_eq!(wait(&mut child, MINUTE).code(), Some(0), "{}", pty.text());
    }
}

#[test]
fn command_on_a_virtio_console_prints_its_own_output_only() {
    for image in KERNELS {
        ensure(image);
        let nonce = nonce();
        let script = format!("[ -c /dev/hvc0 ] && tty; echo $(({nonce} % 1000003 * 7919)); exit 7");
        let run = finish(ringfence().args([
            "run",
            image,
            "--console",
            "virtio",
            "--timeout",
            "240",
            "--",
            "sh",
            "-c",
            &script,
        ]));
        run.expect(7, &[]);
        let expected = format!("/dev/hvc0\r\n{}\r\n", nonce % 1_000_003 * 7919);
        assert_eq!(run.out, expected, "{image}");
    }
}

#[test]
fn input_that_is_there_before_the_guest_reaches_its_shell() {
    for image in KERNELS {
        ensure(image);
        let mut command = ringfence();
        command.args(["run", image, "--console", "virtio", "--timeout", "240"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"echo su\"\"m=$((40+2)); poweroff\n").unwrap();
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(wait(&mut child, MINUTE).code(), Some(0), "{image}: {text}");
        assert!(text.contains("sum=42"), "{image}: {text}");
    }
}

#[test]
fn kernel_has_nothing_to_complain_of() {
    let folder = tempfile::tempdir().unwrap();
    for image in KERNELS {
        ensure(image);
        let mut command = ringfence();
        command.args(["run", image, "--console", "virtio", "--watchdog", "reset", "--timeout", "240"]);
        let ports = ["a", "b"].map(|name| format!("name={name},socket={}/{name}", folder.path().display()));
        command.args(["--port", &ports[0], "--port", &ports[1]]);
        command.args([
            "--",
            "sh",
            "-c",
            "echo '@dmesg begin'; dmesg -r; echo '@dmesg end'; ls -l /dev/virtio-ports/",
        ]);
        let session = Session::run(&mut command, BOOT);
        assert_eq!(session.status, Some(0), "{}", session.text());
        let dmesg = session.section("dmesg");
        let complaints: Vec<&str> = errors(&dmesg)
            .into_iter()
            // Until the console's driver, a module in this kernel, has been loaded.
            .filter(|line| !line.contains("unable to open an initial console"))
            .collect();
        assert!(complaints.is_empty(), "{image}: {complaints:#?}");
    }
}

/// A machine with the port `echo` at the socket `p`, whose guest runs `script`.
fn machine(image: &str, folder: &Path, script: &str) -> Child {
    ensure(image);
    let port = format!("name=org.example.echo,socket={}/p", folder.display());
    let mut command = ringfence();
    command.args(["run", image, "--net", "none", "--timeout", "240", "--port", &port]);
    command.args(["--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap()
}

fn connect(child: &mut Child, path: &Path) -> UnixStream {
    let end = Instant::now() + BOOT;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            stream.set_read_timeout(Some(BOOT)).unwrap();
            return stream;
        }
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "nobody listens");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn megabytes_cross_a_port_both_ways_and_programs_come_and_go() {
    const ROUNDS: usize = 3;
    const LEN: usize = 6 << 20;
    // The guest takes so many bytes each time, gives them back with their sum, and says when the program has gone. Nobody being there
    // reads as the end.
    let script = format!(
        "exec 3<>/dev/virtio-ports/org.example.echo
         for i in 1 2 3; do
             until [ -s /tmp/data ]; do head -c {LEN} <&3 >/tmp/data; done
             cat /tmp/data >&3
             sha256sum </tmp/data | cut -c1-64 >&3
             cat <&3 >/tmp/rest
             echo gone $(wc -c </tmp/rest)
             rm /tmp/data
         done"
    );
    for image in KERNELS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p");
        let mut child = machine(image, folder.path(), &script);
        let mut out = child.stdout.take().unwrap();
        for round in 0..ROUNDS {
            let mut stream = connect(&mut child, &path);
            let data = random_bytes(LEN);
            let (mut writer, sent) = (stream.try_clone().unwrap(), data.clone());
            let sender = thread::spawn(move || writer.write_all(&sent).unwrap());
            let mut back = vec![0; LEN + 65];
            stream.read_exact(&mut back).unwrap();
            sender.join().unwrap();
            assert!(back[..LEN] == data, "{image}, round {round}: something else came back");
            assert_eq!(String::from_utf8_lossy(&back[LEN..]).trim(), sha256_of(&data), "{image}");
            drop(stream);
            let said = read_until(&mut out, "\n");
            assert_eq!(said.trim(), "gone 0", "{image}, round {round}");
        }
        assert_eq!(wait(&mut child, BOOT).code(), Some(0), "{image}");
        assert!(!path.exists(), "the socket's file goes with the machine");
    }
}

#[test]
fn port_that_is_a_file_gets_everything_the_guest_writes() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let run = finish(
        ringfence()
            .args(["run", "--net", "none", "--timeout", "240", "--port"])
            .arg(format!("name=log,file={}", path.display()))
            .args(["--", "sh", "-c", "seq 300000 | tee /dev/virtio-ports/log | sha256sum"]),
    );
    run.expect(0, &[]);
    let written = fs::read(&path).unwrap();
    assert_eq!(run.out.trim(), format!("{}  -", sha256_of(&written)));
    assert!(written.ends_with(b"\n300000\n"));
}

#[test]
fn port_that_cannot_be_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().display();
    let run =
        |port: String| finish(ringfence().args(["run", "--timeout", "60", "--port", &port, "--", "true"]));
    run(format!("name=a,socket={place}/no/folder")).expect(125, &["cannot listen on", "No such file"]);
    run(format!("name=a,file={place}/no/folder")).expect(125, &["cannot write", "No such file"]);
    let _busy = UnixListener::bind(folder.path().join("busy")).unwrap();
    run(format!("name=a,socket={place}/busy")).expect(125, &["cannot listen on", "in use"]);
    run("name=../a,socket=s".to_owned()).expect(2, &["--port needs a name"]);
}
