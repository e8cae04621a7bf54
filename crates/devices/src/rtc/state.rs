//! The clock's registers and how they follow time.

use ringfence_engine::{StateError, VirtualTime};
use serde::{Deserialize, Serialize};

use super::calendar::{DAY, Moment};
use super::{MEMORY, NAME, RtcConfig, index};
use crate::device::invalid;

const SECOND_NS: i64 = 1_000_000_000;
/// The update-in-progress bit rises this long before the time changes: 244 µs of warning and an update cycle of
/// 1984 µs (table "Update Cycle Times", 32.768 kHz).
const UPDATE_NS: i64 = 244_000 + 1_984_000;
/// From the end of a divider reset to the first update.
const FIRST_UPDATE_NS: i64 = SECOND_NS / 2;
const CRYSTAL_HZ: i128 = 32_768;

/// Register A: bit 7 is update in progress.
mod a {
    pub(super) const UPDATE: u8 = 0x80;
    pub(super) const DIVIDER: u8 = 0x70;
    pub(super) const RATE: u8 = 0x0f;
}

/// Register B.
mod b {
    pub(super) const SET: u8 = 0x80;
    pub(super) const PERIODIC: u8 = 0x40;
    pub(super) const ALARM: u8 = 0x20;
    pub(super) const UPDATE: u8 = 0x10;
    pub(super) const SQUARE_WAVE: u8 = 0x08;
    pub(super) const BINARY: u8 = 0x04;
    pub(super) const HOURS_24: u8 = 0x02;
    pub(super) const INTERRUPTS: u8 = PERIODIC | ALARM | UPDATE;
}

/// Register C: the flags stand where register B has their enable bits.
const INTERRUPT_REQUEST: u8 = 0x80;
/// Register D: the battery is fine.
const VALID: u8 = 0x80;

const TIME_REGISTERS: [u8; 8] = [
    index::SECOND,
    index::MINUTE,
    index::HOUR,
    index::WEEKDAY,
    index::DAY,
    index::MONTH,
    index::YEAR,
    index::CENTURY,
];

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) index: u8,
    /// CMOS memory; the places of the time registers and of registers C and D are not used.
    memory: Vec<u8>,
    /// Register C without the request bit.
    flags: u8,
    /// Virtual time in ns at which the divider chain was at zero: seconds begin whole seconds from there.
    origin: i64,
    /// Seconds since 1970 at `origin`.
    base: i64,
    /// What the weekday register is ahead of the date's weekday.
    weekday_offset: u8,
    /// The time registers, in the order of [`TIME_REGISTERS`], while they stand still.
    frozen: Option<[u8; 8]>,
    /// Events up to here, in ns, are in `flags`.
    seen: i64,
}

/// 2^62 ns are 146 years.
fn ns(time: VirtualTime) -> i64 {
    time.0.min(1 << 62) as i64
}

impl State {
    pub(super) fn new(config: &RtcConfig, now: VirtualTime) -> Self {
        let now = ns(now);
        let mut state = Self {
            index: 0,
            memory: vec![0; MEMORY],
            flags: 0,
            origin: now - i64::from(config.wall_clock.subsec_nanos()),
            // Far beyond the calendar's centuries the time is as good as any other.
            base: config.wall_clock.as_secs().min(1 << 38) as i64,
            weekday_offset: 0,
            frozen: None,
            seen: now,
        };
        // 32.768 kHz crystal, 1024 Hz periodic rate, BCD, 24 hours.
        state.put(index::A, 0x26);
        state.put(index::B, b::HOURS_24);
        state.describe_memory(config);
        state
    }

    pub(super) fn check(&self) -> Result<(), StateError> {
        let time = -(1 << 40)..=1_i64 << 62;
        let ok = self.memory.len() == MEMORY
            && self.index < 0x80
            && self.flags & !b::INTERRUPTS == 0
            && self.weekday_offset < 7
            && time.contains(&self.origin)
            && time.contains(&self.seen)
            && self.base.unsigned_abs() < 1 << 40;
        if ok { Ok(()) } else { Err(invalid(NAME, "a register or time is out of range")) }
    }

