//! A guest that is `smoltcp`, at the other end of the link: its understanding of the protocols against ours, over loopback.

#![allow(clippy::unwrap_used, reason = "a test program")]

use std::collections::VecDeque;
use std::io::{IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringfence_memory::SharedMemory;
use ringfence_net::wire::{MAX_MESSAGE, VNET};
use ringfence_net::{Link, NetSpec, serve};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{EthernetAddress, IpCidr, IpEndpoint, Ipv4Address};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const PATIENCE: Duration = Duration::from_secs(30);

struct Wire {
    link: Link,
    frames: VecDeque<Vec<u8>>,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a Link);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut message = vec![0; VNET + len];
        let result = f(&mut message[VNET..]);
        send(self.0, &message);
        result
    }
}

fn send(link: &Link, message: &[u8]) {
    while link.send(&[IoSlice::new(message)]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock) {
        std::thread::yield_now();
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Time) -> Option<(Rx, Tx<'_>)> {
        let mut buffer = vec![0; MAX_MESSAGE];
        if let Ok(Some(len)) = self.link.receive(&mut buffer, false) {
            self.frames.push_back(buffer[VNET..len].to_vec());
        }
        self.frames.pop_front().map(|frame| (Rx(frame), Tx(&self.link)))
    }

    fn transmit(&mut self, _: Time) -> Option<Tx<'_>> {
        Some(Tx(&self.link))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Guest {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    stack: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(spec: &str) -> Self {
        let (link, other) = Link::pair_with_rings(MAX_MESSAGE).unwrap();
        let spec: NetSpec = spec.parse().unwrap();
        let stack = std::thread::spawn(move || serve(other, &spec).unwrap());
        let mut wire = Wire { link, frames: VecDeque::new() };
        let mut config = Config::new(EthernetAddress(MAC).into());
        config.random_seed = 7;
        let mut interface = Interface::new(config, &mut wire, Time::now());
        interface
            .update_ip_addrs(|ips| ips.push(IpCidr::new(Ipv4Address::new(10, 0, 2, 15).into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(Ipv4Address::new(10, 0, 2, 2)).unwrap();
        Self { wire, interface, sockets: SocketSet::new(Vec::new()), stack: Some(stack) }
    }

    fn poll(&mut self) {
        self.interface.poll(Time::now(), &mut self.wire, &mut self.sockets);
    }

    /// Polls until `done` gives something.
    fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if let Some(value) = done(self) {
                return value;
            }
            assert!(Instant::now() < end, "nothing happened for {PATIENCE:?}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, port: u16, from: u16) -> SocketHandle {
        let handle = self.tcp_socket();
        let to = IpEndpoint::new(Ipv4Address::new(10, 0, 2, 2).into(), port);
        let context = self.interface.context();
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(context, to, from).unwrap();
        handle
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.wire.link.shutdown();
        let ended = self.stack.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn bytes(len: usize, seed: u32) -> Vec<u8> {
    let mut x = seed | 1;
    let step = |_| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as u8
    };
    (0..len).map(step).collect()
}

#[test]
fn both_directions_carry_what_was_sent_and_half_close_passes() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let (up, down) = (bytes(3 << 20, 5), bytes(3 << 20, 9));
    let (expected, answer) = (up.clone(), down.clone());
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut got = Vec::new();
        // Ends only because the guest's half-close arrives.
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expected);
        stream.write_all(&answer).unwrap();
    });
    let mut guest = Guest::new("user");
    let handle = guest.connect(port, 40_000);
    let mut sent = 0;
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() && sent < up.len() {
            sent += socket.send_slice(&up[sent..]).unwrap();
        }
        (sent == up.len()).then(|| socket.close())
    });
    let mut got = Vec::new();
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket
                .recv(|data| {
                    got.extend_from_slice(data);
                    (data.len(), ())
                })
                .unwrap();
        }
        (!socket.may_recv()).then_some(())
    });
    assert!(got == down);
    serving.join().unwrap();
}

#[test]
fn refused_port_is_refused_to_the_guest() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::new("user");
    let handle = guest.connect(closed, 40_001);
    guest.until(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn reset_by_the_host_reaches_the_guest() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new("user");
    let handle = guest.connect(server.local_addr().unwrap().port(), 40_002);
    guest.until(|guest| guest.tcp(handle).may_send().then_some(()));
    let (stream, _) = server.accept().unwrap();
    // Unread data makes the close a reset.
    guest.tcp(handle).send_slice(b"never read").unwrap();
    guest.until(|_| (stream.peek(&mut [0; 10]).unwrap() > 0).then_some(()));
    drop(stream);
    guest.until(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn slow_guest_bounds_what_is_read_for_it() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new("user");
    let handle = guest.connect(server.local_addr().unwrap().port(), 40_003);
    guest.until(|guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = server.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    // The guest reads nothing: its window closes, then our room is full, then the host's own buffers.
    let (mut sent, data, mut idle) = (0_usize, bytes(1 << 16, 3), 0);
    while idle < 200 {
        guest.poll();
        match stream.write(&data[sent % 65_536..]) {
            Ok(len) => (sent, idle) = (sent + len, 0),
            Err(_) => idle += 1,
        }
        std::thread::sleep(Duration::from_millis(1));
        assert!(sent < 64 << 20, "no end to what is taken");
    }
    // And then all of it arrives.
    let (mut got, mut right) = (0_usize, true);
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket
                .recv(|part| {
                    right &= part.iter().zip(got..).all(|(byte, at)| *byte == data[at % 65_536]);
                    got += part.len();
                    (part.len(), ())
                })
                .unwrap();
        }
        (got == sent).then_some(())
    });
    assert!(right);
}

