//! Guests that keep to no rule.

use std::io::{IoSlice, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::guest::Guest;
use crate::connection::BUFFER;
use crate::switch::MOST;
use crate::wire::{HEADER, Header, op};

#[test]
fn packets_that_belong_to_nothing_are_reset_or_dropped() {
    let guest = Guest::new();
    for operation in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        guest.send(1, 2, operation, &[]);
        guest.expect(op::RST);
    }
    // Resets have no answer, nor have packets in another's name; other types and other addressees have.
    guest.send(1, 2, op::RST, &[]);
    guest.send_raw(&Header { from_cid: 3, ..guest.header(1, 2, op::REQUEST) }, &[]);
    let bad = |change: fn(&mut Header)| {
        let mut header = guest.header(1, 2, op::REQUEST);
        change(&mut header);
        let mut bytes = header.bytes().to_vec();
        bytes.truncate(HEADER);
        guest.link.send(&[IoSlice::new(&bytes)]).unwrap();
    };
    bad(|header| header.kind = 2);
    guest.expect(op::RST);
    for len in [0, 2, HEADER - 1] {
        if len > 0 {
            guest.link.send(&[IoSlice::new(&vec![7; len])]).unwrap();
        }
    }
    assert!(guest.try_next(Duration::from_millis(50)).is_none());
}

#[test]
fn data_beyond_the_credit_or_of_another_length_ends_the_connection() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    // The host's socket takes some; what is here and what it has not taken is never more than the credit.
    let _stream = guest.connect(&listener, 1, 7);
    let mut ended = false;
    for _ in 0..100 {
        guest.send(1, 7, op::RW, &vec![0; BUFFER as usize / 2]);
    }
    for _ in 0..200 {
        match guest.try_next(Duration::from_millis(200)) {
            Some((header, _)) => ended |= header.op == op::RST,
            None => break,
        }
    }
    assert!(ended);
    for len in [0, 1, 100, u32::MAX] {
        let _stream = guest.connect(&listener, len, 7);
        guest.send_raw(&Header { len, ..guest.header(len, 7, op::RW) }, b"12");
        guest.expect(op::RST);
    }
}

#[test]
fn packets_at_the_wrong_time_end_the_connection() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    for operation in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let mut stream = guest.connect(&listener, operation.into(), 7);
        guest.send(operation.into(), 7, operation, &[]);
        guest.expect(op::RST);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "{operation}");
    }
    // Data after the end of data.
    let _stream = guest.connect(&listener, 500, 7);
    guest.shutdown(500, 7, crate::wire::NO_SEND);
    guest.send(500, 7, op::RW, b"late");
    guest.expect(op::RST);
    // Anything but an answer to a question.
    for operation in [op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::REQUEST] {
        let mut stream = UnixStream::connect(guest.path(None)).unwrap();
        std::io::Write::write_all(&mut stream, b"CONNECT 5\n").unwrap();
        let (header, _) = guest.expect(op::REQUEST);
        guest.send(5, header.from_port, operation, &[]);
        guest.expect(op::RST);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn credit_that_cannot_be_is_none() {
    let mut guest = Guest::new();
    guest.room = 0;
    let listener = guest.listen(7);
    let mut stream = guest.connect(&listener, 1, 7);
    std::io::Write::write_all(&mut stream, b"data").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    // More taken than was ever sent.
    guest.send_raw(&Header { room: 10, taken: 77, ..guest.header(1, 7, op::CREDIT_UPDATE) }, &[]);
    assert!(guest.try_next(Duration::from_millis(50)).is_none());
    guest.send_raw(&Header { room: u32::MAX, taken: 0, ..guest.header(1, 7, op::CREDIT_UPDATE) }, &[]);
    assert_eq!(guest.expect(op::RW).1, b"data");
}

#[test]
fn connections_are_bounded() {
    let guest = Guest::new();
    let listener = guest.listen(7);
    let accepting = std::thread::spawn(move || {
        let mut streams = Vec::new();
        while streams.len() < MOST {
            streams.push(listener.accept().unwrap().0);
        }
        (listener, streams)
    });
    let (mut opened, mut refused) = (0, Vec::new());
    for port in 0..MOST as u32 + 50 {
        guest.send(port, 7, op::REQUEST, &[]);
        let (header, _) = guest.next();
        match header.op {
            op::RESPONSE => opened += 1,
            op::RST => refused.push(port),
            other => panic!("{other}"),
        }
        // A host that is slow to accept refuses too; it is asked again.
        if header.op == op::RST && opened < MOST {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    for port in refused.clone() {
        if opened == MOST {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
        guest.send(port, 7, op::REQUEST, &[]);
        opened += usize::from(guest.next().0.op == op::RESPONSE);
    }
    assert_eq!(opened, MOST);
    let (listener, streams) = accepting.join().unwrap();
    guest.send(1 << 20, 7, op::REQUEST, &[]);
    guest.expect(op::RST);
    // One that ends makes room for another.
    guest.send(0, 7, op::RST, &[]);
    drop(guest.connect(&listener, 1 << 20, 7));
    drop(streams);
}

#[test]
fn guest_that_reads_nothing_does_not_make_the_process_keep_its_answers() {
    let guest = Guest::new();
    // Until the link takes no more: the process has stopped reading.
    let mut sent = 0_u32;
    let stray = guest.header(1, 2, op::RW).bytes();
    let mut waited = 0;
    while waited < 50 && sent < 1_000_000 {
        match guest.link.send(&[IoSlice::new(&stray)]) {
            Ok(()) => (sent, waited) = (sent + 1, 0),
            Err(_) => {
                waited += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    assert!(sent < 1_000_000, "it goes on taking");
    for _ in 0..sent {
        guest.expect(op::RST);
    }
    let listener = guest.listen(7);
    drop(guest.connect(&listener, 5, 7));
}