    /// The CMOS bytes that firmware sizes memory by.
    fn describe_memory(&mut self, config: &RtcConfig) {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let below = config.memory_below_4g;
        let extended = (below.saturating_sub(MIB) / KIB).min(0xffff);
        // A coprocessor, no diskettes.
        self.put(index::EQUIPMENT, 0x02);
        self.put_number(index::BASE_MEMORY, (below / KIB).min(640), 2);
        self.put_number(index::EXTENDED_MEMORY, extended, 2);
        self.put_number(index::EXTENDED_MEMORY_AGAIN, extended, 2);
        let above_16m = (below.saturating_sub(16 * MIB) / (64 * KIB)).min(0xffff);
        self.put_number(index::MEMORY_ABOVE_16M, above_16m, 2);
        let above_4g = (config.memory_above_4g / (64 * KIB)).min(0xff_ffff);
        self.put_number(index::MEMORY_ABOVE_4G, above_4g, 3);
        // Bytes 0x10 to 0x2d are summed, big-endian.
        let sum: u16 = (0x10..0x2e).map(|i| u16::from(self.get(i))).sum();
        self.put(index::CHECKSUM, (sum >> 8) as u8);
        self.put(index::CHECKSUM + 1, sum as u8);
    }

    fn put_number(&mut self, at: u8, value: u64, len: u8) {
        for i in 0..len {
            self.put(at + i, (value >> (8 * i)) as u8);
        }
    }

