use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;

#[test]
fn counted_time_moves_only_when_told() {
    let clock = VirtualClock::new(ClockMode::Counted, 0);
    assert_eq!(clock.now(), VirtualTime(0));
    clock.advance_to(VirtualTime(1234));
    clock.advance_to(VirtualTime(1000));
    assert_eq!((clock.now(), clock.tsc()), (VirtualTime(1234), 1234));
}

#[test]
fn tsc_and_time_convert_without_drift() {
    let clock = VirtualClock::new(ClockMode::Host, 2_596_143);
    for tsc in [1, 999, 2_596_143, 10_u64.pow(15) + 7] {
        let time = clock.time_at_tsc(tsc);
        assert!(clock.tsc_at(time) >= tsc);
        assert!(clock.tsc_at(VirtualTime(time.0 - 1)) < tsc);
    }
}

#[test]
fn clock_goes_on_from_where_it_was_set() {
    for mode in [ClockMode::Host, ClockMode::Counted] {
        let clock = VirtualClock::new(mode, 1_000_000);
        clock.set(VirtualTime(3_600_000_000_000));
        let now = clock.now().0;
        assert!((3_600_000_000_000..3_700_000_000_000).contains(&now), "{mode:?}: {now}");
    }
}

#[test]
fn skipped_period_is_left_out() {
    let clock = VirtualClock::new(ClockMode::Host, 1_000_000);
    std::thread::sleep(Duration::from_millis(20));
    clock.skip(Duration::from_millis(20));
    assert!(clock.now().0 < 20_000_000);
}

/// A clock whose line is there; `None` on hosts whose counter does not tell time.
fn with_line() -> Option<VirtualClock> {
    let clock = VirtualClock::new(ClockMode::Host, NANOSECONDS_KHZ);
    clock.steering.as_ref()?;
    let end = Instant::now() + Duration::from_secs(5);
    while clock.line.at(counter::read()).is_none() {
        assert!(Instant::now() < end, "no line after five seconds");
        clock.now();
    }
    Some(clock)
}

#[test]
fn counted_clock_and_one_of_another_frequency_have_no_line() {
    for (mode, khz) in [(ClockMode::Counted, NANOSECONDS_KHZ), (ClockMode::Host, 2_000_000)] {
        let clock = VirtualClock::new(mode, khz);
        thread::sleep(Duration::from_millis(20));
        clock.now();
        assert_eq!(clock.line.at(counter::read()), None);
    }
}

#[test]
fn time_by_the_line_is_the_hosts() {
    let Some(clock) = with_line() else { return };
    let (mut worst, end) = (0, clock.now().after(400_000_000));
    while clock.now() < end {
        let before = clock.at_host(nanoseconds_since(clock.origin)).0;
        let now = clock.now().0;
        let after = clock.at_host(nanoseconds_since(clock.origin)).0;
        worst = worst.max(before.saturating_sub(now)).max(now.saturating_sub(after));
    }
    assert!(worst < 20_000, "{worst} ns");
}

#[test]
fn time_never_goes_back_from_thread_to_thread() {
    for clock in [with_line(), Some(VirtualClock::with_counter(ClockMode::Host, NANOSECONDS_KHZ, false))] {
        let Some(clock) = clock else { continue };
        let latest = AtomicU64::new(0);
        let read = || {
            for _ in 0..1_000_000 {
                let seen = latest.load(Ordering::Acquire);
                let now = clock.now().0;
                assert!(now >= seen, "{now} behind {seen}");
                latest.fetch_max(now, Ordering::AcqRel);
            }
        };
        thread::scope(|scope| {
            scope.spawn(read);
            scope.spawn(read);
        });
    }
}

/// The line changes a million times a second, as much as it may, under two threads that read it.
#[test]
fn time_never_goes_back_where_lines_meet() {
    let Some(clock) = with_line() else { return };
    let (latest, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let rate = clock.line.fields().rate;
    let read = || {
        let mut direct = 0;
        for _ in 0..1_000_000 {
            let seen = latest.load(Ordering::Acquire);
            if let Some((time, _)) = clock.line.at(counter::read()) {
                assert!(time >= seen, "{time} behind {seen}");
                latest.fetch_max(time, Ordering::AcqRel);
                direct += 1;
            }
        }
        assert!(direct > 100_000, "{direct}");
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(read), scope.spawn(read)];
        scope.spawn(|| {
            let _steering = clock.lock_steering();
            for round in 0_u64.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let rate = rate - rate / steer::BEND + 2 * (rate / steer::BEND) * (round & 1);
                clock.line.change_existing(|old| {
                    let start = counter::read();
                    assert_eq!(clock.line.at(start), None, "a line that changes is none");
                    Line { start, time: old.latest(start), rate }
                });
                for _ in 0..round % 32 {
                    std::hint::spin_loop();
                }
            }
        });
        let results = readers.map(|reader| reader.join());
        done.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
}