#[test]
fn forwarded_port_leads_to_the_guest() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::new(&format!("user,restrict=yes,forward=tcp:127.0.0.1:{port}:7"));
    let handle = guest.tcp_socket();
    guest.tcp(handle).listen(7).unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        if !socket.can_recv() {
            return None;
        }
        let mut got = [0; 5];
        assert_eq!((socket.recv_slice(&mut got).unwrap(), &got), (5, b"hello"));
        got.reverse();
        socket.send_slice(&got).unwrap();
        Some(())
    });
    guest.until(|_| client.is_finished().then_some(()));
    assert_eq!(&client.join().unwrap(), b"olleh");
}

#[test]
fn restricted_guest_reaches_nothing() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let mut guest = Guest::new("user,restrict=yes");
    let handle = guest.connect(server.local_addr().unwrap().port(), 40_004);
    guest.until(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    assert!(server.accept().is_err());
}

/// Sends `question` to `to` and returns the first answer.
fn ask(guest: &mut Guest, to: SocketAddr, question: &[u8]) -> Vec<u8> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
    let handle = guest.sockets.add(udp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.bind(5000).unwrap();
    socket.send_slice(question, IpEndpoint::from(to)).unwrap();
    guest.until(|guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        let (data, from) = socket.recv().ok()?;
        assert_eq!(from.endpoint, IpEndpoint::from(to));
        Some(data.to_vec())
    })
}

/// A socket that answers one datagram with its bytes in reverse.
fn mirror() -> (SocketAddr, JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        buffer[..len].reverse();
        socket.send_to(&buffer[..len], from).unwrap();
    });
    (address, thread)
}

#[test]
fn datagrams_come_back_and_names_are_asked_of_the_resolver() {
    let (echo, first) = mirror();
    let (resolver, second) = mirror();
    let mut guest = Guest::new(&format!("user,dns={resolver}"));
    let gateway = SocketAddr::from(([10, 0, 2, 2], echo.port()));
    assert_eq!(ask(&mut guest, gateway, b"abc"), b"cba");
    let mut guest = Guest::new(&format!("user,dns={resolver}"));
    assert_eq!(ask(&mut guest, SocketAddr::from(([10, 0, 2, 3], 53)), b"question"), b"noitseuq");
    first.join().unwrap();
    second.join().unwrap();
}

#[test]
fn address_router_and_resolver_come_by_dhcp() {
    let mut guest = Guest::new("user");
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) =
        guest.until(|guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            Some(dhcpv4::Event::Configured(c)) => Some((c.address, c.router, c.dns_servers.to_vec())),
            _ => None,
        });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Address::new(10, 0, 2, 2)));
    assert_eq!(dns, [Ipv4Address::new(10, 0, 2, 3)]);
}

#[test]
fn limit_holds_a_transfer_back() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new("user,bps=200K");
    let handle = guest.connect(server.local_addr().unwrap().port(), 40_005);
    guest.until(|guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = server.accept().unwrap();
    let begun = Instant::now();
    let sending = std::thread::spawn(move || stream.write_all(&bytes(600_000, 1)).unwrap());
    let mut got = 0;
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            got += socket.recv(|part| (part.len(), part.len())).unwrap();
        }
        (got == 600_000).then_some(())
    });
    sending.join().unwrap();
    // One second's worth goes at once, the rest by the rate.
    assert!(begun.elapsed() > Duration::from_millis(1900), "{:?}", begun.elapsed());
}

#[test]
fn packets_pass_at_a_low_rate_in_each_direction() {
    const COUNT: usize = 15;
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let to = IpEndpoint::from(SocketAddr::from(([10, 0, 2, 2], server.local_addr().unwrap().port())));
    let mut guest = Guest::new("user,pps=5");
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 32], vec![0; 8192]);
    let handle = guest.sockets.add(udp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.bind(5000).unwrap();
    (0..COUNT).for_each(|n| socket.send_slice(&[n as u8], to).unwrap());
    let (begun, mut got, mut guests_end) = (Instant::now(), 0, None);
    guest.until(|_| {
        while let Ok((_, from)) = server.recv_from(&mut [0]) {
            (got, guests_end) = (got + 1, Some(from));
        }
        (got == COUNT).then_some(())
    });
    // A second's worth passes at once, the rest by the rate. The question for the gateway's address was one more.
    let up = begun.elapsed();
    assert!((Duration::from_millis(1950)..Duration::from_secs(6)).contains(&up), "{up:?}");
    let (begun, mut got) = (Instant::now(), 0);
    (0..COUNT).for_each(|n| assert_eq!(server.send_to(&[n as u8], guests_end.unwrap()).unwrap(), 1));
    guest.until(|guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((data, _)) = socket.recv() {
            assert_eq!(data, [got as u8], "in order");
            got += 1;
        }
        (got == COUNT).then_some(())
    });
    let down = begun.elapsed();
    assert!((Duration::from_millis(1950)..Duration::from_secs(6)).contains(&down), "{down:?}");
}

