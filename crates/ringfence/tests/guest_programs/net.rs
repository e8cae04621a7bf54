//! Programs of the guest that use the network.
//!
//! `net serve PORT`: gives back what comes to the port, over TCP and UDP, IPv4 and IPv6.
//! `net tcp ADDRESS CONNECTIONS BYTES SEED`: connects so many times at once, sends, ends its data, and demands the same back.
//! `net udp ADDRESS SOCKETS SIZES SEED`: from so many sockets at once, sends datagrams of each of the sizes (commas between them), and demands
//! each back before the next. Both print `ok` and the sum of all bytes.
//! `net channels N`: has the card eth0 use so many pairs of queues.

use std::ffi::c_void;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
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