#[test]
fn pause_that_nobody_looked_at_is_left_out() {
    let Some(clock) = with_line() else { return };
    let before = clock.now();
    let start = Instant::now();
    // Longer than a line reaches.
    thread::sleep(Duration::from_millis(2100));
    clock.skip(start.elapsed());
    let passed = clock.now().since(before);
    assert!(passed < 50_000_000, "{passed} ns");
    assert!(clock.now() >= before);
}

#[test]
fn set_clock_goes_on_by_its_line() {
    let Some(clock) = with_line() else { return };
    for time in [7_200_000_000_000, 5] {
        clock.set(VirtualTime(time));
        let (by_line, _) = clock.line.at(counter::read()).expect("the line is still there");
        assert!((time..time + 100_000_000).contains(&by_line), "{by_line}");
        let by_host = clock.at_host(nanoseconds_since(clock.origin)).0;
        assert!(by_host.abs_diff(by_line) < 1_000_000, "{by_host}, {by_line}");
    }
}

/// A host whose counter runs at 2.3 GHz, and whose clock is corrected by so many parts per million from comparison to comparison.
struct Host {
    sample: Sample,
    steering: Steering,
    line: Option<Line>,
}

impl Host {
    fn new() -> Self {
        let sample = Sample { counter: 1 << 40, host: 1000 };
        Self { sample, steering: Steering::new(sample), line: None }
    }

    /// `ticks` later, at a rate that is `ppm` too high, the line is steered; the time before and after.
    fn steer(&mut self, ticks: u64, ppm: i64) -> (u64, u64) {
        let before = self.line;
        self.sample.counter += ticks;
        self.sample.host += (ticks as i64 * 10 * (1_000_000 + ppm) / 23_000_000) as u64;
        if let Some(course) = self.steering.course(self.sample, self.sample.host) {
            // Some time passes before the line is there.
            self.line = Some(course.from(self.line, self.sample.counter + 50));
        }
        let time = |line: Option<Line>| line.map_or(0, |line| line.latest(self.sample.counter + 50));
        (time(before), time(self.line))
    }

    fn error(&self) -> i64 {
        self.line.expect("a line").latest(self.sample.counter) as i64 - self.sample.host as i64
    }
}

#[test]
fn drift_against_the_hosts_clock_stays_bounded() {
    let mut host = Host::new();
    assert_eq!(host.steer(1000, 0), (0, 0), "too soon");
    host.steer(1 << 24, 0);
    for round in 0..10_000 {
        let ppm = if round / 50 % 2 == 0 { 500 } else { -500 };
        let (before, after) = host.steer(FRESH + round % 7 * 1000, ppm);
        assert!(after >= before, "round {round}: {before} to {after}");
        // A millionth of a thousand for as long as nobody looks.
        assert!(host.error().abs() < 70_000, "round {round}: {} ns", host.error());
    }
}

#[test]
fn line_that_is_late_is_put_forward_and_one_that_is_early_waits() {
    let mut host = Host::new();
    host.steer(1 << 24, 0);
    // Nobody asked for a minute.
    host.steer(60 * 2_300_000_000, 0);
    assert!(host.error().abs() < 1000, "{}", host.error());
    // The host slept for a minute: its counter went on, its clock did not.
    let asleep = 60 * 2_300_000_000;
    host.sample.counter += asleep;
    let (before, after) = host.steer(1 << 24, 0);
    assert!(after >= before);
    assert!((0..1_000_000_000).contains(&host.error()), "{}", host.error());
    let mut last = host.error();
    for _ in 0..6000 {
        let (before, after) = host.steer(FRESH, 0);
        assert!(after >= before && host.error() <= last + 10, "{last}, {}", host.error());
        last = host.error();
    }
    assert!(last.abs() < 1000, "{last}");
    // Another host, whose counter starts anew.
    host.sample.counter = 5;
    host.steer(10, 0);
    assert_eq!(host.line.expect("a line").at(host.sample.counter), None);
    host.steer(1 << 24, 0);
    assert!(host.error().abs() < 1_000_000, "{}", host.error());
}
