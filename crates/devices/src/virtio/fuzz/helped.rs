//! Devices whose other end is a process, which is a thread here, or a program of the host.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringfence_net::wire::MAX_MESSAGE;
use ringfence_share::{Server, ShareSpec};
use ringfence_vsock::{Link, VsockSpec};

use super::run;
use crate::serial::SerialOutput;
use crate::virtio::SharedDevice;
use crate::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd, PortSocket, Size};
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::share::{Share, ShareConfig};
use crate::virtio::vsock::{Vsock, VsockConfig};

/// Runs `input` against `device`, the other end of whose link `serve` is given.
fn run_helped(make: impl FnOnce(Link) -> SharedDevice, serve: impl FnOnce(Link) + Send, input: &[u8]) -> u64 {
    run_on(Link::pair(), make, serve, input)
}

/// The same on a link whose ends are there.
fn run_on(
    ends: io::Result<(Link, Link)>,
    make: impl FnOnce(Link) -> SharedDevice,
    serve: impl FnOnce(Link) + Send,
    input: &[u8],
) -> u64 {
    let (link, other) = ends.expect("a link");
    let end = other.try_clone().expect("a link");
    std::thread::scope(|scope| {
        scope.spawn(|| serve(other));
        let given_back = run(make(link), input);
        end.shutdown();
        given_back
    })
}

/// A shared folder, made anew at `folder`.
pub(super) fn share(folder: &Path, input: &[u8]) -> u64 {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).expect("the place is ours");
    let spec = ShareSpec { folder: folder.to_owned(), tag: "fuzz".to_owned(), read_only: false };
    let server = Server::new(&spec).expect("the folder is there");
    let make = |link| {
        let config = ShareConfig { tag: "fuzz".to_owned(), link, reporter: Arc::new(|_| ()) };
        Arc::new(Share::new(config).expect("a thread")) as _
    };
    run_helped(make, |link| ringfence_share::serve(&link, &server).expect("the link is there"), input)
}

/// Sockets at `socket`.
pub(super) fn vsock(socket: &Path, input: &[u8]) -> u64 {
    let spec = VsockSpec { cid: 3, socket: socket.to_owned() };
    let make = |link| {
        let config = VsockConfig { cid: 3, link, reporter: Arc::new(|_| ()) };
        Arc::new(Vsock::new(config).expect("a thread")) as _
    };
    let serve = |link| ringfence_vsock::serve(link, &spec, &mut || ()).expect("the place is ours");
    run_helped(make, serve, input)
}

/// A console and two ports, one at the socket `path`, with a program there that comes and says something.
pub(super) fn console(path: &Path, input: &[u8]) -> u64 {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).expect("the place is ours");
    let mut program = UnixStream::connect(path).expect("somebody listens");
    program.set_nonblocking(true).expect("a socket");
    program.write_all(input.get(..100).unwrap_or(input)).expect("a socket has room for little");
    let end = PortEnd::Socket(PortSocket::new(listener, path.to_owned()).expect("a listening socket"));
    let output = PortEnd::Output(Arc::new(Few::default()));
    let config = ConsoleConfig {
        console: Some(Arc::new(Few::default())),
        size: Size { columns: 80, rows: 25 },
        ports: vec![
            PortConfig { name: "a".to_owned(), end },
            PortConfig { name: "b".to_owned(), end: output },
        ],
    };
    let given_back = run(Arc::new(Console::new(config).expect("a thread")), input);
    let _ = program.read(&mut [0; 4096]);
    given_back
}

/// Takes some bytes, then none, then some again.
#[derive(Default)]
struct Few(AtomicBool);

impl SerialOutput for Few {
    fn write(&self, bytes: &[u8]) -> usize {
        if self.0.fetch_xor(true, Ordering::Relaxed) { 0 } else { bytes.len().min(1000) }
    }

    fn on_room(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

/// A card whose frames come back to it, with one pair of queues or some.
pub(super) fn net(input: &[u8]) -> u64 {
    let pairs = 1 + u16::from(input.first().copied().unwrap_or(0) & 3);
    let make = |link| {
        let config = NetConfig { mac: [2; 6], mtu: 1500, pairs, link, reporter: Arc::new(|_| ()) };
        Arc::new(Net::new(config).expect("a thread")) as _
    };
    let serve = |link: Link| {
        let mut buffer = vec![0; 1 << 17];
        while let Ok(Some(len)) = link.receive(&mut buffer, true) {
            // What there is no room for is lost.
            let _ = link.send(&[IoSlice::new(&buffer[..len])]);
        }
    };
    run_on(Link::pair_with_rings(MAX_MESSAGE), make, serve, input)
}
