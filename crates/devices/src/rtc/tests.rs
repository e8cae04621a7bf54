use super::index::*;
use super::*;
use crate::Device;
use crate::testing::{Bench, poke, read8, write8};

const S: u64 = 1_000_000_000;
/// 2024-02-28 23:59:50 UTC, a Wednesday.
const START: u64 = 1_709_164_790;

struct Fixture {
    bench: Bench,
    rtc: Arc<Rtc>,
}

fn fixture() -> Fixture {
    fixture_with(START, 0, 0x2000_0000, 0x1_4000_0000)
}

fn fixture_with(seconds: u64, nanos: u32, below: u64, above: u64) -> Fixture {
    let bench = Bench::new();
    let config = RtcConfig {
        wall_clock: Duration::new(seconds, nanos),
        memory_below_4g: below,
        memory_above_4g: above,
    };
    let rtc = Rtc::new(Arc::clone(&bench.clock), &bench.timers, bench.irq(8), config);
    Fixture { bench, rtc }
}

impl Fixture {
    fn get(&self, index: u8) -> u8 {
        write8(&*self.rtc, 0, index);
        read8(&*self.rtc, 1)
    }

    fn put(&self, index: u8, value: u8) {
        write8(&*self.rtc, 0, index | 0x80);
        write8(&*self.rtc, 1, value);
    }

    /// Hour, minute, second as the registers show them.
    fn time(&self) -> [u8; 3] {
        [HOUR, MINUTE, SECOND].map(|i| self.get(i))
    }

    /// Century, year, month, day, weekday.
    fn date(&self) -> [u8; 5] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY].map(|i| self.get(i))
    }
}

#[test]
fn time_follows_the_clock_over_a_leap_day() {
    let f = fixture();
    assert_eq!(f.time(), [0x23, 0x59, 0x50]);
    assert_eq!(f.date(), [0x20, 0x24, 0x02, 0x28, 4]);
    f.bench.run_to(10 * S - 1);
    assert_eq!(f.time(), [0x23, 0x59, 0x59]);
    f.bench.run_to(10 * S);
    assert_eq!(f.time(), [0, 0, 0]);
    assert_eq!(f.date(), [0x20, 0x24, 0x02, 0x29, 5]);
    f.bench.run_for(86_400 * S);
    assert_eq!(f.date(), [0x20, 0x24, 0x03, 0x01, 6]);
}

#[test]
fn fraction_of_the_starting_second_counts() {
    let f = fixture_with(START, 750_000_000, 1 << 29, 0);
    f.bench.run_to(S / 4 - 1);
    assert_eq!(f.get(SECOND), 0x50);
    f.bench.run_to(S / 4);
    assert_eq!(f.get(SECOND), 0x51);
}

#[test]
fn formats_follow_register_b() {
    let f = fixture();
    f.put(B, 0x06);
    assert_eq!(f.time(), [23, 59, 50]);
    assert_eq!(f.date()[..2], [20, 24]);
    f.put(B, 0x04);
    assert_eq!(f.get(HOUR), 0x80 | 11);
    f.bench.run_to(10 * S);
    assert_eq!(f.get(HOUR), 12, "midnight is twelve in the morning");
    f.put(B, 0x00);
    f.bench.run_for(12 * 3600 * S);
    assert_eq!(f.get(HOUR), 0x92, "noon is twelve in the afternoon");
}

#[test]
fn time_set_as_linux_does_begins_half_a_second_after_the_divider_reset() {
    let f = fixture();
    f.bench.run_to(123_456_789);
    let control = f.get(B);
    f.put(B, control | 0x80);
    let select = f.get(A);
    f.put(A, select | 0x70);
    for (index, value) in
        [(YEAR, 0x31), (MONTH, 0x12), (DAY, 0x31), (HOUR, 0x23), (MINUTE, 0x59), (SECOND, 0x59)]
    {
        f.put(index, value);
    }
    f.bench.run_for(5 * S);
    assert_eq!(f.time(), [0x23, 0x59, 0x59], "stands still meanwhile");
    assert_eq!(f.get(A) & 0x80, 0);
    f.put(B, control);
    f.put(A, select);
    let now = f.bench.clock.now().0;
    f.bench.run_to(now + S / 2 - 1);
    assert_eq!(f.time(), [0x23, 0x59, 0x59]);
    f.bench.run_to(now + S / 2);
    assert_eq!(f.time(), [0, 0, 0]);
    assert_eq!(f.date()[..4], [0x20, 0x32, 0x01, 0x01]);
}

