//! What the guest's segments do to a connection.

use std::io;
use std::time::Instant;

use super::{Flow, State};
use crate::user::outlet::Outlet;
use crate::wire::{ACK, FIN, RST, SYN, Segment};

impl Flow {
    /// A segment of the guest's.
    pub(crate) fn segment(&mut self, segment: &Segment<'_>, out: &mut Outlet, now: Instant) {
        match self.state {
            State::Connecting if segment.flags & RST != 0 => self.abandon(),
            State::Connecting | State::Over => {}
            State::Calling => self.answer(segment, out, now),
            State::Answered | State::Open => self.established(segment, out),
        }
    }

    pub(super) fn answer(&mut self, segment: &Segment<'_>, out: &mut Outlet, now: Instant) {
        let right = segment.flags & ACK != 0 && segment.ack == self.snd_una.wrapping_add(1);
        if segment.flags & RST != 0 {
            if right {
                self.abandon();
            }
        } else if segment.flags & SYN != 0 && right {
            self.options(segment, out.mss(self.key.guest.is_ipv4()));
            self.opened(segment.ack);
            self.acknowledge(out);
            self.pump(out, now);
        }
    }

    pub(super) fn opened(&mut self, ack: u32) {
        self.state = State::Open;
        self.readable = true;
        (self.snd_una, self.snd_nxt, self.snd_max) = (ack, ack, ack);
        (self.tries, self.deadline) = (0, None);
    }

    pub(super) fn established(&mut self, segment: &Segment<'_>, out: &mut Outlet) {
        let flags = segment.flags;
        if flags & RST != 0 {
            // Exactly in place, or it may be somebody else's (RFC 5961 3.2).
            if segment.seq == self.rcv_nxt {
                self.abandon();
            } else if segment.seq.wrapping_sub(self.rcv_nxt) < self.window() {
                self.acknowledge(out);
            }
            return;
        }
        if flags & SYN != 0 {
            if self.state == State::Answered {
                self.emit(out, SYN | ACK, self.snd_una, [&[], &[]]);
            } else {
                self.acknowledge(out);
            }
            return;
        }
        if flags & ACK == 0 {
            return;
        }
        if self.state == State::Answered {
            if segment.ack != self.snd_una.wrapping_add(1) {
                return;
            }
            self.opened(segment.ack);
        }
        if self.take_ack(segment, out) {
            self.take_payload(segment);
            self.touched = true;
        }
    }

    /// False if it acknowledges what was never sent.
    pub(super) fn take_ack(&mut self, segment: &Segment<'_>, out: &mut Outlet) -> bool {
        let acked = segment.ack.wrapping_sub(self.snd_una);
        if acked > self.snd_max.wrapping_sub(self.snd_una) {
            // An old one says nothing new; one from the future is answered by what is true.
            if acked < 1 << 31 {
                self.acknowledge(out);
                return false;
            }
            return true;
        }
        let window = usize::from(segment.window) << self.snd_scale;
        if acked > 0 {
            self.fin_acked |= acked as usize > self.to_guest.len();
            self.to_guest.consume(acked as usize);
            self.snd_una = segment.ack;
            if self.snd_nxt.wrapping_sub(self.snd_una) as i32 <= 0 {
                // After a rewind, what was sent before it may be acknowledged, the FIN too.
                self.snd_nxt = self.snd_una;
            }
            self.fin_sent |= self.fin_acked;
            (self.duplicates, self.tries, self.deadline) = (0, 0, None);
        } else if self.in_flight() > 0 && segment.payload.is_empty() && window == self.snd_wnd {
            self.duplicates += 1;
            if self.duplicates == 3 {
                self.rewind();
            }
        } else {
            self.tries = 0;
        }
        self.snd_wnd = window;
        true
    }

    /// Sends from what is not acknowledged on again.
    pub(super) fn rewind(&mut self) {
        self.snd_nxt = self.snd_una;
        self.fin_sent = self.fin_acked;
    }

    pub(super) fn take_payload(&mut self, segment: &Segment<'_>) {
        let fin = segment.flags & FIN != 0;
        if segment.payload.is_empty() && !fin {
            // A probe from before the window is answered (RFC 9293 3.8.4).
            self.ack_due |= segment.seq != self.rcv_nxt;
            return;
        }
        self.ack_due = true;
        let known = self.rcv_nxt.wrapping_sub(segment.seq) as usize;
        if self.guest_fin || known > segment.payload.len() {
            return;
        }
        let new = &segment.payload[known..];
        let window = self.window() as usize;
        let mut taken = 0;
        // Straight to the host while nothing waits before it; an error shows again when the rest is written.
        if self.to_host.len() == 0 && !new.is_empty() {
            taken = io::Write::write(&mut &self.stream, &new[..new.len().min(window)]).unwrap_or(0);
        }
        let rest = &new[taken..];
        taken += self.to_host.push(&rest[..rest.len().min(window - taken)], self.room);
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken as u32);
        if fin && taken == new.len() {
            self.guest_fin = true;
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
        }
        if self.told.wrapping_sub(self.rcv_nxt) as i32 <= 0 {
            self.told = self.rcv_nxt;
        }
    }
}
