//! Programs of the guest that use the network.
//!
//! `net serve PORT`: gives back what comes to the port, over TCP and UDP, IPv4 and IPv6.
//! `net tcp ADDRESS CONNECTIONS BYTES SEED`: connects so many times at once, sends, ends its data, and demands the same back.
//! `net udp ADDRESS SOCKETS SIZES SEED`: from so many sockets at once, sends datagrams of each of the sizes (commas between them), and demands
//! each back before the next. Both print `ok` and the sum of all bytes.
//! `net channels N`: has the card eth0 use so many pairs of queues.
//! `net options ADDRESS`: sends a datagram with destination options, and demands it back: `ok` and its bytes.
//! `net names ADDRESS IP`: a name server over UDP and TCP for which every name is that address. Names that begin with `long` have many, too many
//! for UDP.
//! `net name ADDRESS NAME`: asks a name server once, over TCP if the answer is cut: `ok`, an address, and how many there are.
//! `net deaf ADDRESS`: takes datagrams and says nothing.

use std::ffi::c_void;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, argument: *mut c_void) -> i32;
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Debug, Default)]
struct Channels {
    command: u32,
    most: [u32; 4],
    now: [u32; 4],
}

/// `struct ifreq` with its pointer.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut Channels,
    rest: [u8; 16],
}

const SIOCETHTOOL: u64 = 0x8946;
const GET_CHANNELS: u32 = 0x3c;
const SET_CHANNELS: u32 = 0x3d;
/// The place of channels that both send and receive.
const COMBINED: usize = 3;

fn channels(count: u32) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"eth0");
    let mut channels = Channels { command: GET_CHANNELS, ..Channels::default() };
    for set in [false, true] {
        if set {
            (channels.command, channels.now[COMBINED]) = (SET_CHANNELS, count);
        }
        let mut request = Request { name, data: &raw mut channels, rest: [0; 16] };
        // SAFETY: SIOCETHTOOL reads and writes the structures, which outlive the call.
        if unsafe { ioctl(socket.as_raw_fd(), SIOCETHTOOL, (&raw mut request).cast()) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    println!("ok {} of {}", channels.now[COMBINED], channels.most[COMBINED]);
    Ok(())
}

/// Level and name of the socket option for destination options (RFC 3542).
const IPPROTO_IPV6: i32 = 41;
const IPV6_DSTOPTS: i32 = 59;

unsafe extern "C" {
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const c_void, len: u32) -> i32;
}

fn options(to: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind("[::]:0")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    // Next header and length, then an option of four bytes that whoever does not know it skips (RFC 8200 4.2).
    let header = [0_u8, 0, 0x1e, 4, 1, 2, 3, 4];
    // SAFETY: the option is read from `header`, which is as long as is said.
    let set = unsafe { setsockopt(socket.as_raw_fd(), IPPROTO_IPV6, IPV6_DSTOPTS, header.as_ptr().cast(), 8) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut back = [0; 100];
    socket.send(b"with options")?;
    let len = socket.recv(&mut back)?;
    println!("ok {}", String::from_utf8_lossy(&back[..len]));
    Ok(())
}

/// How many addresses a name has that begins with `long`.
const MANY: u16 = 200;

/// The answer to a question (RFC 1035 4.1), cut for UDP if it is long.
fn answer(question: &[u8], ip: Ipv4Addr, udp: bool) -> Vec<u8> {
    let long = question.get(13..17) == Some(b"long");
    let mut answer = question.to_vec();
    answer[2] = 0x81 | u8::from(long && udp) << 1;
    answer[3] = 0x80;
    let count = if !long { 1 } else if udp { 0 } else { MANY };
    answer[6..8].copy_from_slice(&count.to_be_bytes());
    for _ in 0..count {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ip.octets());
    }
    answer
}

/// A message over TCP has its length before it (RFC 1035 4.2.2).
fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut message = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(&[&(message.len() as u16).to_be_bytes(), message].concat())
}

