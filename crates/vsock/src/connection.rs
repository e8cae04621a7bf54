//! One connection: a Unix socket on one side, the guest's packets on the other, and the credit of both (5.10.6.3).

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;

use crate::wire::{HOST, Header, NO_RECEIVE, NO_SEND, STREAM, op};

/// Bytes from the guest that are kept for a host that does not read.
pub const BUFFER: u32 = 64 << 10;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A program of the host has connected, and has not said yet to which port.
    Greeting,
    /// The guest has been asked.
    Asked,
    Open,
}

/// What is to be sent to the guest as soon as there is room in the link, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Due {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit_update: bool,
    pub(crate) credit_request: bool,
    pub(crate) shutdown: bool,
    /// The last word: the connection is gone after it.
    pub(crate) reset: bool,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    pub(crate) phase: Phase,
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
    pub(crate) due: Due,
    /// The first line of a program of the host.
    pub(crate) greeting: Vec<u8>,
    /// The guest knows nothing of it any more; what it sent is still on its way to the host.
    pub(crate) orphan: bool,
    /// Waits for its turn to be served.
    pub(crate) queued: bool,
    /// There may be something to read.
    pub(crate) readable: bool,
    /// From the guest, not taken by the host yet.
    to_host: VecDeque<u8>,
    /// Bytes that the guest has sent, and that the host has taken; what of the latter the guest was told.
    received: u32,
    taken: u32,
    told: u32,
    /// Bytes sent to the guest; what it has taken of them, and how many it keeps.
    sent: u32,
    guest_taken: u32,
    guest_room: u32,
    /// The guest was asked for credit and has not given any.
    asked_for_credit: bool,
    /// The guest will send, or receive, no more.
    guest_sends: bool,
    guest_receives: bool,
    /// The host will send, or receive, no more.
    host_sends: bool,
    host_receives: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, phase: Phase, host_port: u32, guest_port: u32) -> Self {
        Self {
            stream,
            phase,
            host_port,
            guest_port,
            due: Due::default(),
            greeting: Vec::new(),
            orphan: false,
            queued: false,
            readable: true,
            to_host: VecDeque::new(),
            received: 0,
            taken: 0,
            told: 0,
            sent: 0,
            guest_taken: 0,
            guest_room: 0,
            asked_for_credit: false,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
        }
    }

    /// A packet's header for the guest.
    pub(crate) fn header(&self, guest: u64, operation: u16) -> Header {
        let mut flags = 0;
        if operation == op::SHUTDOWN {
            flags |= if self.host_sends { 0 } else { NO_SEND };
            flags |= if self.host_receives { 0 } else { NO_RECEIVE };
        }
        Header {
            from_cid: HOST,
            to_cid: guest,
            from_port: self.host_port,
            to_port: self.guest_port,
            len: 0,
            kind: STREAM,
            op: operation,
            flags,
            room: BUFFER,
            taken: self.taken,
        }
    }

    /// The guest has been told what a header says.
    pub(crate) fn has_told(&mut self) {
        self.told = self.taken;
    }

    /// What every packet says of the guest's room.
    pub(crate) fn credit(&mut self, header: &Header) {
        (self.guest_room, self.guest_taken) = (header.room, header.taken);
        if self.window() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Bytes that the guest has room for; none if what it says cannot be.
    pub(crate) fn window(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// Whether to read from the host now. Asks for credit if that is all that is missing.
    pub(crate) fn may_read(&mut self) -> bool {
        let wanted = self.phase == Phase::Open && self.readable && self.host_sends && self.guest_receives;
        if wanted && self.window() == 0 && !self.asked_for_credit {
            self.due.credit_request = true;
            self.asked_for_credit = true;
        }
        wanted && self.window() > 0
    }

    /// Reads from the host into `buffer`, which must not be longer than [`Connection::window`]. The number of bytes that are to be
    /// sent on.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self.stream.read(buffer) {
            Ok(0) => self.host_ends(false),
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return n;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.host_ends(true),
        }
        0
    }

    /// The host sends no more, or is gone altogether.
    fn host_ends(&mut self, gone: bool) {
        if self.host_sends || gone && self.host_receives {
            self.due.shutdown = true;
        }
        self.host_sends = false;
        if gone {
            self.host_receives = false;
            self.to_host.clear();
        }
    }

    /// Takes data from the guest. False if it is more than it has credit for, or more than it said.
    pub(crate) fn push(&mut self, data: &[u8]) -> bool {
        let on_their_way = self.received.wrapping_sub(self.taken) as usize;
        if !self.guest_sends || data.len() > (BUFFER as usize).saturating_sub(on_their_way) {
            return false;
        }
        self.received = self.received.wrapping_add(data.len() as u32);
        if self.host_receives {
            self.to_host.extend(data);
        }
        self.write();
        true
    }

    /// Tells the host, before everything that the guest sends.
    pub(crate) fn greet(&mut self, text: &str) {
        // A fresh socket has room for a line.
        if self.stream.write_all(text.as_bytes()).is_err() {
            self.host_ends(true);
        }
    }

    /// Gives the host what it takes.
    pub(crate) fn write(&mut self) {
        while !self.to_host.is_empty() {
            let (a, b) = self.to_host.as_slices();
            match self.stream.write_vectored(&[IoSlice::new(a), IoSlice::new(b)]) {
                Ok(n) => {
                    self.to_host.drain(..n);
                    self.taken = self.taken.wrapping_add(n as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.host_ends(true),
            }
        }
        // Early enough that a guest that sends without a pause need not wait, and seldom enough.
        if self.taken.wrapping_sub(self.told) >= BUFFER / 4 {
            self.due.credit_update = true;
        }
        self.end_if_done();
    }

    /// The guest ends directions.
    pub(crate) fn guest_ends(&mut self, flags: u32) {
        self.guest_sends &= flags & NO_SEND == 0;
        self.guest_receives &= flags & NO_RECEIVE == 0;
        if !self.guest_receives {
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
        self.end_if_done();
    }

    /// The guest has ended it all. Whether something of what it sent is left for the host, who is to have it.
    pub(crate) fn abandon(&mut self) -> bool {
        (self.orphan, self.guest_receives) = (true, false);
        self.due = Due::default();
        !self.guest_sends && !self.to_host.is_empty()
    }

    /// Passes the guest's end on, after all data; and ends the connection if nothing can come any more in either direction.
    pub(crate) fn end_if_done(&mut self) {
        if self.guest_sends || !self.to_host.is_empty() {
            return;
        }
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        self.due.reset |= !self.guest_receives || !self.host_sends && !self.due.shutdown;
    }
}
