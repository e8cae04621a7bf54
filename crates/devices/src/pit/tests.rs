use super::*;
use crate::Device;
use crate::testing::{Bench, poke, read8, write8};

fn pit() -> (Bench, Arc<Pit>) {
    let bench = Bench::new();
    let pit = Pit::new(Arc::clone(&bench.clock), &bench.timers, bench.irq(0));
    (bench, pit)
}

/// Time of a tick, by the definition of the frequency.
fn at(tick: u64) -> u64 {
    (tick * 1_000_000_000).div_ceil(1_193_182)
}

fn program(pit: &Pit, channel: u64, mode: u8, count: u16) {
    write8(pit, CONTROL, (channel as u8) << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    write8(pit, channel, low);
    write8(pit, channel, high);
}

fn count(pit: &Pit, channel: u64) -> u16 {
    u16::from_le_bytes([read8(pit, channel), read8(pit, channel)])
}

fn status(pit: &Pit, channel: u64) -> u8 {
    write8(pit, CONTROL, 0xe0 | 2 << channel);
    read8(pit, channel)
}

fn output(pit: &Pit, channel: u64) -> bool {
    status(pit, channel) & 0x80 != 0
}

/// The ticks, counted from now, during which the output of `channel` is low, out of the first `len`.
fn low_ticks(bench: &Bench, pit: &Pit, channel: u64, len: u64) -> Vec<u64> {
    let origin = Pit::tick(bench.clock.now()) as u64;
    let mut low = Vec::new();
    for tick in 0..len {
        bench.run_to(at(origin + tick));
        if !output(pit, channel) {
            low.push(tick);
        }
    }
    low
}

#[test]
fn mode_2_interrupts_at_exact_multiples_for_ever() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 4772);
    bench.edges(0);
    bench.run_to(1_000_000_000);
    let edges = bench.edges(0);
    // Loaded by the first clock after the write.
    let expected: Vec<u64> =
        (1..=250).map(|k| at(1 + 4772 * k)).take_while(|t| *t <= 1_000_000_000).collect();
    assert_eq!(edges, expected);
    bench.run_to(3_600_000_000_000);
    let last = (Pit::tick(VirtualTime(3_600_000_000_000)) as u64 - 1) / 4772;
    assert_eq!(bench.edges(0).last(), Some(&at(1 + 4772 * last)), "no drift after an hour");
}

#[test]
fn mode_2_counts_down_to_one_and_is_low_there() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 5);
    bench.run_to(at(1));
    let mut seen = Vec::new();
    for tick in 1..=10 {
        bench.run_to(at(tick));
        seen.push(count(&pit, 0));
    }
    assert_eq!(seen, [5, 4, 3, 2, 1, 5, 4, 3, 2, 1]);
    bench.run_to(at(11));
    assert_eq!(low_ticks(&bench, &pit, 0, 10), [4, 9]);
}

#[test]
fn mode_3_halves_even_and_odd_counts_as_the_data_sheet_says() {
    for (n, expected) in [(6, vec![6, 4, 2, 6, 4, 2]), (5, vec![4, 2, 0, 4, 2])] {
        let (bench, pit) = pit();
        program(&pit, 0, 3, n);
        let mut seen = Vec::new();
        for tick in 1..=u64::from(n) {
            bench.run_to(at(tick));
            seen.push(count(&pit, 0));
        }
        assert_eq!(seen, expected, "count {n}");
        bench.run_to(at(u64::from(n) + 1));
        let high = u64::from(n).div_ceil(2);
        let low: Vec<u64> = (high..u64::from(n)).collect();
        assert_eq!(low_ticks(&bench, &pit, 0, u64::from(n)), low, "count {n}");
        bench.edges(0);
        bench.run_to(at(1 + 4 * u64::from(n)));
        assert_eq!(bench.edges(0).last(), Some(&at(1 + 4 * u64::from(n))));
    }
}

