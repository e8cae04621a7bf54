//! A guest made of bytes: the entry for a fuzzer.
//!
//! Bytes become packets of few ports, and connections from the host. What must hold is asserted: nothing panics, every answer is a whole packet
//! for the guest, and what is kept is bounded.

use std::io::IoSlice;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ringfence_helper::Link;

use crate::connection::BUFFER;
use crate::spec::VsockSpec;
use crate::switch::{LISTENER, MOST, Switch};
use crate::wire::{ACTIVE, HOST, Header, MAX_MESSAGE, STREAM};

/// Lets a guest that sends what `input` says loose, with its sockets in `place`.
///
/// # Panics
/// If the place cannot be used, or when something that must hold does not.
pub fn run(place: &Path, input: &[u8]) {
    let socket = place.join("s");
    for name in ["s", "s_1"] {
        let _ = std::fs::remove_file(place.join(name));
    }
    let (link, other) = Link::pair().expect("a link");
    let spec = VsockSpec { cid: 3, socket: socket.clone() };
    let mut switch = Switch::new(link, &spec).expect("the place is ours");
    let listener = UnixListener::bind(place.join("s_1")).expect("the place is ours");
    listener.set_nonblocking(true).expect("a socket");
    let (mut streams, mut buffer) = (Vec::<UnixStream>::new(), vec![0; MAX_MESSAGE + 1]);
    switch.message(&[ACTIVE]);
    let mut bytes = input.iter().copied();
    while let Some(kind) = bytes.next() {
        let mut byte = || bytes.next().unwrap_or(0);
        match kind % 16 {
            0 => switch.message(&[byte() & 3]),
            1 => {
                if let Ok(mut stream) = UnixStream::connect(&socket) {
                    let text: &[u8] = if byte() & 1 == 0 { b"CONNECT 1\n" } else { b"CONNECT 1" };
                    let _ = stream.write_all(text);
                    streams.push(stream);
                }
                switch.accept();
            }
            2 => switch.ready(LISTENER + 1 + u64::from(byte() % 16)),
            3 => {
                streams.extend(listener.accept().map(|(stream, _)| stream));
                if let Some(stream) = streams.last_mut() {
                    let _ = stream.set_nonblocking(true);
                    let _ = stream.write(&[1; 300]);
                }
            }
            4 => drop(streams.pop()),
            5 => {
                let message: Vec<u8> = (0..byte()).map(|_| byte()).collect();
                switch.message(&message);
            }
            _ => {
                let data = vec![0; [0, 1, 100, BUFFER as usize][usize::from(byte() & 3)]];
                let odd = byte();
                let small = |byte: u8| u32::from(byte % 3);
                let header = Header {
                    from_cid: if odd == 1 { 2 } else { 3 },
                    to_cid: if odd == 2 { 3 } else { HOST },
                    from_port: small(byte()),
                    to_port: if odd < 128 { small(byte()) } else { (1 << 30) + small(byte()) },
                    len: if odd == 3 { u32::MAX } else { data.len() as u32 },
                    kind: if odd == 4 { 2 } else { STREAM },
                    op: u16::from(byte() % 9),
                    flags: byte().into(),
                    room: [0, 10, 1 << 16, u32::MAX][usize::from(byte() & 3)],
                    taken: u32::from(byte()) << (byte() & 24),
                };
                switch.message(&[&header.bytes()[..], &data].concat());
            }
        }
        switch.pump().expect("the link is there");
        let (connections, waiting) = switch.kept();
        assert!(connections <= MOST && waiting <= MOST + 256);
        // Most of the time the guest reads.
        if kind < 200 {
            while let Ok(Some(len)) = other.receive(&mut buffer, false) {
                let (header, data) = Header::parse(&buffer[..len]).expect("a packet");
                assert_eq!(header.len as usize, data.len());
            }
        }
    }
    let _ = other.send(&[IoSlice::new(&[0])]);
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_guests_harm_nobody() {
        let place = tempfile::tempdir().unwrap();
        ringfence_helper::fuzz::inputs(300, 2000).for_each(|input| super::run(place.path(), &input));
    }
}