#[test]
fn set_bit_alone_keeps_the_phase_of_the_seconds() {
    let f = fixture();
    f.bench.run_to(S / 4);
    f.put(B, 0x82);
    f.put(SECOND, 0x05);
    f.bench.run_to(3 * S + S / 4);
    f.put(B, 0x02);
    assert_eq!(f.get(SECOND), 0x05);
    f.bench.run_to(4 * S);
    assert_eq!(f.get(SECOND), 0x06);
}

#[test]
fn single_register_can_be_written_while_running() {
    let f = fixture();
    f.put(WEEKDAY, 7);
    f.put(CENTURY, 0x19);
    assert_eq!(f.date(), [0x19, 0x24, 0x02, 0x28, 7]);
    f.bench.run_to(10 * S);
    assert_eq!(f.date(), [0x19, 0x24, 0x02, 0x29, 1], "the weekday goes on from what was written");
}

#[test]
fn update_in_progress_precedes_the_change() {
    let f = fixture();
    f.bench.run_to(S - 2_228_001);
    assert_eq!(f.get(A), 0x26);
    f.bench.run_to(S - 2_228_000);
    assert_eq!((f.get(A), f.get(SECOND)), (0xa6, 0x50));
    f.bench.run_to(S);
    assert_eq!((f.get(A), f.get(SECOND)), (0x26, 0x51));
}

#[test]
fn periodic_interrupt_keeps_its_rate_without_drift() {
    let f = fixture();
    f.put(A, 0x2d);
    f.put(B, 0x42);
    let mut seen = 0;
    while f.bench.clock.now().0 < 100 * S {
        f.bench.run_for(1_000_000);
        if f.bench.level(8) {
            assert_eq!(f.get(C) & 0xc0, 0xc0);
            assert!(!f.bench.level(8));
            seen += 1;
        }
    }
    assert_eq!(seen, 800, "8 Hz for 100 s");
    let edges = f.bench.edges(8);
    assert_eq!(edges[0], S / 8);
    assert_eq!(edges[799], 100 * S);
}

#[test]
fn periodic_rates_are_those_of_the_table() {
    for (rate, ticks) in [(1, 128_u64), (2, 256), (3, 4), (6, 32), (15, 16_384)] {
        let f = fixture();
        f.put(A, 0x20 | rate);
        f.put(B, 0x42);
        f.bench.run_to(2 * S);
        assert_eq!(f.bench.edges(8), [(ticks * S).div_ceil(32_768)], "rate {rate}");
    }
    let f = fixture();
    f.put(A, 0x20);
    f.put(B, 0x42);
    f.bench.run_to(2 * S);
    assert_eq!(f.bench.edges(8), [0; 0]);
    assert_eq!(f.get(C) & 0x40, 0);
}

#[test]
fn update_ended_interrupt_comes_with_each_second() {
    let f = fixture();
    f.put(B, 0x12);
    for second in 1..=3 {
        f.bench.run_to(second * S + 1000);
        assert_eq!(f.get(C) & 0xb0, 0x90);
    }
    assert_eq!(f.bench.edges(8), [S, 2 * S, 3 * S]);
    f.put(B, 0x92);
    assert_eq!(f.get(B), 0x82, "SET clears the enable bit");
}

#[test]
fn unread_flags_give_no_second_interrupt() {
    let f = fixture();
    f.put(B, 0x12);
    f.bench.run_to(5 * S);
    assert_eq!(f.bench.edges(8), [S]);
}

