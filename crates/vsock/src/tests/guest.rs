//! The guest's side: packets sent and received over a link.

use std::io::IoSlice;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringfence_helper::Link;

use crate::spec::VsockSpec;
use crate::wire::{ACTIVE, HOST, Header, MAX_MESSAGE, STREAM, op};

pub(super) const CID: u32 = 42;

/// A guest whose driver is ready, and the thread that serves it.
pub(super) struct Guest {
    pub(super) link: Link,
    pub(super) folder: tempfile::TempDir,
    serving: Option<JoinHandle<()>>,
    /// What the guest tells of its own room.
    pub(super) room: u32,
}

impl Guest {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (link, other) = Link::pair().unwrap();
        let spec = VsockSpec { cid: CID, socket: folder.path().join("s") };
        let (tell, ready) = std::sync::mpsc::channel();
        let serving =
            std::thread::spawn(move || crate::serve(other, &spec, &mut || tell.send(()).unwrap()).unwrap());
        ready.recv().unwrap();
        let guest = Self { link, folder, serving: Some(serving), room: 1 << 20 };
        guest.link.send(&[IoSlice::new(&[ACTIVE])]).unwrap();
        guest
    }

    pub(super) fn path(&self, port: Option<u32>) -> PathBuf {
        self.folder.path().join(port.map_or("s".to_owned(), |port| format!("s_{port}")))
    }

    pub(super) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(Some(port))).unwrap()
    }

    pub(super) fn header(&self, from: u32, to: u32, operation: u16) -> Header {
        Header {
            from_cid: CID.into(),
            to_cid: HOST,
            from_port: from,
            to_port: to,
            kind: STREAM,
            op: operation,
            room: self.room,
            ..Header::default()
        }
    }

    pub(super) fn send_raw(&self, header: &Header, data: &[u8]) {
        while let Err(error) = self.link.send(&[IoSlice::new(&header.bytes()), IoSlice::new(data)]) {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn send(&self, from: u32, to: u32, operation: u16, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(from, to, operation) };
        self.send_raw(&header, data);
    }

    pub(super) fn shutdown(&self, from: u32, to: u32, flags: u32) {
        self.send_raw(&Header { flags, ..self.header(from, to, op::SHUTDOWN) }, &[]);
    }

    /// The next packet, of which there must be one soon.
    pub(super) fn next(&self) -> (Header, Vec<u8>) {
        self.try_next(Duration::from_secs(20)).expect("a packet")
    }

    pub(super) fn try_next(&self, time: Duration) -> Option<(Header, Vec<u8>)> {
        let (end, mut buffer) = (Instant::now() + time, vec![0; MAX_MESSAGE + 1]);
        while Instant::now() < end {
            match self.link.receive(&mut buffer, false) {
                Ok(Some(len)) => {
                    let (header, data) = Header::parse(&buffer[..len]).unwrap();
                    assert_eq!((header.from_cid, header.to_cid), (HOST, CID.into()));
                    assert_eq!(header.len as usize, data.len());
                    return Some((header, data.to_vec()));
                }
                Ok(None) => panic!("the link is closed"),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }

    pub(super) fn expect(&self, operation: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.next();
        assert_eq!(header.op, operation, "{header:?}");
        (header, data)
    }

    /// A connection from the guest's port to one of the host's.
    pub(super) fn connect(&self, listener: &UnixListener, from: u32, to: u32) -> UnixStream {
        self.send(from, to, op::REQUEST, &[]);
        let (stream, _) = listener.accept().unwrap();
        let (header, _) = self.expect(op::RESPONSE);
        assert_eq!((header.from_port, header.to_port), (to, from));
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.link.shutdown();
        if let Some(serving) = self.serving.take() {
            let served = serving.join();
            assert!(served.is_ok() || std::thread::panicking());
        }
    }
}
