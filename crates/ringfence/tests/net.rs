//! The network in user mode under Debian's own kernel, with servers on this host's loopback only.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use support::image::{BOOT, ensure};
use support::{finish, ringfence, wait};

/// Bytes of the transfers in MiB; `RINGFENCE_NET_MIB=1024` is the long check.
fn mebibytes() -> usize {
    std::env::var("RINGFENCE_NET_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(64)
}

/// So many MiB of bytes that nobody else has, one after the other.
fn bytes(mebibytes: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut next = support::image::numbers();
    (0..mebibytes).map(move |_| (0..(1 << 20) / 8).flat_map(|_| next().to_le_bytes()).collect())
}

/// As `sha256sum` prints it.
fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A free port: nobody else on a test's host takes it meanwhile.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn run(net: &str, script: &str) -> support::Finished {
    run_image("shell", net, script)
}

fn run_image(image: &str, net: &str, script: &str) -> support::Finished {
    ensure(image);
    let timeout = (240 + mebibytes()).to_string();
    finish(ringfence().args(["run", image, "--timeout", &timeout, "--net", net, "--", "sh", "-c", script]))
}

fn transfer(image: &str) {
    let mib = mebibytes();
    let down = TcpListener::bind("127.0.0.1:0").unwrap();
    let up = TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = [down.local_addr().unwrap().port(), up.local_addr().unwrap().port()];
    let serving = thread::spawn(move || {
        let (mut stream, _) = down.accept().unwrap();
        let mut request = [0; 4096];
        let got = stream.read(&mut request).unwrap();
        assert!(request[..got].starts_with(b"GET /file HTTP/1."));
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", mib << 20).unwrap();
        let mut digest = Sha256::new();
        for part in bytes(mib) {
            digest.update(&part);
            stream.write_all(&part).unwrap();
        }
        hex(digest)
    });
    let receiving = thread::spawn(move || {
        let (mut stream, _) = up.accept().unwrap();
        let (mut digest, mut len, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        while let n @ 1.. = stream.read(&mut buffer).unwrap() {
            digest.update(&buffer[..n]);
            len += n;
        }
        (len, hex(digest))
    });
    let [down, up] = ports;
    // What is sent up is made in the guest, and never as a whole in its memory.
    let script = format!(
        "wget -q -O - http://10.0.2.2:{down}/file | sha256sum || exit 3
         mkfifo /tmp/pipe; sha256sum </tmp/pipe >/tmp/sum &
         dd if=/dev/urandom bs=1M count={mib} 2>/dev/null | tee /tmp/pipe | nc 10.0.2.2 {up} || exit 4
         wait; cat /tmp/sum"
    );
    let run = run_image(image, "user", &script);
    run.expect(0, &[]);
    let sum = serving.join().unwrap();
    let (len, sent) = receiving.join().unwrap();
    assert_eq!(len, mib << 20);
    let sums: Vec<&str> = run.out.split_whitespace().filter(|word| word.len() == 64).collect();
    assert_eq!(sums, [&sum, &sent], "{}", run.out);
}

#[test]
fn large_transfers_arrive_unchanged_both_ways() {
    transfer("shell");
}

#[test]
fn large_transfers_arrive_unchanged_with_linux_6_12() {
    transfer("shell:6.12");
}

/// A resolver that knows one name. The answer is the question with the address behind it (RFC 1035 4.1).
fn resolver() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..len].to_vec();
            let is_a = answer[len - 4..] == [0, 1, 0, 1];
            let known = answer.windows(6).any(|part| part == b"\x05there");
            answer[2] |= 0x80;
            answer[3] = if known { 0x80 } else { 0x83 };
            if known && is_a {
                answer[7] = 1;
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    address
}

#[test]
fn guest_has_address_names_and_gateway() {
    let closed = free_port();
    // The kernel asks for IPv6's prefix some time within seconds of the link's coming up (RFC 4861 6.3.7).
    let script = format!(
        "ip -4 addr show dev eth0 | grep -o 'inet [0-9./]*'; ip route | grep -o 'default via [0-9.]*'
         cat /etc/resolv.conf; nslookup there.example | grep 192; nslookup gone.example >/dev/null || echo unknown
         ping -c 3 -q 10.0.2.2 | grep -o ' 0% packet loss'
         for i in $(seq 100); do ip -6 addr show dev eth0 | grep -o 'fd52:696e:6766:' && break; sleep 0.1; done
         nc 10.0.2.2 {closed} </dev/null 2>&1
         echo features $(cat /sys/class/net/eth0/device/features)"
    );
    let run = run(&format!("user,dns={}", resolver()), &script);
    for part in [
        "inet 10.0.2.15/24",
        "default via 10.0.2.2",
        "nameserver 10.0.2.3",
        "192.0.2.77",
        "unknown",
        " 0% packet loss",
        "fd52:696e:6766:",
        "Connection refused",
    ] {
        assert!(run.out.contains(part), "no {part:?}: {run:#?}");
    }
    let features = run.out.lines().find_map(|line| line.trim().strip_prefix("features ")).unwrap().as_bytes();
    // Checksums and segments that the other side finishes, over IPv4 and IPv6, both ways; and buffers that are merged (virtio 1.2, 5.1.3).
    for bit in [0, 1, 7, 8, 11, 12, 15] {
        assert_eq!(features[bit], b'1', "feature {bit}: {run:#?}");
    }
}

