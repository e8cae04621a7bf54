//! Programs of the guest and of this host, joined by the NAT in user mode: TCP and UDP over IPv4 and IPv6, both ways, under both of
//! the kernels.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::image::{BOOT, ensure, nonce, program, random_bytes};
use support::{finish, ringfence, wait};

/// Sizes of datagrams: about a packet, and up to what there can be.
const SIZES: [usize; 8] = [1, 1000, 1452, 1453, 1472, 1473, 9000, 65_507];

fn machine(image: &str, net: &str, folder: &Path, script: &str) -> Command {
    ensure(image);
    let mut command = ringfence();
    let share = format!("{}:t", folder.display());
    command.args(["run", image, "--timeout", "240", "--net", net, "--share", &share]);
    command.args(["--", "sh", "-c", script]);
    command
}

/// Gives back what comes to a port of `address`, over TCP and UDP, and adds up all bytes.
fn serve(address: IpAddr) -> (u16, Arc<AtomicU64>) {
    let sum = Arc::new(AtomicU64::new(0));
    let count = |sum: &AtomicU64, bytes: &[u8]| {
        sum.fetch_add(bytes.iter().map(|byte| u64::from(*byte)).sum(), Ordering::SeqCst);
    };
    let (listener, socket) = loop {
        let listener = TcpListener::bind((address, 0)).unwrap();
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()) {
            break (listener, socket);
        }
    };
    let port = listener.local_addr().unwrap().port();
    let sums = [Arc::clone(&sum), Arc::clone(&sum)];
    let [streams, datagrams] = sums;
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            count(&datagrams, &buffer[..len]);
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, sum) = (stream.unwrap(), Arc::clone(&streams));
            thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok(len @ 1..) = stream.read(&mut buffer) {
                    count(&sum, &buffer[..len]);
                    stream.write_all(&buffer[..len]).unwrap();
                }
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    (port, sum)
}

/// The sums that the guest's program has printed.
fn sums(out: &str) -> Vec<u64> {
    out.lines().filter_map(|line| line.strip_prefix("ok ")?.trim().parse().ok()).collect()
}

fn sizes() -> String {
    SIZES.map(|size| size.to_string()).join(",")
}

fn guest_talks_to_the_host(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let (port, sum) = serve([127, 0, 0, 1].into());
    let (seed, sizes) = (nonce(), sizes());
    let script = format!(
        "/mnt/t/net tcp 10.0.2.2:{port} 50 300000 {seed}; /mnt/t/net udp 10.0.2.2:{port} 3 {sizes} {seed}
         ping -c 3 -q -s 20000 10.0.2.2 | grep -o ' 0% packet loss'; uname -r"
    );
    let run = finish(&mut machine(image, "user", folder.path(), &script));
    run.expect(0, &[]);
    assert_eq!(sums(&run.out).len(), 2, "{run:#?}");
    assert_eq!(sums(&run.out).iter().sum::<u64>(), sum.load(Ordering::SeqCst), "what the host has seen");
    assert!(run.out.contains(" 0% packet loss"), "{run:#?}");
    let release = image.split_once(':').map_or("6.1.", |(_, version)| version);
    assert!(run.out.lines().last().unwrap().starts_with(release), "{run:#?}");
}

#[test]
fn guest_talks_to_programs_of_the_host() {
    guest_talks_to_the_host("shell");
}

#[test]
fn guest_talks_to_programs_of_the_host_with_linux_6_12() {
    guest_talks_to_the_host("shell:6.12");
}