#[test]
fn mode_0_interrupts_once_n_plus_1_clocks_after_the_write() {
    let (bench, pit) = pit();
    bench.run_to(at(100));
    program(&pit, 0, 0, 1000);
    assert!(!output(&pit, 0));
    bench.run_to(at(5000));
    assert_eq!(bench.edges(0), [at(1101)]);
    assert!(output(&pit, 0));
    assert_eq!(count(&pit, 0), 1000_u16.wrapping_sub(4899), "goes on counting past zero");
}

#[test]
fn mode_0_first_byte_stops_the_count() {
    let (bench, pit) = pit();
    program(&pit, 0, 0, 1000);
    bench.run_to(at(500));
    write8(&*pit, 0, 0x10);
    bench.run_to(at(5000));
    assert_eq!(bench.edges(0), [0; 0]);
    write8(&*pit, 0, 0);
    bench.run_to(at(6000));
    assert_eq!(bench.edges(0), [at(5017)]);
}

#[test]
fn mode_4_strobes_low_for_one_clock_and_rises_after_it() {
    let (bench, pit) = pit();
    program(&pit, 0, 4, 3);
    bench.edges(0);
    assert_eq!(low_ticks(&bench, &pit, 0, 12), [4]);
    assert_eq!(bench.edges(0), [at(5)]);
}

#[test]
fn mode_1_is_a_pulse_of_n_clocks_from_the_gate() {
    let (bench, pit) = pit();
    program(&pit, 2, 1, 4);
    assert_eq!(low_ticks(&bench, &pit, 2, 10), [0; 0], "no trigger yet");
    write8(&*pit, PORT_B, 1);
    let low = low_ticks(&bench, &pit, 2, 10);
    assert_eq!(low.last(), Some(&4));
    write8(&*pit, PORT_B, 0);
    write8(&*pit, PORT_B, 1);
    bench.run_for(at(2));
    write8(&*pit, PORT_B, 0);
    write8(&*pit, PORT_B, 1);
    assert_eq!(low_ticks(&bench, &pit, 2, 10).last(), Some(&4), "a second trigger prolongs the pulse");
}

#[test]
fn mode_5_strobes_after_the_gate() {
    let (bench, pit) = pit();
    program(&pit, 2, 5, 3);
    write8(&*pit, PORT_B, 1);
    assert_eq!(low_ticks(&bench, &pit, 2, 12), [4]);
}

#[test]
fn gate_holds_mode_0_and_restarts_mode_2() {
    let (bench, pit) = pit();
    write8(&*pit, PORT_B, 1);
    program(&pit, 2, 0, 100);
    bench.run_to(at(11));
    write8(&*pit, PORT_B, 0);
    bench.run_to(at(1000));
    assert_eq!(count(&pit, 2), 90);
    write8(&*pit, PORT_B, 1);
    bench.run_to(at(1010));
    assert_eq!(count(&pit, 2), 80);
    assert_eq!(read8(&*pit, PORT_B) & 0x20, 0);
    bench.run_to(at(1090));
    assert_eq!(read8(&*pit, PORT_B) & 0x21, 0x21, "OUT2 is seen in port 0x61");

    program(&pit, 2, 2, 100);
    bench.run_for(at(51));
    write8(&*pit, PORT_B, 0);
    let held = count(&pit, 2);
    bench.run_for(at(500));
    assert_eq!(count(&pit, 2), held);
    write8(&*pit, PORT_B, 1);
    bench.run_for(at(1));
    assert!(count(&pit, 2) >= 99, "starts over");
}

#[test]
fn new_count_waits_for_the_end_of_the_period() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 100);
    bench.edges(0);
    bench.run_to(at(51));
    write8(&*pit, 0, 10);
    write8(&*pit, 0, 0);
    assert_eq!(status(&pit, 0) & 0x40, 0x40, "null count until it is taken over");
    bench.run_to(at(125));
    assert_eq!(bench.edges(0), [at(101), at(111), at(121)]);
    assert_eq!(status(&pit, 0) & 0x40, 0);
}