#[test]
fn alarm_interrupts_at_its_time_and_with_any_codes() {
    let f = fixture();
    f.put(HOUR_ALARM, 0x00);
    f.put(MINUTE_ALARM, 0x01);
    f.put(SECOND_ALARM, 0x05);
    f.put(B, 0x22);
    f.bench.run_to(200 * S);
    assert_eq!(f.bench.edges(8), [75 * S]);
    assert_eq!(f.get(C) & 0xa0, 0xa0);
    f.put(HOUR_ALARM, 0xff);
    f.put(MINUTE_ALARM, 0xc0);
    f.put(SECOND_ALARM, 0x30);
    f.bench.run_to(221 * S);
    assert_eq!(f.bench.edges(8), [220 * S], "00:03:30");
}

#[test]
fn alarm_flag_is_seen_without_its_interrupt() {
    let f = fixture();
    f.put(HOUR_ALARM, 0xc0);
    f.put(MINUTE_ALARM, 0xc0);
    f.put(SECOND_ALARM, 0x55);
    f.bench.oversleep_to(4 * S);
    assert_eq!(f.get(C) & 0x20, 0);
    f.bench.oversleep_to(6 * S);
    assert_eq!(f.get(C), 0x70);
    assert_eq!(f.get(C), 0, "reading clears");
}

#[test]
fn memory_bytes_describe_memory() {
    let f = fixture();
    let word = |i: u8| u16::from_le_bytes([f.get(i), f.get(i + 1)]);
    assert_eq!(word(BASE_MEMORY), 640);
    assert_eq!(word(EXTENDED_MEMORY), 0xffff);
    assert_eq!(word(EXTENDED_MEMORY_AGAIN), 0xffff);
    assert_eq!(word(MEMORY_ABOVE_16M), (512 - 16) * 16);
    assert_eq!([0x5b, 0x5c, 0x5d].map(|i| f.get(i)), [0x00, 0x40, 0x01]);
    let sum: u16 = (0x10..0x2e).map(|i| u16::from(f.get(i))).sum();
    assert_eq!(sum.to_be_bytes(), [f.get(CHECKSUM), f.get(CHECKSUM + 1)]);
    let small = fixture_with(START, 0, 8 << 20, 0);
    assert_eq!(small.get(EXTENDED_MEMORY), 0);
    assert_eq!(small.get(EXTENDED_MEMORY + 1), 7 * 4);
}

#[test]
fn cmos_memory_can_be_set_and_survives_reset() {
    let f = fixture();
    f.rtc.set_memory(0x5f, 3);
    f.rtc.set_memory(SECOND, 0x11);
    f.rtc.set_memory(0xff, 1);
    f.put(0x40, 0xaa);
    f.put(B, 0x72);
    f.rtc.reset();
    assert_eq!((f.get(0x5f), f.get(0x40)), (3, 0xaa));
    assert_eq!((f.get(SECOND), f.get(B), f.get(D)), (0x50, 0x02, 0x80));
    assert_eq!(read8(&*f.rtc, 0), 0xff);
}

#[test]
fn restored_clock_goes_on() {
    let f = fixture();
    f.put(B, 0x12);
    f.bench.run_to(S / 2);
    let saved = f.rtc.save();
    f.put(SECOND, 0x01);
    f.put(B, 0x02);
    f.rtc.restore(&saved).unwrap();
    f.bench.run_to(2 * S);
    assert_eq!(f.bench.edges(8), [S]);
    assert_eq!(f.get(SECOND), 0x52);
    let mut bad = saved;
    bad.fields["base"] = i64::MAX.into();
    assert!(matches!(f.rtc.restore(&bad), Err(StateError::Invalid { .. })));
}

#[test]
fn random_accesses_leave_a_working_clock() {
    let f = fixture();
    // Through both ports, and with each register chosen on purpose.
    poke(&*f.rtc, 2, &f.bench, 9);
    let mut random = crate::testing::Random::new(10);
    for _ in 0..20_000 {
        f.put(random.below(128) as u8, random.next() as u8);
        f.get(random.below(128) as u8);
        f.bench.run_for(random.below(100_000_000));
    }
    f.put(A, 0x26);
    f.put(B, 0x02);
    let before = f.get(SECOND);
    f.bench.run_for(S);
    assert_ne!(f.get(SECOND), before);
}
