use super::*;

const LVT_TIMER: u64 = 0x320;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;
const MASKED: u32 = 1 << 16;

#[test]
fn divide_configuration_divides_as_the_table_says() {
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut bench = Bench::new(1);
        bench.cpu[0].write32(DIVIDE, code);
        bench.cpu[0].write32(LVT_TIMER, 0x40);
        bench.cpu[0].write32(INITIAL, 1000);
        assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(1000 * divisor));
        bench.pass(divisor * 300);
        assert_eq!(bench.cpu[0].read32(CURRENT), 700);
    }
}

#[test]
fn one_shot_fires_once_at_its_nanosecond() {
    let mut bench = Bench::new(1);
    bench.pass(17);
    bench.cpu[0].write32(DIVIDE, 0);
    bench.cpu[0].write32(LVT_TIMER, 0x40);
    bench.cpu[0].write32(INITIAL, 50);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(117));
    assert_eq!(bench.cpu[0].read32(CURRENT), 50);
    bench.pass(99);
    assert_eq!(bench.cpu[0].read32(CURRENT), 1);
    assert_eq!(bench.cpu[0].pending_interrupt(), None);
    bench.pass(1);
    assert_eq!(bench.cpu[0].read32(CURRENT), 0);
    assert_eq!(bench.cpu[0].take(), Some(0x40));
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime::NEVER);
    bench.pass(1000);
    assert_eq!(bench.cpu[0].take(), None);
}

#[test]
fn periodic_fires_every_period_without_drift() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(DIVIDE, 0xb);
    bench.cpu[0].write32(LVT_TIMER, PERIODIC | 0x40);
    bench.cpu[0].write32(INITIAL, 1000);
    for period in 1..=5 {
        assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(period * 1000));
        // Each time a little late.
        bench.pass(period * 1000 + 7 * period - bench.clock.now().0);
        assert_eq!(bench.cpu[0].read32(CURRENT), 1000 - 7 * period as u32);
        assert_eq!(bench.cpu[0].take(), Some(0x40));
    }
}

#[test]
fn missed_periods_are_one_interrupt() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(DIVIDE, 0xb);
    bench.cpu[0].write32(LVT_TIMER, PERIODIC | 0x40);
    bench.cpu[0].write32(INITIAL, 1000);
    bench.pass(10_300);
    assert_eq!(bench.cpu[0].take(), Some(0x40));
    assert_eq!(bench.cpu[0].take(), None);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(11_000));
    bench.pass(700);
    assert_eq!(bench.cpu[0].read32(CURRENT), 1000);
}

#[test]
fn tsc_deadline_fires_at_the_count_and_disarms() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    cpu.msr_write(0x6e0, 500).unwrap();
    assert_eq!(cpu.msr_read(0x6e0), Ok(0), "ignored in one-shot mode");
    cpu.write32(LVT_TIMER, TSC_DEADLINE | 0x40);
    cpu.write32(INITIAL, 77);
    assert_eq!((cpu.read32(INITIAL), cpu.read32(CURRENT)), (0, 0));
    cpu.msr_write(0x6e0, 500).unwrap();
    assert_eq!((cpu.msr_read(0x6e0), cpu.next_deadline()), (Ok(500), VirtualTime(500)));
    bench.pass(499);
    assert_eq!(bench.cpu[0].take(), None);
    bench.pass(1);
    assert_eq!(bench.cpu[0].take(), Some(0x40));
    assert_eq!(bench.cpu[0].msr_read(0x6e0), Ok(0));
    // One that has passed is due at once.
    bench.cpu[0].msr_write(0x6e0, 3).unwrap();
    bench.pass(0);
    assert_eq!(bench.cpu[0].take(), Some(0x40));
    bench.cpu[0].msr_write(0x6e0, 5000).unwrap();
    bench.cpu[0].msr_write(0x6e0, 0).unwrap();
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime::NEVER);
}

#[test]
fn tsc_deadline_follows_the_guests_own_tsc() {
    let mut bench = Bench::new(1);
    bench.pass(1000);
    let cpu = &mut bench.cpu[0];
    cpu.write32(LVT_TIMER, TSC_DEADLINE | 0x40);
    cpu.set_tsc_offset(-1000);
    cpu.msr_write(0x6e0, 500).unwrap();
    assert_eq!(cpu.next_deadline(), VirtualTime(1500));
    cpu.set_tsc_offset(i64::MAX);
    assert_eq!(cpu.next_deadline(), VirtualTime(0));
    cpu.msr_write(0x6e0, u64::MAX).unwrap();
    cpu.set_tsc_offset(i64::MIN);
    assert_eq!(cpu.next_deadline(), VirtualTime::NEVER);
}

#[test]
fn changing_to_and_from_tsc_deadline_disarms_but_not_between_counts() {
    let mut bench = Bench::new(1);
    let cpu = &mut bench.cpu[0];
    cpu.write32(LVT_TIMER, 0x40);
    cpu.write32(INITIAL, 100);
    cpu.write32(LVT_TIMER, PERIODIC | 0x40);
    assert_eq!(cpu.next_deadline(), VirtualTime(200));
    cpu.write32(LVT_TIMER, TSC_DEADLINE | 0x40);
    assert_eq!(cpu.next_deadline(), VirtualTime::NEVER);
    cpu.msr_write(0x6e0, 500).unwrap();
    cpu.write32(LVT_TIMER, 0x40);
    assert_eq!((cpu.next_deadline(), cpu.msr_read(0x6e0)), (VirtualTime::NEVER, Ok(0)));
    cpu.write32(LVT_TIMER, 3 << 17 | 0x40);
    cpu.write32(INITIAL, 100);
    assert_eq!(cpu.next_deadline(), VirtualTime::NEVER, "the reserved mode stands still");
}

#[test]
fn masked_timer_counts_without_interrupt() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(DIVIDE, 0xb);
    bench.cpu[0].write32(LVT_TIMER, MASKED | PERIODIC | 0x40);
    bench.cpu[0].write32(INITIAL, 1000);
    bench.pass(1100);
    assert_eq!(bench.cpu[0].read32(CURRENT), 900);
    assert_eq!(bench.cpu[0].take(), None);
    bench.cpu[0].write32(LVT_TIMER, PERIODIC | 0x40);
    bench.pass(900);
    assert_eq!(bench.cpu[0].take(), Some(0x40));
}

#[test]
fn new_divisor_keeps_the_count() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(DIVIDE, 0xb);
    bench.cpu[0].write32(LVT_TIMER, PERIODIC | 0x40);
    bench.cpu[0].write32(INITIAL, 1000);
    bench.pass(400);
    bench.cpu[0].write32(DIVIDE, 0x0);
    assert_eq!(bench.cpu[0].read32(CURRENT), 600);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(400 + 1200));
    bench.pass(1200);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(1600 + 2000));
}

#[test]
fn largest_count_is_exact() {
    let mut bench = Bench::new(1);
    bench.cpu[0].write32(DIVIDE, 0xa);
    bench.cpu[0].write32(LVT_TIMER, 0x40);
    bench.cpu[0].write32(INITIAL, u32::MAX);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime(u64::from(u32::MAX) * 128));
    assert_eq!(bench.cpu[0].read32(CURRENT), u32::MAX);
    bench.cpu[0].write32(INITIAL, 0);
    assert_eq!(bench.cpu[0].next_deadline(), VirtualTime::NEVER);
}
