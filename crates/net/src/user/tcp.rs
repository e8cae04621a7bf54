//! One TCP connection: the guest's end, spoken in segments, and the host's, a socket.
//!
//! The guest's SYN is answered when the host's connection is up, so a refusal is a refusal for the guest too. Bytes wait in two
//! bounded rings; the window told to the guest is the room in one, and the host's socket is read as far as there is room in the
//! other. The link loses nothing, but a guest may drop what it received: what it has not acknowledged is kept and sent again.
//! A segment out of order is dropped and answered, so nothing is ever kept for a gap.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::user::outlet::Outlet;
use crate::user::ring::Ring;
use crate::wire::{ACK, RST, SYN, Segment};

mod pump;
mod segments;

/// The room for bytes in each direction, in the usual case and when many connections share the memory.
pub(crate) const ROOM: usize = 1 << 20;
pub(crate) const LITTLE_ROOM: usize = 64 << 10;
/// The shift of the windows told to a guest that scales (RFC 7323 2).
const SCALE: u8 = 7;
const FIRST_TIMEOUT: Duration = Duration::from_millis(300);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_TRIES: u32 = 10;
/// Reads of one socket before others have their turn.
const TURNS: usize = 8;

/// Both ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) guest: SocketAddr,
    pub(crate) remote: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has called; the host's socket is connecting.
    Connecting,
    /// The guest was answered.
    Answered,
    /// We have called the guest, for a forwarded port.
    Calling,
    Open,
    /// Nothing more is to be done; the owner drops it.
    Over,
}

#[derive(Debug)]
pub(crate) struct Flow {
    key: Key,
    pub(crate) token: u64,
    pub(crate) stream: TcpStream,
    /// What the host's socket is watched for; `(false, false)` is not at all.
    pub(crate) watched: (bool, bool),
    /// It has taken a segment and is to be pumped when the batch is done.
    pub(crate) touched: bool,
    /// The link had no room; to be pumped when it has.
    pub(crate) blocked: bool,
    pub(crate) deadline: Option<Instant>,
    state: State,
    room: usize,
    mss: usize,
    tries: u32,
    // What the guest sends.
    to_host: Ring,
    rcv_nxt: u32,
    rcv_scale: u8,
    /// The right edge of the window that the guest was told.
    told: u32,
    guest_fin: bool,
    host_shut: bool,
    ack_due: bool,
    // What it is sent. The ring begins at `snd_una`.
    to_guest: Ring,
    snd_una: u32,
    snd_nxt: u32,
    snd_max: u32,
    snd_wnd: usize,
    snd_scale: u8,
    readable: bool,
    host_eof: bool,
    fin_sent: bool,
    fin_acked: bool,
    duplicates: u32,
}

impl Flow {
    fn new(key: Key, token: u64, stream: TcpStream, state: State, isn: u32) -> Self {
        Self {
            key,
            token,
            stream,
            watched: (false, false),
            touched: false,
            blocked: false,
            deadline: None,
            state,
            room: ROOM,
            mss: 536,
            tries: 0,
            to_host: Ring::default(),
            rcv_nxt: 0,
            rcv_scale: 0,
            told: 0,
            guest_fin: false,
            host_shut: false,
            ack_due: false,
            to_guest: Ring::default(),
            snd_una: isn,
            snd_nxt: isn,
            snd_max: isn,
            snd_wnd: 0,
            snd_scale: 0,
            readable: false,
            host_eof: false,
            fin_sent: false,
            fin_acked: false,
            duplicates: 0,
        }
    }

    /// A call by the guest; `stream` is connecting.
    pub(crate) fn outward(
        key: Key,
        token: u64,
        stream: TcpStream,
        syn: &Segment<'_>,
        mss: u16,
        isn: u32,
    ) -> Self {
        let mut flow = Self::new(key, token, stream, State::Connecting, isn);
        flow.options(syn, mss);
        flow
    }

    /// A call to the guest.
    pub(crate) fn inward(key: Key, token: u64, stream: TcpStream, isn: u32) -> Self {
        Self::new(key, token, stream, State::Calling, isn)
    }

