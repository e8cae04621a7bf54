//! One channel of the timer, as a function of the number of clock ticks.

use serde::{Deserialize, Serialize};

/// A count that was written while another is in use.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Next {
    count: u32,
    /// The tick at which it is taken over; `None`: when the gate rises.
    at: Option<i64>,
    /// Mode 3: it is taken over at the end of the high half.
    after_high: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Channel {
    /// 0 to 5.
    mode: u8,
    /// Which bytes of the count are read and written: 1 low, 2 high, 3 low then high.
    access: u8,
    bcd: bool,
    gate: bool,
    /// The count loaded into the counting element, at most 65536; `None` until there is one.
    count: Option<u32>,
    /// The tick at which the counting element held `count`.
    start: i64,
    /// The tick at which the gate stopped it.
    held: Option<i64>,
    next: Option<Next>,
    /// The low byte of a count whose high byte has not been written yet.
    low_byte: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

/// Ticks of the high half of a square wave.
const fn high_half(count: i64) -> i64 {
    (count + 1) / 2
}

impl Channel {
    /// A channel that has not been programmed. The data sheet leaves its state open; mode 0 without a count is
    /// silent.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            access: 3,
            bcd: false,
            gate,
            count: None,
            start: 0,
            held: None,
            next: None,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Whether a loaded state is one that a channel can be in.
    pub(super) fn is_valid(&self) -> bool {
        let time = |t: i64| (-(1 << 40)..1 << 62).contains(&t);
        let lowest = if matches!(self.mode, 2 | 3) { 2 } else { 1 };
        let count = |n: u32| (lowest..=65536).contains(&n);
        self.mode <= 5
            && (1..=3).contains(&self.access)
            && self.count.is_none_or(count)
            && time(self.start)
            && self.held.is_none_or(time)
            && self.next.as_ref().is_none_or(|n| count(n.count) && n.at.is_none_or(time))
    }

    /// A control word with a mode (not a latch command).
    pub(super) fn program(&mut self, value: u8) {
        let mode = (value >> 1) & 7;
        *self = Self {
            // Modes 6 and 7 are other codes of 2 and 3.
            mode: if mode > 5 { mode & 3 } else { mode },
            access: (value >> 4) & 3,
            bcd: value & 1 != 0,
            ..Self::new(self.gate)
        };
    }

    /// Takes over a count whose moment has come.
    pub(super) fn settle(&mut self, tick: i64) {
        if let Some(Next { count, at: Some(at), after_high }) = self.next
            && at <= tick
        {
            self.next = None;
            self.count = Some(count);
            self.start = if after_high { at - high_half(i64::from(count)) } else { at };
        }
    }

    fn elapsed(&self, tick: i64) -> i64 {
        (self.held.unwrap_or(tick) - self.start).max(0)
    }

    /// The counting element, as read.
    fn value(&self, tick: i64) -> u16 {
        let Some(count) = self.count else { return 0 };
        let (n, e) = (i64::from(count), self.elapsed(tick));
        let value = match self.mode {
            2 => n - e % n,
            3 => {
                // Counts down by two in each half; an odd count starts from one less (Mode 3, "odd counts").
                let x = e % n;
                let in_half = if x < high_half(n) { x } else { x - high_half(n) };
                (n & !1) - 2 * in_half
            }
            _ => n - e,
        };
        if self.bcd {
            let v = value.rem_euclid(10_000) as u16;
            ((v / 1000) << 12) | ((v / 100 % 10) << 8) | ((v / 10 % 10) << 4) | (v % 10)
        } else {
            value.rem_euclid(65_536) as u16
        }
    }

    /// The level of OUT.
    pub(super) fn output(&self, tick: i64) -> bool {
        let Some(count) = self.count else { return self.mode != 0 };
        let (n, e) = (i64::from(count), self.elapsed(tick));
        match self.mode {
            0 | 1 => e >= n,
            2 => !self.gate || e % n != n - 1,
            3 => !self.gate || e % n < high_half(n),
            _ => e != n,
        }
    }

    /// The first tick after `tick` at which OUT rises.
    pub(super) fn next_rise(&self, tick: i64) -> Option<i64> {
        if self.held.is_some() {
            return None;
        }
        let n = i64::from(self.count?);
        let rise = match self.mode {
            0 | 1 => self.start + n,
            2 | 3 => self.start + n * ((tick - self.start).max(0) / n + 1),
            _ => self.start + n + 1,
        };
        if let Some(Next { at: Some(at), .. }) = self.next
            && rise > at
        {
            let mut then = self.clone();
            then.settle(at);
            return then.next_rise(tick.max(at));
        }
        (rise > tick).then_some(rise)
    }

    pub(super) fn set_gate(&mut self, tick: i64, gate: bool) {
        self.settle(tick);
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (0 | 4, true) => {
                if let Some(held) = self.held.take() {
                    self.start += (tick - held).max(0);
                }
            }
            (0 | 4, false) => self.held = Some(tick.max(self.start)),
            (2 | 3, false) => {
                self.held = Some(tick.max(self.start));
                if let Some(next) = &mut self.next {
                    *next = Next { count: next.count, at: None, after_high: false };
                }
            }
            // The gate's rise is the trigger of modes 1 and 5 and restarts modes 2 and 3.
            (_, true) => {
                if let Some(next) = self.next.take() {
                    self.count = Some(next.count);
                }
                self.start = tick + 1;
                self.held = None;
            }
            (_, false) => (),
        }
    }

    fn load(&mut self, tick: i64, value: u16) {
        self.settle(tick);
        let mut count = u32::from(value);
        let full = if self.bcd {
            // Digits above 9 are not defined; they count for what they are.
            count = (0..4).rev().fold(0, |n, digit| n * 10 + (count >> (4 * digit) & 15));
            10_000
        } else {
            65_536
        };
        if count == 0 {
            count = full;
        }
        if matches!(self.mode, 2 | 3) {
            // A count of 1 is illegal there.
            count = count.max(2);
        }
        match self.mode {
            1 | 5 => self.next = Some(Next { count, at: None, after_high: false }),
            2 | 3 if let Some(old) = self.count => {
                let (n, e) = (i64::from(old), self.elapsed(tick));
                let after_high = self.mode == 3 && e % n < high_half(n);
                let end = if after_high { high_half(n) } else { n };
                let at = self.gate.then_some(self.start + e - e % n + end);
                self.next = Some(Next { count, at, after_high: after_high && self.gate });
            }
            _ => {
                // The next clock pulse loads it.
                self.count = Some(count);
                self.start = tick + 1;
                self.held = (!self.gate).then_some(tick + 1);
            }
        }
    }

    pub(super) fn write(&mut self, tick: i64, value: u8) {
        match (self.access, self.low_byte.take()) {
            (1, _) => self.load(tick, u16::from(value)),
            (2, _) => self.load(tick, u16::from(value) << 8),
            (_, Some(low)) => self.load(tick, u16::from_le_bytes([low, value])),
            (_, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counting and lowers OUT (Mode 0).
                    self.count = None;
                }
            }
        }
    }

    pub(super) fn read(&mut self, tick: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        self.settle(tick);
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(tick)).to_le_bytes();
        let read_high = self.access == 2 || self.access == 3 && self.read_high;
        if self.access == 3 {
            self.read_high = !self.read_high;
        }
        if self.access != 3 || read_high {
            self.latched_count = None;
        }
        if read_high { high } else { low }
    }

    pub(super) fn latch_count(&mut self, tick: i64) {
        self.settle(tick);
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    pub(super) fn latch_status(&mut self, tick: i64) {
        self.settle(tick);
        let null_count = self.count.is_none() || self.next.is_some() || tick < self.start;
        let status = u8::from(self.output(tick)) << 7
            | u8::from(null_count) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }
}
