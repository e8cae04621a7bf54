//! Connections from their beginning to their end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::guest::{CID, Guest};
use crate::connection::BUFFER;
use crate::wire::{INACTIVE, NO_RECEIVE, NO_SEND, op};

#[test]
fn guest_connects_and_data_goes_both_ways() {
    let guest = Guest::new();
    let listener = guest.listen(80);
    let mut stream = guest.connect(&listener, 1000, 80);
    guest.send(1000, 80, op::RW, b"from the guest");
    let mut buffer = [0; 14];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let (header, data) = guest.expect(op::RW);
    assert_eq!((&data[..], header.taken, header.room), (&b"from the host"[..], 14, BUFFER));
}

#[test]
fn host_connects_by_greeting() {
    let guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path(None)).unwrap();
    // In pieces, and with data right behind.
    stream.write_all(b"CONN").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    stream.write_all(b"ECT 22\nearly").unwrap();
    let (header, _) = guest.expect(op::REQUEST);
    assert_eq!(header.to_port, 22);
    guest.send(22, header.from_port, op::RESPONSE, &[]);
    let mut line = vec![0; format!("OK {}\n", header.from_port).len()];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(String::from_utf8(line).unwrap(), format!("OK {}\n", header.from_port));
    assert_eq!(guest.expect(op::RW).1, b"early");
}

#[test]
fn refusals_are_passed_on_in_both_directions() {
    let guest = Guest::new();
    guest.send(1000, 81, op::REQUEST, &[]);
    let (header, _) = guest.expect(op::RST);
    assert_eq!((header.from_port, header.to_port), (81, 1000));
    let mut stream = UnixStream::connect(guest.path(None)).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    let (header, _) = guest.expect(op::REQUEST);
    guest.send(5, header.from_port, op::RST, &[]);
    assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
    for greeting in
        ["CONNECT x\n", "HELLO\n", "CONNECT 99999999999\n", "CONNECT 1 and much more than there may be\n"]
    {
        let mut stream = UnixStream::connect(guest.path(None)).unwrap();
        let _ = stream.write_all(greeting.as_bytes());
        assert!(matches!(stream.read(&mut [0; 9]), Ok(0) | Err(_)), "{greeting}");
    }
    assert!(guest.try_next(Duration::from_millis(50)).is_none());
}

#[test]
fn each_direction_ends_by_itself_and_after_its_data() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    let mut stream = guest.connect(&listener, 1, 7);
    guest.send(1, 7, op::RW, &[5; 5000]);
    guest.shutdown(1, 7, NO_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, [5; 5000]);
    // The other direction goes on, until its own end.
    stream.write_all(b"still").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"still");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, NO_SEND);
    guest.expect(op::RST);
    // And the host first.
    let mut stream = guest.connect(&listener, 2, 7);
    stream.write_all(b"all").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::RW).1, b"all");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, NO_SEND);
    guest.send(2, 7, op::RW, b"answer");
    guest.shutdown(2, 7, NO_SEND | NO_RECEIVE);
    guest.expect(op::RST);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
}

#[test]
fn what_was_sent_before_a_reset_still_arrives_after_an_end() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    let mut stream = guest.connect(&listener, 1, 7);
    // The host does not read. Until its socket is full, and what is kept here too.
    let (mut sent, mut taken) = (Vec::new(), 0);
    loop {
        if BUFFER - (sent.len() as u32 - taken) >= 10_000 {
            let part = [(sent.len() / 10_000) as u8; 10_000];
            guest.send(1, 7, op::RW, &part);
            sent.extend(part);
        } else if let Some((header, _)) = guest.try_next(Duration::from_millis(200)) {
            taken = header.taken;
        } else {
            break;
        }
    }
    guest.shutdown(1, 7, NO_SEND | NO_RECEIVE);
    guest.send(1, 7, op::RST, &[]);
    std::thread::sleep(Duration::from_millis(50));
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all == sent);
}

#[test]
fn program_that_is_gone_ends_the_guests_writing() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    drop(guest.connect(&listener, 1, 7));
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, NO_SEND);
    guest.send(1, 7, op::RW, b"nobody");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, NO_SEND | NO_RECEIVE);
    guest.send(1, 7, op::RST, &[]);
    guest.send(1, 7, op::RW, b"x");
    guest.expect(op::RST);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    guest.room = 1000;
    let listener = guest.listen(9);
    let mut stream = guest.connect(&listener, 1, 9);
    let data: Vec<u8> = (0..10_000).map(|i| (i % 253) as u8).collect();
    stream.write_all(&data).unwrap();
    let mut got = guest.expect(op::RW).1;
    assert_eq!(got.len(), 1000);
    // It asks, once.
    guest.expect(op::CREDIT_REQUEST);
    assert!(guest.try_next(Duration::from_millis(50)).is_none());
    while got.len() < data.len() {
        let header = crate::wire::Header { taken: got.len() as u32, ..guest.header(1, 9, op::CREDIT_UPDATE) };
        guest.send_raw(&header, &[]);
        loop {
            let (header, data) = guest.next();
            got.extend(data);
            if header.op == op::CREDIT_REQUEST || got.len() == 10_000 {
                break;
            }
        }
    }
    assert!(got == data);
}

#[test]
fn guest_is_told_when_there_is_room_again() {
    let guest = Guest::new();
    let listener = guest.listen(9);
    let mut stream = guest.connect(&listener, 1, 9);
    let part = vec![3; BUFFER as usize / 2];
    let (mut sent, mut taken) = (0_u32, 0_u32);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    });
    while sent < 8 << 20 {
        if BUFFER - (sent - taken) >= part.len() as u32 {
            guest.send(1, 9, op::RW, &part);
            sent += part.len() as u32;
        } else {
            taken = guest.expect(op::CREDIT_UPDATE).0.taken;
        }
    }
    guest.shutdown(1, 9, NO_SEND);
    assert_eq!(reader.join().unwrap(), 8 << 20);
}

#[test]
fn driver_that_goes_takes_all_connections_with_it() {
    let guest = Guest::new();
    let listener = guest.listen(9);
    let mut stream = guest.connect(&listener, 1, 9);
    guest.link.send(&[std::io::IoSlice::new(&[INACTIVE])]).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let mut late = UnixStream::connect(guest.path(None)).unwrap();
    let _ = late.write_all(b"CONNECT 1\n");
    assert!(matches!(late.read(&mut [0; 1]), Ok(0) | Err(_)), "nobody is there");
}

#[test]
fn socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let spec = crate::VsockSpec { cid: CID, socket: socket.clone() };
    let switch = crate::switch::Switch::new(ringfence_helper::Link::pair().unwrap().0, &spec).unwrap();
    let error = crate::switch::Switch::new(ringfence_helper::Link::pair().unwrap().0, &spec).err().unwrap();
    assert!(error.to_string().contains("cannot listen"), "{error}");
    drop(switch);
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "a file").unwrap();
    assert!(crate::switch::Switch::new(ringfence_helper::Link::pair().unwrap().0, &spec).is_err());
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "a file");
}