fn names(at: SocketAddr, ip: Ipv4Addr) {
    let (listener, socket) = (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
    thread::spawn(move || {
        let mut buffer = [0; 512];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            let _ = socket.send_to(&answer(&buffer[..len], ip, true), from);
        }
    });
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        if let Ok(question) = read_message(&mut stream) {
            let _ = write_message(&mut stream, &answer(&question, ip, false));
        }
    }
}

fn deaf(at: SocketAddr) -> ! {
    let _socket = UdpSocket::bind(at).unwrap();
    loop {
        thread::park();
    }
}

fn name(server: SocketAddr, name: &str) -> io::Result<()> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(server)?;
    // Long enough for one question, and for a resolver to ask others.
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    socket.send(&question)?;
    let mut answer = vec![0; 512];
    let len = socket.recv(&mut answer)?;
    answer.truncate(len);
    if answer[2] & 2 != 0 {
        let mut stream = TcpStream::connect(server)?;
        write_message(&mut stream, &question)?;
        answer = read_message(&mut stream)?;
    }
    assert_eq!((&answer[..2], &answer[12..question.len()]), (&question[..2], &question[12..]));
    let ip: [u8; 4] = answer[answer.len() - 4..].try_into().unwrap();
    println!("ok {} {}", Ipv4Addr::from(ip), u16::from_be_bytes([answer[6], answer[7]]));
    Ok(())
}

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let step = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..len).map(step).collect()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(*byte)).sum()
}

fn serve(port: u16) {
    // IPv4 comes to it as well.
    let listener = TcpListener::bind(("::", port)).unwrap();
    let socket = UdpSocket::bind(("::", port)).unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..len]).is_err() {
                    return;
                }
            }
            let _ = stream.shutdown(Shutdown::Write);
        });
    }
}

fn tcp(to: SocketAddr, len: usize, seed: u64) -> io::Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    let data = bytes(len, seed);
    let (mut writing, sent) = (stream.try_clone()?, data.clone());
    let writer = thread::spawn(move || -> io::Result<()> {
        writing.write_all(&sent)?;
        writing.shutdown(Shutdown::Write)
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    writer.join().unwrap()?;
    if back == data { Ok(sum(&data)) } else { Err(io::Error::other("something else came back")) }
}

fn udp(to: SocketAddr, sizes: &[usize], seed: u64) -> io::Result<u64> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (mut buffer, mut all) = (vec![0; 65_536], 0);
    for (size, number) in sizes.iter().zip(0..) {
        let data = bytes(*size, seed + number);
        socket.send(&data)?;
        let len = socket.recv(&mut buffer)?;
        if buffer[..len] != data {
            return Err(io::Error::other(format!("{size} bytes were sent, {len} others came back")));
        }
        all += sum(&data);
    }
    Ok(all)
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize| arguments[index].parse::<u64>().unwrap();
    let result = match arguments[1].as_str() {
        "serve" => return serve(number(2) as u16),
        "names" => return names(arguments[2].parse().unwrap(), arguments[3].parse().unwrap()),
        "deaf" => deaf(arguments[2].parse().unwrap()),
        "name" => name(arguments[2].parse().unwrap(), &arguments[3]).map(|()| Vec::new()),
        "options" => options(arguments[2].parse().unwrap()).map(|()| Vec::new()),
        "channels" => channels(number(2) as u32).map(|()| Vec::new()),
        kind => {
            let (to, seed, is_tcp) = (arguments[2].parse().unwrap(), number(5), kind == "tcp");
            let sizes: Vec<usize> = arguments[4].split(',').map(|size| size.parse().unwrap()).collect();
            let one = move |seed| if is_tcp { tcp(to, sizes[0], seed) } else { udp(to, &sizes, seed) };
            let threads: Vec<_> = (0..number(3))
                .map(|i| {
                    let one = one.clone();
                    thread::spawn(move || one(seed + 1000 * i))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<io::Result<Vec<u64>>>()
        }
    };
    match result {
        Ok(sums) if sums.is_empty() => {}
        Ok(sums) => println!("ok {}", sums.iter().sum::<u64>()),
        Err(error) => println!("failed: {error}"),
    }
}