#[test]
fn thousand_connections_come_in_by_a_forwarded_port() {
    ensure("shell");
    let port = free_port();
    let mut machine = ringfence()
        .args(["run", "--timeout", "240", "--net", &format!("user,forward=tcp:127.0.0.1:{port}:80")])
        .args(["--", "sh", "-c", "mkdir /www; echo found >/www/page; httpd -f -h /www"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let ask = move || -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let right = |answer: &Option<String>| answer.as_ref().is_some_and(|text| text.ends_with("found\n"));
    let end = Instant::now() + BOOT;
    while !right(&ask()) {
        assert!(Instant::now() < end, "the guest's server does not answer");
        thread::sleep(Duration::from_millis(50));
    }
    let clients: Vec<_> =
        (0..20).map(|_| thread::spawn(move || (0..50).filter(|_| right(&ask())).count())).collect();
    let served: usize = clients.into_iter().map(|client| client.join().unwrap()).sum();
    let _ = machine.kill();
    wait(&mut machine, Duration::from_secs(10));
    assert_eq!(served, 1000);
}

/// The process that a process has started; the only one.
fn child_of(parent: u32) -> u32 {
    let parent_of = |pid: &u32| {
        // The name before, in parentheses, may hold anything.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok())
    };
    let all = std::fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let children: Vec<u32> = pids.filter(|pid| parent_of(pid) == Some(parent)).collect();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

/// How many sockets a process has between programs of this host, and how many others.
fn sockets(pid: u32) -> (usize, usize) {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap();
    let unix: Vec<&str> = table.lines().filter_map(|line| line.split_whitespace().nth(6)).collect();
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    let names: Vec<String> = targets.map(|target| target.to_string_lossy().into_owned()).collect();
    let inodes = names.iter().filter_map(|name| name.strip_prefix("socket:[")?.strip_suffix(']'));
    let (inside, outside): (BTreeSet<&str>, BTreeSet<&str>) = inodes.partition(|inode| unix.contains(inode));
    (inside.len(), outside.len())
}

#[test]
fn only_the_networks_process_has_sockets_to_the_outside_and_the_machine_outlives_it() {
    outlives_the_networks_process("shell");
}

#[test]
fn machine_outlives_the_networks_process_with_linux_6_12() {
    outlives_the_networks_process("shell:6.12");
}

fn outlives_the_networks_process(image: &str) {
    ensure(image);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    // Much comes in until the link goes down under it.
    let script = format!(
        "nc 10.0.2.2 {port} >/dev/null &
         while ip link show dev eth0 | grep -q LOWER_UP; do sleep 0.1; done; echo all the same; exit 7"
    );
    let machine = ringfence()
        .args(["run", image, "--timeout", "240", "--net", "user", "--", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stream, _) = server.accept().unwrap();
    (0..64).for_each(|_| stream.write_all(&[7; 1 << 20]).unwrap());
    let (machine_pid, helper_pid) = (machine.id(), child_of(machine.id()));
    let [machine_has, helper_has] = [machine_pid, helper_pid].map(sockets);
    assert_eq!(machine_has.1, 0, "sockets of the machine's");
    assert_eq!(helper_has, (1, 1), "its link, and this connection");
    for pid in [machine_pid, helper_pid] {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(maps.contains("/memfd:ringfence-link"), "{maps}");
    }
    // In the midst of whatever it was writing.
    let sending = thread::spawn(move || while stream.write_all(&[7; 1 << 20]).is_ok() {});
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(helper_pid as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let output = machine.wait_with_output().unwrap();
    sending.join().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert_eq!(output.status.code(), Some(7), "{out}{err}");
    assert!(out.contains("all the same") && err.contains("the network's process has ended"), "{out}{err}");
}

#[test]
fn port_in_use_is_told_before_the_guest_starts() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let run = run(&format!("user,forward=tcp:127.0.0.1:{port}:22"), "true");
    run.expect(125, &[&format!("cannot listen on 127.0.0.1:{port}")]);
}
