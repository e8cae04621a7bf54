//! Machines that have nothing to do with each other or with the world: clones with the same addresses, and guests without a way out.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::image::{BOOT, ensure, nonce, program, random_bytes, sha256_of};
use support::{Finished, finish, ringfence, wait};

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A clone: says who it is, serves a number of its own, and sends much to `sink`, which knows by `tag` who that is.
fn clone(port: u16, tag: u64, sink: u16) -> Child {
    let script = format!(
        "mkdir /www; echo {tag} >/www/tag; httpd -h /www
         echo addresses $(ip -4 addr show dev eth0 | grep -o 'inet [0-9./]*') $(cat /sys/class/net/eth0/address)
         for i in $(seq 8); do (echo {tag}; yes {tag} | head -c 4000000) | nc 10.0.2.2 {sink}; done
         while :; do sleep 1; done"
    );
    let mut command = ringfence();
    command.args(["run", "--timeout", "240", "--net", &format!("user,forward=tcp:127.0.0.1:{port}:80")]);
    command.args(["--", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn clones_share_addresses_and_nothing_else() {
    ensure("shell");
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = sink.local_addr().unwrap().port();
    let tags = [nonce(), nonce() + 1];
    let ports = [free_port(), free_port()];
    let mut clones = [0, 1].map(|i| clone(ports[i], tags[i], port));
    let mut said = clones.each_mut().map(|child| {
        let mut out = child.stdout.take().unwrap();
        support::read_until(&mut out, "addresses");
        support::read_until(&mut out, "\n")
    });
    said.iter_mut().for_each(|line| *line = line.trim().to_owned());
    assert_eq!(said[0], said[1], "the same addresses");
    assert_eq!(said[0], "inet 10.0.2.15/24 52:54:00:12:34:56");
    // Everything that comes by one connection is of one clone, and all of it is there.
    let taken: Vec<u64> = (0..16)
        .map(|_| sink.accept().unwrap().0)
        .map(|mut stream| {
            thread::spawn(move || {
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                let tag: u64 = text.lines().next().unwrap().parse().unwrap();
                let rest: String = format!("{tag}\n").repeat(4_000_000 / 2);
                let first = format!("{tag}\n").len();
                assert!(text[first..] == rest[..4_000_000], "{} bytes", text.len());
                tag
            })
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    for tag in tags {
        assert_eq!(taken.iter().filter(|taken| **taken == tag).count(), 8);
    }
    for (port, tag) in ports.into_iter().zip(tags) {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"GET /tag HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with(&format!("\n{tag}\n")), "{answer}");
    }
    for child in &mut clones {
        child.kill().unwrap();
        wait(child, Duration::from_secs(20));
    }
}

/// Everything that could be a way out, by each kernel's own stack, to a host that listens.
fn restricted_guest_has_no_way_out_of(image: &str) {
    ensure(image);
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let (server, datagrams) = loop {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        if let Ok(socket) = UdpSocket::bind(server.local_addr().unwrap()) {
            break (server, socket);
        }
    };
    server.set_nonblocking(true).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let port = server.local_addr().unwrap().port();
    let six = TcpListener::bind(("::1", port)).ok();
    six.iter().for_each(|server| server.set_nonblocking(true).unwrap());
    let share = format!("{}:t", folder.path().display());
    // Routes of its own making lead nowhere either.
    let script = format!(
        "ip route | grep default || echo no route; ip -6 route | grep default || echo no route for IPv6
         ip route add default via 10.0.2.2
         for i in $(seq 200); do ip -6 addr show dev eth0 | grep fd52:696e:6766: | grep -vq tentative && break; sleep 0.1; done
         ip -6 route add default via fd52:696e:6766::2
         for to in 10.0.2.2:{port} 10.0.2.3:53 192.0.2.1:80 [fd52:696e:6766::2]:{port} [fd52:696e:6766::3]:53 [2001:db8::1]:80; do
             /mnt/t/net tcp $to 1 1 1
         done
         (echo 1; sleep 1) | nc -u -w 1 10.0.2.2 {port}; (echo 1; sleep 1) | nc -u -w 1 fd52:696e:6766::2 {port}
         timeout 3 nslookup -type=a name.example 10.0.2.3 >/dev/null 2>&1 || echo no names
         ping -c 1 -W 1 192.0.2.1 >/dev/null || echo no echo; ping -6 -c 1 -W 1 2001:db8::1 >/dev/null || echo no echo"
    );
    let net = format!("user,restrict=yes,dns=127.0.0.1:{port}");
    let mut command: Command = ringfence();
    command.args(["run", image, "--timeout", "240", "--net", &net, "--share", &share]);
    let run: Finished = finish(command.args(["--", "sh", "-c", &script]));
    let count = |text: &str| run.out.lines().filter(|line| line.trim().starts_with(text)).count();
    assert_eq!((count("no route"), count("no names"), count("no echo")), (2, 1, 2), "{run:#?}");
    assert_eq!((count("failed: Connection refused"), count("ok")), (6, 0), "{run:#?}");
    assert!(server.accept().is_err() && datagrams.recv_from(&mut [0]).is_err());
    assert!(six.is_none_or(|server| server.accept().is_err()));
}

#[test]
fn restricted_guest_has_no_way_out() {
    restricted_guest_has_no_way_out_of("shell");
}

#[test]
fn restricted_guest_has_no_way_out_with_linux_6_12() {
    restricted_guest_has_no_way_out_of("shell:6.12");
}

/// A connection to a forwarded port, with an answer from the guest: it echoes one byte.
fn connected(port: u16) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
    let mut byte = [0];
    (stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok()).then_some(stream)
}

/// Not one after the other: all are open while each carries data. The guest is restricted, and answers by forwarded ports alone.
#[test]
fn thousand_connections_at_once_come_in_by_a_forwarded_port() {
    const COUNT: usize = 1000;
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let port = free_port();
    let net = format!("user,restrict=yes,forward=tcp:127.0.0.1:{port}:7");
    let share = format!("{}:t", folder.path().display());
    let mut machine = ringfence();
    machine.args(["run", "--timeout", "240", "--memory", "512M", "--net", &net, "--share", &share]);
    let script = "ulimit -n 4000; exec /mnt/t/net serve 7";
    let mut child = machine.args(["--", "sh", "-c", script]).stdout(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + BOOT;
    while connected(port).is_none() {
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "nobody answers");
        thread::sleep(Duration::from_millis(50));
    }
    let mut streams: Vec<TcpStream> = (0..COUNT).map(|_| connected(port).unwrap()).collect();
    let data = random_bytes(3000);
    for stream in &mut streams {
        stream.write_all(&data).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert_eq!(sha256_of(&back), sha256_of(&data), "connection {number}");
    }
    child.kill().unwrap();
    wait(&mut child, Duration::from_secs(20));
}
