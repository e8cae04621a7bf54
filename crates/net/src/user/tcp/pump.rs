//! Moving a connection's bytes between the two ends.

use std::io;
use std::net::Shutdown;
use std::time::Instant;

use super::{Flow, State, TURNS};
use crate::user::outlet::Outlet;
use crate::wire::{ACK, FIN, PSH};

impl Flow {
    /// Moves what can be moved, in both directions.
    pub(crate) fn pump(&mut self, out: &mut Outlet, now: Instant) {
        (self.blocked, self.touched) = (false, false);
        if self.state != State::Open {
            return;
        }
        if self.feed_host().and_then(|()| self.feed_guest(out, now)).is_err() {
            return self.abort(out);
        }
        // Told again when the window has opened by a good part.
        let opened = self.window().wrapping_sub(self.told.wrapping_sub(self.rcv_nxt)) as usize;
        if self.ack_due || (opened >= self.room / 4 && !self.guest_fin) {
            self.acknowledge(out);
        }
        if self.host_shut && self.fin_acked {
            self.state = State::Over;
        }
    }

    pub(super) fn feed_host(&mut self) -> io::Result<()> {
        while self.to_host.len() > 0 {
            match self.to_host.drain(&self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.to_host.len() == 0 {
            self.to_host.shrink();
            if self.guest_fin && !self.host_shut {
                self.host_shut = true;
                // A peer that is gone already needs no goodbye; reading tells what became of it.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }

    pub(super) fn feed_guest(&mut self, out: &mut Outlet, now: Instant) -> io::Result<()> {
        for _ in 0..TURNS {
            let mut got = 0;
            if self.readable && !self.host_eof && self.to_guest.len() < self.room {
                match self.to_guest.fill(&self.stream, self.room) {
                    Ok(0) => self.host_eof = true,
                    Ok(len) => got = len,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if !self.send(out, now) || got == 0 {
                break;
            }
        }
        // If there may be more and there is room, the socket is watched, which tells at once.
        if self.to_guest.len() < self.room {
            self.readable = false;
        }
        self.to_guest.shrink();
        Ok(())
    }

    /// Sends what the guest's window takes. False if the link has no room.
    pub(super) fn send(&mut self, out: &mut Outlet, now: Instant) -> bool {
        let most = out.longest_segment(self.mss, self.key.guest.is_ipv4());
        while !self.fin_sent {
            let flight = self.in_flight();
            let waiting = self.to_guest.len().saturating_sub(flight);
            let len = waiting.min(self.snd_wnd.saturating_sub(flight)).min(most);
            if len == 0 && !(self.host_eof && waiting == 0) {
                break;
            }
            // A small piece of a large amount waits for a better window while an acknowledgement is due anyway.
            if len < self.mss.min(waiting) && flight > 0 {
                break;
            }
            let fin = self.host_eof && len == waiting;
            let flags = ACK | if len == waiting { PSH } else { 0 } | if fin { FIN } else { 0 };
            if !self.emit(out, flags, self.snd_nxt, self.to_guest.pieces(flight, len)) {
                self.blocked = true;
                return false;
            }
            self.acknowledged();
            self.fin_sent = fin;
            self.snd_nxt = self.snd_nxt.wrapping_add(len as u32 + u32::from(fin));
            if self.snd_nxt.wrapping_sub(self.snd_max) as i32 > 0 {
                self.snd_max = self.snd_nxt;
            }
        }
        if (self.in_flight() > 0 || self.to_guest.len() > 0) && self.deadline.is_none() {
            self.arm(now);
        }
        true
    }
}