#[test]
fn bytes_go_out_at_a_low_rate() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new("user,bps=50K");
    let handle = guest.connect(server.local_addr().unwrap().port(), 40_006);
    guest.until(|guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = server.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let (begun, mut sent, mut got, data) = (Instant::now(), 0, 0, bytes(150_000, 3));
    guest.until(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        let mut buffer = vec![0; 65_536];
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            assert!(buffer[..len] == data[got..got + len]);
            got += len;
        }
        (got == data.len()).then_some(())
    });
    let time = begun.elapsed();
    assert!((Duration::from_millis(1900)..Duration::from_secs(8)).contains(&time), "{time:?}");
}

#[test]
fn hostile_frames_leave_it_working() {
    let (echo, thread) = mirror();
    let mut guest = Guest::new("user");
    let mut seeds = bytes(1 << 20, 77).into_iter();
    let mut random = || seeds.next().unwrap_or(3);
    // A SYN to a port that is closed, with all lengths and fields broken in turn.
    let mut good = vec![0; VNET];
    good.extend_from_slice(&[0x52, 0x55, 10, 0, 2, 2]);
    good.extend_from_slice(&MAC);
    good.extend_from_slice(&[
        8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0x22, 0xb8, 10, 0, 2, 15, 10, 0, 2, 2,
    ]);
    good.extend_from_slice(&[0x9c, 0x40, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    for len in 0..good.len() {
        if len > 1 {
            send(&guest.wire.link, &good[..len]);
        }
    }
    for round in 0..4000 {
        let mut frame = good.clone();
        // Trusted checksums, so that what follows is reached.
        frame[0] = 1;
        for _ in 0..1 + round % 5 {
            let at = VNET + 12 + usize::from(random()) % (frame.len() - VNET - 12);
            frame[at] = random();
        }
        frame[VNET + 24] = 0;
        frame[VNET + 25] = 0;
        let sum: u32 =
            frame[VNET + 14..VNET + 34].chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c[1])).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let check = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[VNET + 24..VNET + 26].copy_from_slice(&check.to_be_bytes());
        // Never out of this host: what the address became stays in the gateway's.
        frame[VNET + 30..VNET + 34].copy_from_slice(&[10, 0, 2, 2]);
        send(&guest.wire.link, &frame);
        let mut buffer = vec![0; MAX_MESSAGE];
        while let Ok(Some(_)) = guest.wire.link.receive(&mut buffer, false) {}
    }
    let gateway = SocketAddr::from(([10, 0, 2, 2], echo.port()));
    assert_eq!(ask(&mut guest, gateway, b"still there"), b"ereht llits");
    thread.join().unwrap();
}

#[test]
fn machine_that_breaks_the_links_rules_ends_the_stack_with_what_it_was() {
    // A count of what was sent, and one of what was taken out, which is looked at when there is an answer to give.
    for (word, why) in [(0, "bytes are in a ring"), (256 + 64, "bytes are left in a ring")] {
        let (mut link, machine) = Link::pair().unwrap();
        // As the machine makes it: a page of words, and two rings.
        let (memory, file) = SharedMemory::create("test", 4096 + 2 * (512 << 10)).unwrap();
        let (machine, files) = (machine.into_socket(), [file.as_fd()]);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let message = [IoSlice::new(&[0x82])];
        rustix::net::sendmsg(&machine, &message, &mut ancillary, SendFlags::empty()).unwrap();
        link.take_rings(MAX_MESSAGE).unwrap();
        let stack = std::thread::spawn(move || serve(link, &"user".parse().unwrap()));
        memory.store(word, 1_u32 << 31);
        // Questions for the gateway's address, each of which is answered (RFC 826).
        let arp = [
            &[0; VNET][..],
            &[0xff; 6],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
        ]
        .concat();
        let record = (4 + arp.len()).next_multiple_of(8);
        let begun = Instant::now();
        for sent in 1_u32.. {
            if stack.is_finished() {
                break;
            }
            if word != 0 {
                let at = 4096 + (sent as usize - 1) * record % (512 << 10);
                memory.store(at, arp.len() as u32);
                memory.write(at + 4, &arp);
                memory.store(0, sent * record as u32);
            }
            let _ = rustix::net::send(&machine, &[0], SendFlags::NOSIGNAL);
            assert!(begun.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_micros(50));
        }
        let error = stack.join().unwrap().unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(why), "{error}: {source}");
    }
}