    /// Takes note of the guest's options. It is sent no longer segments than its link takes, `most`, whatever it says.
    fn options(&mut self, syn: &Segment<'_>, most: u16) {
        self.rcv_nxt = syn.seq.wrapping_add(1);
        self.told = self.rcv_nxt;
        self.mss = usize::from(syn.mss.unwrap_or(536)).clamp(64, most.into());
        // Windows are scaled if both ends say so.
        (self.snd_scale, self.rcv_scale) = syn.scale.map_or((0, 0), |scale| (scale, SCALE));
        self.snd_wnd = usize::from(syn.window);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    pub(crate) fn key(&self) -> Key {
        self.key
    }

    /// Bytes of memory it holds.
    pub(crate) fn memory(&self) -> usize {
        self.to_host.capacity() + self.to_guest.capacity()
    }

    /// Bounds each direction's bytes from now on.
    pub(crate) fn limit(&mut self, room: usize) {
        self.room = room;
    }

    /// What to watch the host's socket for: readable, writable.
    pub(crate) fn interest(&self) -> (bool, bool) {
        match self.state {
            State::Connecting => (false, true),
            State::Open => {
                (!self.host_eof && !self.readable && self.to_guest.len() < self.room, self.to_host.len() > 0)
            }
            State::Answered | State::Calling | State::Over => (false, false),
        }
    }

    fn window(&self) -> u32 {
        let most = 65_535_usize << self.rcv_scale;
        let free = self.room.saturating_sub(self.to_host.len()).min(most) as u32;
        // Never take back what was told (RFC 9293 3.8.6).
        free.max(self.told.wrapping_sub(self.rcv_nxt).min(most as u32))
    }

    fn in_flight(&self) -> usize {
        self.snd_nxt.wrapping_sub(self.snd_una) as usize
    }

    fn arm(&mut self, now: Instant) {
        let timeout = FIRST_TIMEOUT.saturating_mul(1 << self.tries.min(10)).min(LONGEST_TIMEOUT);
        self.deadline = Some(now + timeout);
    }

    /// The connection ends at once, on both sides.
    fn abort(&mut self, out: &mut Outlet) {
        if self.state != State::Over {
            self.emit(out, RST | ACK, self.snd_max, [&[], &[]]);
        }
        self.abandon();
    }

    /// The guest has ended it: the host's peer sees a reset.
    fn abandon(&mut self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
        self.state = State::Over;
    }

    fn emit(&self, out: &mut Outlet, flags: u8, seq: u32, body: [&[u8]; 2]) -> bool {
        let syn = flags & SYN != 0;
        // The window of a SYN is never scaled.
        let window = if syn { self.window() } else { self.window() >> self.rcv_scale };
        let scaled = self.state == State::Calling || self.rcv_scale != 0;
        let header = Segment {
            source: self.key.remote.port(),
            destination: self.key.guest.port(),
            seq,
            ack: if flags & ACK != 0 { self.rcv_nxt } else { 0 },
            flags,
            window: window.min(65_535) as u16,
            mss: syn.then(|| out.mss(self.key.guest.is_ipv4())),
            scale: (syn && scaled).then_some(SCALE),
            payload: &[],
        };
        out.tcp(&header, [self.key.remote.ip(), self.key.guest.ip()], body, self.mss)
    }

    fn acknowledge(&mut self, out: &mut Outlet) {
        self.emit(out, ACK, self.snd_nxt, [&[], &[]]);
        self.acknowledged();
    }

    fn acknowledged(&mut self) {
        self.ack_due = false;
        let window = (self.window() >> self.rcv_scale).min(65_535) << self.rcv_scale;
        self.told = self.rcv_nxt.wrapping_add(window);
    }

    /// The host's socket is ready.
    pub(crate) fn host_ready(&mut self, out: &mut Outlet, now: Instant) {
        match self.state {
            State::Connecting => match self.stream.take_error() {
                Ok(None) if self.stream.peer_addr().is_ok() => {
                    self.state = State::Answered;
                    self.emit(out, SYN | ACK, self.snd_una, [&[], &[]]);
                    self.told = self.rcv_nxt.wrapping_add(self.window().min(65_535));
                    self.arm(now);
                }
                Ok(None) => {}
                _ => self.abort(out),
            },
            State::Open => {
                self.readable = true;
                self.pump(out, now);
            }
            State::Answered | State::Calling | State::Over => {}
        }
    }

    /// Calls the guest.
    pub(crate) fn call(&mut self, out: &mut Outlet, now: Instant) {
        self.emit(out, SYN, self.snd_una, [&[], &[]]);
        self.arm(now);
    }

    /// The deadline has passed.
    pub(crate) fn timeout(&mut self, out: &mut Outlet, now: Instant) {
        self.deadline = None;
        self.tries += 1;
        if self.tries > MAX_TRIES {
            return self.abort(out);
        }
        match self.state {
            State::Answered => {
                self.emit(out, SYN | ACK, self.snd_una, [&[], &[]]);
                self.arm(now);
            }
            State::Calling => self.call(out, now),
            State::Open => {
                self.rewind();
                if self.snd_wnd == 0 && self.to_guest.len() > 0 {
                    // The window's probe: one byte, which the guest need not take.
                    if self.emit(out, ACK, self.snd_una, self.to_guest.pieces(0, 1))
                        && self.snd_max == self.snd_una
                    {
                        self.snd_max = self.snd_una.wrapping_add(1);
                    }
                    self.arm(now);
                } else {
                    self.pump(out, now);
                }
            }
            State::Connecting | State::Over => {}
        }
    }
}