#[test]
fn new_count_in_mode_3_waits_for_the_end_of_the_half() {
    let (bench, pit) = pit();
    program(&pit, 0, 3, 100);
    bench.edges(0);
    bench.run_to(at(21));
    write8(&*pit, 0, 10);
    write8(&*pit, 0, 0);
    bench.run_to(at(70));
    assert_eq!(bench.edges(0), [at(56), at(66)], "50 clocks high, then 5 low");
}

#[test]
fn latched_count_and_status_stay_until_read() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 0x1234);
    bench.run_to(at(1));
    write8(&*pit, CONTROL, 0x00);
    bench.run_to(at(0x201));
    write8(&*pit, CONTROL, 0x00);
    assert_eq!(count(&pit, 0), 0x1234, "a second latch command does not replace the first");
    assert_eq!(count(&pit, 0), 0x1034);
    // Read-back of count and status of channels 0 and 1: status comes first.
    write8(&*pit, CONTROL, 0xc6);
    assert_eq!(read8(&*pit, 0), 0x80 | 0x30 | 2 << 1);
    assert_eq!(count(&pit, 0), 0x1034);
    assert_eq!(read8(&*pit, 1) & 0x40, 0x40, "channel 1 has no count");
}

#[test]
fn single_byte_accesses_read_and_write_one_half() {
    let (bench, pit) = pit();
    write8(&*pit, CONTROL, 0x14);
    write8(&*pit, 0, 200);
    bench.run_to(at(11));
    assert_eq!((read8(&*pit, 0), read8(&*pit, 0)), (190, 190));
    write8(&*pit, CONTROL, 0x24);
    write8(&*pit, 0, 3);
    bench.run_to(at(12));
    assert_eq!(read8(&*pit, 0), 3);
}

#[test]
fn bcd_counts_in_decimal() {
    let (bench, pit) = pit();
    write8(&*pit, CONTROL, 0x35);
    write8(&*pit, 0, 0x00);
    write8(&*pit, 0, 0x10);
    bench.run_to(at(2));
    assert_eq!(count(&pit, 0), 0x0999);
    bench.edges(0);
    bench.run_to(at(2001));
    assert_eq!(bench.edges(0), [at(1001), at(2001)]);
    write8(&*pit, CONTROL, 0x31);
    write8(&*pit, 0, 0);
    write8(&*pit, 0, 0);
    bench.run_to(at(2003));
    assert_eq!(count(&pit, 0), 0x9999, "zero stands for 10000");
}

#[test]
fn missed_edges_merge_and_later_ones_keep_their_times() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 1000);
    bench.edges(0);
    bench.oversleep_to(at(5500));
    bench.run_to(at(7001));
    assert_eq!(bench.edges(0), [at(5500), at(6001), at(7001)]);
}

#[test]
fn refresh_bit_toggles_every_15_microseconds() {
    let (bench, pit) = pit();
    let mut toggles = 0;
    let mut last = read8(&*pit, PORT_B) & 0x10;
    for us in 1..=1000 {
        bench.run_to(us * 1000);
        let bit = read8(&*pit, PORT_B) & 0x10;
        toggles += u32::from(bit != last);
        last = bit;
    }
    assert_eq!(toggles, 66);
}

#[test]
fn restored_timer_goes_on_where_it_was() {
    let (bench, pit) = pit();
    program(&pit, 0, 2, 1000);
    bench.run_to(at(1500));
    let saved = pit.save();
    pit.reset();
    bench.run_to(at(1800));
    bench.edges(0);
    pit.restore(&saved).unwrap();
    bench.edges(0);
    bench.run_to(at(3500));
    assert_eq!(bench.edges(0), [at(2001), at(3001)]);
    let mut bad = saved;
    bad.fields["channels"][0]["mode"] = 9.into();
    assert!(matches!(pit.restore(&bad), Err(StateError::Invalid { .. })));
}

#[test]
fn random_accesses_leave_a_working_timer() {
    let (bench, pit) = pit();
    poke(&*pit, 4, &bench, 4);
    poke(&*pit, 0x22, &bench, 5);
    program(&pit, 0, 0, 10);
    bench.edges(0);
    bench.run_for(1_000_000);
    assert_eq!(bench.edges(0).len(), 1);
}