fn guest_talks_over_ipv6(image: &str) {
    let local = IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]);
    if let Err(error) = TcpListener::bind((local, 0)) {
        eprintln!("skipped: this host has no IPv6 on loopback: {error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let (port, sum) = serve(local);
    let (seed, sizes) = (nonce(), sizes());
    // The address is there when the kernel has found that nobody else has it (RFC 4862 5.4).
    let script = format!(
        "for i in $(seq 200); do ip -6 addr show dev eth0 | grep fd52:696e:6766: | grep -vq tentative && break; sleep 0.1; done
         /mnt/t/net tcp [fd52:696e:6766::2]:{port} 50 300000 {seed}
         /mnt/t/net udp [fd52:696e:6766::2]:{port} 3 {sizes} {seed}
         /mnt/t/net options [fd52:696e:6766::2]:{port}
         ping -6 -c 3 -q -s 5000 fd52:696e:6766::2 | grep -o ' 0% packet loss'
         /mnt/t/net tcp [::ffff:10.0.2.2]:{port} 1 1 1; /mnt/t/net tcp [fd52:696e:6766::9]:{port} 1 1 1"
    );
    let run = finish(&mut machine(image, "user", folder.path(), &script));
    run.expect(0, &[]);
    assert_eq!(sums(&run.out).len(), 2, "{run:#?}");
    let options: u64 = b"with options".iter().map(|byte| u64::from(*byte)).sum();
    assert!(run.out.contains("ok with options"), "{run:#?}");
    assert_eq!(
        sums(&run.out).iter().sum::<u64>() + options,
        sum.load(Ordering::SeqCst),
        "what the host has seen"
    );
    assert!(run.out.contains(" 0% packet loss"), "{run:#?}");
    let failed = run.out.lines().filter(|line| line.starts_with("failed: ")).count();
    assert_eq!(failed, 2, "nobody is at 127.0.0.1 or at another address: {run:#?}");
}

#[test]
fn guest_reaches_the_hosts_loopback_over_ipv6() {
    guest_talks_over_ipv6("shell");
}

#[test]
fn guest_reaches_the_hosts_loopback_over_ipv6_with_linux_6_12() {
    guest_talks_over_ipv6("shell:6.12");
}

#[test]
fn card_with_several_pairs_of_queues_uses_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let (port, sum) = serve([127, 0, 0, 1].into());
    let (seed, sizes) = (nonce(), sizes());
    let script = format!(
        "/mnt/t/net channels 3; /mnt/t/net channels 4
         /mnt/t/net tcp 10.0.2.2:{port} 60 100000 {seed}; /mnt/t/net udp 10.0.2.2:{port} 3 {sizes} {seed}
         grep -E 'virtio[0-9]+-(in|out)put' /proc/interrupts
         /mnt/t/net channels 1; /mnt/t/net tcp 10.0.2.2:{port} 20 100000 {seed}"
    );
    let run = finish(&mut machine("shell", "user,queues=3", folder.path(), &script));
    run.expect(0, &[]);
    for part in ["ok 3 of 3", "failed: Invalid argument", "ok 1 of 3"] {
        assert!(run.out.contains(part), "no {part:?}: {run:#?}");
    }
    assert_eq!(sums(&run.out).iter().sum::<u64>(), sum.load(Ordering::SeqCst), "what the host has seen");
    assert_eq!(sums(&run.out).len(), 3, "{run:#?}");
    for pair in 0..3 {
        let queue = format!("-input.{pair}");
        let line = run.out.lines().find(|line| line.ends_with(&queue)).unwrap();
        let count: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(count > 0, "nothing came in by pair {pair}: {run:#?}");
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Sends datagrams of all sizes, and demands each back before the next. Datagrams may be lost, the longest in one of their 45
/// pieces, so one that does not come back within seconds is sent again; not all, and nothing else comes.
fn ask(port: u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
    let mut lost = 0;
    for size in SIZES {
        let (data, mut buffer) = (random_bytes(size), vec![0; 65_536]);
        socket.send(&data).unwrap();
        loop {
            match socket.recv(&mut buffer) {
                Ok(len) if buffer[..len] == data => break,
                // One that was given up has come after all.
                Ok(len) => assert!(lost > 0, "{len} bytes came for {size}"),
                Err(error) => {
                    lost += 1;
                    assert!(lost < 6, "{size} bytes: {error}");
                    socket.send(&data).unwrap();
                }
            }
        }
    }
}

fn exchange(port: u16, len: usize) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let (data, mut back) = (random_bytes(len), Vec::new());
    let (mut writing, sent) = (stream.try_clone().unwrap(), data.clone());
    let writer = thread::spawn(move || {
        writing.write_all(&sent).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(back == data, "something else came back");
}

fn host_talks_to_the_guest(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let (tcp, udp) = (free_port(), free_port());
    let net = format!("user,forward=tcp:127.0.0.1:{tcp}:7,forward=udp:127.0.0.1:{udp}:7");
    let mut machine = machine(image, &net, folder.path(), "exec /mnt/t/net serve 7");
    let mut child = machine.stdout(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + BOOT;
    let up = || {
        let address = SocketAddr::from(([127, 0, 0, 1], tcp));
        let Ok(mut stream) = TcpStream::connect(address) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"x").is_ok() && stream.read(&mut [0]).is_ok_and(|len| len == 1)
    };
    while !up() {
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "nobody answers");
        thread::sleep(Duration::from_millis(50));
    }
    // Few datagrams are on their way at a time: what the guest's program has no room for is lost.
    let clients: Vec<_> = (0..30)
        .map(|i| thread::spawn(move || if i < 3 { ask(udp) } else { exchange(tcp, 300_000) }))
        .collect();
    let failed = clients.into_iter().filter_map(|client| client.join().err()).count();
    let _ = child.kill();
    wait(&mut child, Duration::from_secs(20));
    assert_eq!(failed, 0);
}

#[test]
fn host_talks_to_the_guest_by_forwarded_ports() {
    host_talks_to_the_guest("shell");
}

#[test]
fn host_talks_to_the_guest_by_forwarded_ports_with_linux_6_12() {
    host_talks_to_the_guest("shell:6.12");
}
