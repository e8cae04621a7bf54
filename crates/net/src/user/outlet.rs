//! The way to the guest.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::time::Instant;

use crate::limit::Limiter;
use crate::user::fragments;
use crate::wire::{self, Mac, Offloads, Segment};
use ringfence_helper::Link;

/// Frames without data that wait for room; what comes beyond is lost, as on any wire.
const QUEUE: usize = 1024;

#[derive(Debug)]
pub(crate) struct Outlet {
    pub(crate) link: Link,
    pub(crate) macs: [Mac; 2],
    pub(crate) offloads: Offloads,
    /// The other end is closed.
    pub(crate) gone: bool,
    /// When the rate limit lets more pass.
    pub(crate) retry: Option<Instant>,
    mtu: u16,
    full: bool,
    queue: VecDeque<Vec<u8>>,
    scratch: Vec<u8>,
    limiter: Limiter,
    /// The number of the last packet that was cut.
    packet: u32,
}

impl Outlet {
    pub(crate) fn new(link: Link, gateway: Mac, mtu: u16, limiter: Limiter) -> Self {
        Self {
            link,
            macs: [[0xff; 6], gateway],
            offloads: Offloads::default(),
            gone: false,
            mtu,
            retry: None,
            full: false,
            queue: VecDeque::new(),
            scratch: Vec::with_capacity(256),
            limiter,
            packet: 0,
        }
    }

    /// The largest segment that we take in one frame, to be told in a SYN.
    pub(crate) fn mss(&self, v4: bool) -> u16 {
        self.mtu - if v4 { 40 } else { 60 }
    }

    /// The most data that one segment carries to a guest with this MSS.
    pub(crate) fn longest_segment(&self, mss: usize, v4: bool) -> usize {
        let many = if v4 { self.offloads.tso4 } else { self.offloads.tso6 };
        if many { (65_000 / mss).max(1) * mss } else { mss }
    }

    /// The link has no room; it is watched for some then.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// True if the frame is gone or kept, false if there is no room now.
    fn push(&mut self, pieces: &[&[u8]], keep: bool) -> bool {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        if self.queue.is_empty() && !self.full && self.limiter.passes(Instant::now(), &mut self.retry) {
            match self.link.send(&[
                IoSlice::new(pieces[0]),
                IoSlice::new(pieces.get(1).unwrap_or(&&[][..])),
                IoSlice::new(pieces.get(2).unwrap_or(&&[][..])),
            ]) {
                Ok(()) => {
                    self.limiter.take(len);
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.full = true,
                Err(_) => {
                    self.gone = true;
                    return true;
                }
            }
        }
        if keep && self.queue.len() < QUEUE {
            self.queue.push_back(pieces.concat());
        }
        keep
    }

    /// Sends what has waited; to be called when the link has room or the limit lets more pass.
    pub(crate) fn flush(&mut self) {
        (self.full, self.retry) = (false, None);
        while let Some(frame) = self.queue.pop_front() {
            if !self.limiter.passes(Instant::now(), &mut self.retry) {
                self.queue.push_front(frame);
                return;
            }
            match self.link.send(&[IoSlice::new(&frame)]) {
                Ok(()) => self.limiter.take(frame.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.full = true;
                    self.queue.push_front(frame);
                    return;
                }
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }

    /// Sends a segment. False if it carries data and there is no room for it now.
    pub(crate) fn tcp(
        &mut self,
        segment: &Segment<'_>,
        ips: [IpAddr; 2],
        body: [&[u8]; 2],
        mss: usize,
    ) -> bool {
        let mut head = std::mem::take(&mut self.scratch);
        segment.write(&mut head, self.macs, ips, body, mss, self.offloads);
        let keep = body[0].is_empty() && segment.flags & wire::FIN == 0;
        let sent = self.push(&[&head, body[0], body[1]], keep);
        self.scratch = head;
        sent
    }

    pub(crate) fn udp(&mut self, ips: [IpAddr; 2], ports: [u16; 2], body: &[u8]) {
        let mut frame = std::mem::take(&mut self.scratch);
        // One that came over IPv6 may be longer than IPv4 has them.
        if body.len() <= wire::longest_datagram(ips[0]) {
            wire::udp(&mut frame, self.macs, ips, ports, body);
            self.packet(&frame);
        }
        self.scratch = frame;
    }

    pub(crate) fn icmp(&mut self, ips: [IpAddr; 2], message: &[u8]) {
        let mut frame = std::mem::take(&mut self.scratch);
        wire::icmp(&mut frame, self.macs, ips, message);
        self.packet(&frame);
        self.scratch = frame;
    }

    /// A frame with a packet, in pieces if it is longer than the guest's link takes.
    fn packet(&mut self, frame: &[u8]) {
        if frame.len() <= wire::VNET + wire::ETH + usize::from(self.mtu) {
            self.push(&[frame], true);
            return;
        }
        self.packet = self.packet.wrapping_add(1);
        for piece in fragments::cut(frame, self.mtu, self.packet) {
            self.push(&[&piece], true);
        }
    }

    /// A frame that is no IP packet: `make` appends what comes behind the Ethernet header.
    pub(crate) fn raw(&mut self, ethertype: u16, body: &[u8]) {
        let [to, from] = self.macs;
        let frame = [&[0; wire::VNET][..], &to, &from, &ethertype.to_be_bytes(), body].concat();
        self.push(&[&frame], true);
    }
}