    fn get(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn put(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    pub(super) fn set_memory(&mut self, index: u8, value: u8) {
        if index > index::D && index != index::CENTURY {
            self.put(index, value);
        }
    }

    /// The RESET pin (data sheet, "RESET"): interrupts off and flags clear, time and memory untouched.
    pub(super) fn reset(&mut self) {
        self.flags = 0;
        self.put(index::B, self.get(index::B) & !(b::INTERRUPTS | b::SQUARE_WAVE));
    }

    /// Whether the divider chain counts: with the crystal's code, or with those of the other two crystals.
    fn divider_runs(&self) -> bool {
        self.get(index::A) & a::DIVIDER <= 0x20
    }

    fn seconds(&self, time: i64) -> i64 {
        self.base + (time - self.origin).div_euclid(SECOND_NS)
    }

    fn time_of(&self, seconds: i64) -> i64 {
        self.origin + (seconds - self.base) * SECOND_NS
    }

    /// Crystal ticks of the periodic interrupt's period (table "Periodic Interrupt Rate"), if it has a rate.
    fn period(&self) -> Option<i128> {
        let rate = self.get(index::A) & a::RATE;
        let shift = if rate <= 2 { rate + 6 } else { rate - 1 };
        (rate != 0 && self.divider_runs()).then_some(1 << shift)
    }

    /// How many periods the divider chain has completed at `time`.
    fn periods(&self, time: i64, period: i128) -> i128 {
        (i128::from(time - self.origin) * CRYSTAL_HZ).div_euclid(period * i128::from(SECOND_NS))
    }

    // Numbers in registers.

    fn encode(&self, value: u8) -> u8 {
        let binary = self.get(index::B) & b::BINARY != 0;
        if binary { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        let binary = self.get(index::B) & b::BINARY != 0;
        if binary { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.get(index::B) & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        let hour = (hour + 11) % 12 + 1;
        self.encode(hour) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.get(index::B) & b::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// The time registers at `time`, moving or not.
    fn registers(&self, time: i64) -> [u8; 8] {
        if let Some(frozen) = self.frozen {
            return frozen;
        }
        let m = Moment::from_seconds(self.seconds(time));
        let weekday = (m.weekday - 1 + self.weekday_offset) % 7 + 1;
        [
            self.encode(m.second),
            self.encode(m.minute),
            self.encode_hour(m.hour),
            self.encode(weekday),
            self.encode(m.day),
            self.encode(m.month),
            self.encode(m.year),
            self.encode(m.century),
        ]
    }

    /// Makes `registers` the time from `time` on, in step with the divider chain.
    fn set_registers(&mut self, registers: [u8; 8], time: i64) {
        let [second, minute, hour, weekday, day, month, year, century] = registers;
        let moment = Moment {
            second: self.decode(second),
            minute: self.decode(minute),
            hour: self.decode_hour(hour),
            weekday: self.decode(weekday),
            day: self.decode(day),
            month: self.decode(month),
            year: self.decode(year),
            century: self.decode(century),
        };
        let seconds = moment.seconds();
        let usual = i32::from(Moment::from_seconds(seconds).weekday);
        self.weekday_offset = (i32::from(moment.weekday) - usual).rem_euclid(7) as u8;
        self.base = seconds - (time - self.origin).div_euclid(SECOND_NS);
    }

    /// Stops or restarts the time registers after register A or B has changed.
    fn freeze_or_thaw(&mut self, before: [u8; 8]) {
        let stands = self.get(index::B) & b::SET != 0 || !self.divider_runs();
        match (self.frozen, stands) {
            (None, true) => self.frozen = Some(before),
            (Some(registers), false) => {
                self.frozen = None;
                self.set_registers(registers, self.seen);
            }
            _ => (),
        }
    }

    // Events.

    /// The first second after `after` that the alarm is set for.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let alarm = |index| self.get(index);
        // The two top bits set mean any value (data sheet, "don't care" codes).
        let fits = |alarm: u8, value: u8| alarm & 0xc0 == 0xc0 || alarm == value;
        let mut at = after + 1;
        while at <= after + DAY {
            let m = Moment::from_seconds(at);
            if !fits(alarm(index::HOUR_ALARM), self.encode_hour(m.hour)) {
                at += 3600 - at.rem_euclid(3600);
            } else if !fits(alarm(index::MINUTE_ALARM), self.encode(m.minute)) {
                at += 60 - at.rem_euclid(60);
            } else if !fits(alarm(index::SECOND_ALARM), self.encode(m.second)) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// Sets the flags of what has happened up to `now`.
    pub(super) fn catch_up(&mut self, now: VirtualTime) {
        let (from, to) = (self.seen, ns(now));
        if to <= from {
            return;
        }
        self.seen = to;
        if let Some(period) = self.period()
            && self.periods(to, period) > self.periods(from, period)
        {
            self.flags |= b::PERIODIC;
        }
        let (first, last) = (self.seconds(from), self.seconds(to));
        if self.frozen.is_none() && last > first {
            self.flags |= b::UPDATE;
            if self.next_alarm(first).is_some_and(|alarm| alarm <= last) {
                self.flags |= b::ALARM;
            }
        }
    }

    /// Whether the interrupt request is up.
    pub(super) fn interrupts(&self) -> bool {
        self.flags & self.get(index::B) & b::INTERRUPTS != 0
    }

    /// When the next interrupt is due; none while one is waiting already.
    pub(super) fn next_interrupt(&self) -> Option<VirtualTime> {
        if self.interrupts() {
            return None;
        }
        let enabled = self.get(index::B);
        let second = self.seconds(self.seen);
        let runs = self.frozen.is_none();
        let periodic = self.period().filter(|_| enabled & b::PERIODIC != 0).map(|period| {
            let ticks = (self.periods(self.seen, period) + 1) * period;
            self.origin
                + (ticks * i128::from(SECOND_NS)).div_euclid(CRYSTAL_HZ) as i64
                + i64::from((ticks * i128::from(SECOND_NS)).rem_euclid(CRYSTAL_HZ) != 0)
        });
        let update = (runs && enabled & b::UPDATE != 0).then(|| self.time_of(second + 1));
        let alarm = if runs && enabled & b::ALARM != 0 { self.next_alarm(second) } else { None };
        let alarm = alarm.map(|second| self.time_of(second));
        let next = [periodic, update, alarm].into_iter().flatten().min()?;
        Some(VirtualTime(next.max(0) as u64))
    }

    // Registers.

    fn register_a(&self) -> u8 {
        let into_second = (self.seen - self.origin).rem_euclid(SECOND_NS);
        let updating = self.frozen.is_none() && into_second >= SECOND_NS - UPDATE_NS;
        self.get(index::A) | if updating { a::UPDATE } else { 0 }
    }

    pub(super) fn read(&mut self) -> u8 {
        if let Some(i) = TIME_REGISTERS.iter().position(|register| *register == self.index) {
            return self.registers(self.seen)[i];
        }
        match self.index {
            index::A => self.register_a(),
            index::C => {
                let request = if self.interrupts() { INTERRUPT_REQUEST } else { 0 };
                std::mem::take(&mut self.flags) | request
            }
            index::D => VALID,
            other => self.get(other),
        }
    }

    pub(super) fn write(&mut self, value: u8) {
        let mut registers = self.registers(self.seen);
        if let Some(i) = TIME_REGISTERS.iter().position(|register| *register == self.index) {
            registers[i] = value;
            match &mut self.frozen {
                Some(frozen) => *frozen = registers,
                None => self.set_registers(registers, self.seen),
            }
            return;
        }
        match self.index {
            index::A => {
                let ran = self.divider_runs();
                self.put(index::A, value & !a::UPDATE);
                if !ran && self.divider_runs() {
                    // Half a second of the first is over when the divider is let go.
                    self.origin = self.seen - (SECOND_NS - FIRST_UPDATE_NS);
                }
                self.freeze_or_thaw(registers);
            }
            index::B => {
                // SET clears the update-ended interrupt's enable.
                let value = if value & b::SET != 0 { value & !b::UPDATE } else { value };
                self.put(index::B, value);
                self.freeze_or_thaw(registers);
            }
            index::C | index::D => (),
            other => self.put(other, value),
        }
    }
}
