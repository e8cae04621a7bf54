//! A ring between two sides that keep the rules, and beside one that does not.

use std::cell::RefCell;

use super::*;
use crate::rings::places;

const LONGEST: usize = 1000;
const CAPACITY: u32 = Place::capacity_for(LONGEST) as u32;

fn place() -> Place {
    let (memory, _) = SharedMemory::create("test", 4096 + 2 * CAPACITY as usize).unwrap();
    let [place, _] = places(memory, LONGEST);
    place
}

/// Both sides of a ring that has moved `count` bytes already.
fn ring_at(count: u32) -> (Sender, Receiver, Place) {
    let place = place();
    place.set(TAIL, count);
    place.set(HEAD, count);
    let sender = Sender { place: place.clone(), tail: count, head: count };
    (sender, Receiver { place: place.clone(), head: count, tail: count }, place)
}

fn packet(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed) as u8).collect()
}

fn send(sender: &mut Sender, bytes: &[u8]) -> Result<Option<bool>, RingError> {
    sender.send(&[IoSlice::new(bytes)], bytes.len())
}

fn receive(receiver: &mut Receiver) -> Result<Option<Vec<u8>>, RingError> {
    let mut buffer = vec![0; LONGEST];
    Ok(receiver.receive(&mut buffer)?.map(|(len, _)| buffer[..len].to_vec()))
}

#[test]
fn packets_of_all_lengths_cross_the_end_of_the_ring_and_of_the_count() {
    // The count wraps in the midst of it.
    let (mut sender, mut receiver, _) = ring_at(0_u32.wrapping_sub(100 * CAPACITY));
    for seed in 0..5 {
        for len in 1..=LONGEST {
            let sent = packet(len, seed);
            let (a, rest) = sent.split_at(len / 3);
            let (b, c) = rest.split_at(rest.len() / 2);
            let pieces = [a, b, c].map(IoSlice::new);
            assert_eq!(sender.send(&pieces, len), Ok(Some(false)));
            assert!(receive(&mut receiver) == Ok(Some(sent)), "{len} {seed}");
        }
    }
    assert!(sender.tail < 1 << 31, "the count has wrapped");
}

#[test]
fn full_ring_takes_no_more_and_keeps_what_it_has() {
    for len in [1, 4, 5, 12, 13, LONGEST] {
        let (mut sender, mut receiver, _) = ring_at(8 * 77);
        let mut sent = 0;
        while send(&mut sender, &packet(len, sent)).unwrap().is_some() {
            sent += 1;
        }
        assert_eq!(sent, CAPACITY as usize / record(len));
        assert!(receive(&mut receiver).unwrap().unwrap() == packet(len, 0));
        assert_eq!(send(&mut sender, &packet(len, sent)), Ok(Some(false)), "room for one again");
        assert_eq!(send(&mut sender, &packet(len, sent)), Ok(None));
        for seed in 1..=sent {
            assert!(receive(&mut receiver).unwrap().unwrap() == packet(len, seed), "{len} {seed}");
        }
        assert_eq!(receive(&mut receiver), Ok(None));
    }
}

#[test]
fn half_a_ring_has_room_for_every_packet() {
    for longest in [1, 2, 1000, 4092, 4093, 65_561] {
        let capacity = Place::capacity_for(longest);
        assert!(capacity.is_power_of_two() && capacity / 2 >= 2 * record(longest), "{longest}");
    }
}

#[test]
fn bell_is_rung_once_for_each_sleep() {
    let (mut sender, mut receiver, _) = ring_at(0);
    assert_eq!(send(&mut sender, b"nobody sleeps"), Ok(Some(false)));
    assert_eq!(receiver.ask_for_packets(), Ok(true), "one is there: no sleep");
    assert_eq!(send(&mut sender, b"nobody sleeps"), Ok(Some(false)));
    receive(&mut receiver).unwrap().unwrap();
    receive(&mut receiver).unwrap().unwrap();
    assert_eq!(receiver.ask_for_packets(), Ok(false));
    assert_eq!(send(&mut sender, b"wake up"), Ok(Some(true)));
    assert_eq!(send(&mut sender, b"you were called"), Ok(Some(false)));
    receive(&mut receiver).unwrap().unwrap();
    receive(&mut receiver).unwrap().unwrap();
    assert_eq!(receiver.ask_for_packets(), Ok(false));
    receiver.stay_awake();
    assert_eq!(send(&mut sender, b"something else woke you"), Ok(Some(false)));
}

#[test]
fn bell_for_room_is_rung_when_half_is_free_and_once() {
    let (mut sender, mut receiver, _) = ring_at(0);
    while send(&mut sender, &[1; 100]).unwrap().is_some() {}
    assert_eq!(sender.ask_for_room(), Ok(false));
    let mut bells = Vec::new();
    while let Some((_, bell)) = receiver.receive(&mut [0; LONGEST]).unwrap() {
        bells.push((bell, receiver.used() <= CAPACITY / 2));
    }
    assert_eq!(bells.iter().position(|(bell, _)| *bell), bells.iter().position(|(_, half)| *half));
    assert_eq!(bells.iter().filter(|(bell, _)| *bell).count(), 1);
    assert_eq!(sender.has_room(), Ok(true));
}

#[test]
fn count_of_sent_bytes_that_cannot_be_is_refused() {
    let (base, there) = (8 * 99, record(10) as u32);
    let bad = [
        base + there - 8,
        base - 8,
        base + there + 1,
        base + there + 4,
        base + there + CAPACITY + 8,
        base + (1 << 31),
        base.wrapping_sub(1 << 31),
        0,
        u32::MAX,
    ];
    for tail in bad {
        // With a packet that was seen and is still there: then it cannot become less.
        let (mut sender, mut receiver, place) = ring_at(base);
        send(&mut sender, &[7; 10]).unwrap();
        assert_eq!(receiver.has_packets(), Ok(true));
        place.set(TAIL, tail);
        assert_eq!(receive(&mut receiver), Ok(Some(vec![7; 10])), "seen before");
        let after = tail.wrapping_sub(base + there);
        assert_eq!(receive(&mut receiver), Err(RingError::Sent(after)), "{tail:#x}");
        assert_eq!(receiver.has_packets(), Err(RingError::Sent(after)));
        assert_eq!(receiver.ask_for_packets(), Err(RingError::Sent(after)));
    }
}

#[test]
fn count_of_taken_bytes_that_cannot_be_is_refused() {
    let base = 8 * 99;
    let (sent, taken) = (2 * record(10) as u32, record(10) as u32);
    let bad =
        [base, base + 1, base + taken - 8, base + taken + 4, base + sent + 8, base + (1 << 31), 0, u32::MAX];
    for head in bad {
        let (mut sender, mut receiver, place) = ring_at(base);
        send(&mut sender, &[7; 10]).unwrap();
        send(&mut sender, &[7; 10]).unwrap();
        receive(&mut receiver).unwrap().unwrap();
        assert_eq!(sender.has_room(), Ok(true));
        place.set(HEAD, head);
        let error = RingError::Taken((base + sent).wrapping_sub(head));
        assert_eq!(sender.has_room(), Err(error), "{head:#x}");
        assert_eq!(sender.ask_for_room(), Err(error));
    }
}

#[test]
fn count_that_goes_back_is_noticed_by_one_who_sends() {
    let (mut sender, mut receiver, place) = ring_at(8 * 99);
    send(&mut sender, &[7; 10]).unwrap();
    receive(&mut receiver).unwrap().unwrap();
    assert_eq!(sender.has_room(), Ok(true));
    place.set(HEAD, 8 * 99);
    // What there is room for by what is known needs no look.
    let end = loop {
        match send(&mut sender, &[7; LONGEST]) {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(end, Err(RingError::Taken(used)) if used == sender.used() + 16), "{end:?}");
}

#[test]
fn length_that_cannot_be_is_refused() {
    let there = 2 * record(10);
    for len in
        [0, there as u32 - 3, LONGEST as u32, LONGEST as u32 + 1, CAPACITY, 1 << 31, u32::MAX - 3, u32::MAX]
    {
        let (mut sender, mut receiver, place) = ring_at(8 * 99);
        send(&mut sender, &[7; 10]).unwrap();
        send(&mut sender, &[7; 10]).unwrap();
        place.scatter(8 * 99 + CAPACITY as usize, &len.to_le_bytes());
        assert_eq!(receive(&mut receiver), Err(RingError::Length(len)));
    }
    // The longest that the other side can say is there, and one byte more.
    let (_, mut receiver, place) = ring_at(0);
    place.scatter(CAPACITY as usize, &(LONGEST as u32).to_le_bytes());
    place.set(TAIL, record(LONGEST) as u32);
    assert_eq!(receive(&mut receiver).unwrap().unwrap().len(), LONGEST);
}

#[test]
fn packet_longer_than_the_buffer_is_cut_and_the_next_is_whole() {
    let (mut sender, mut receiver, _) = ring_at(0);
    send(&mut sender, &packet(500, 1)).unwrap();
    send(&mut sender, &packet(20, 2)).unwrap();
    let mut buffer = [0; 30];
    assert_eq!(receiver.receive(&mut buffer), Ok(Some((30, false))));
    assert_eq!(buffer[..], packet(500, 1)[..30]);
    assert!(receive(&mut receiver) == Ok(Some(packet(20, 2))));
}

#[test]
fn what_changes_while_it_is_read_is_a_whole_packet_or_an_error() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};
    for base in [0, CAPACITY - 8] {
        let (_, _, place) = ring_at(base);
        let done = AtomicBool::new(false);
        let scribble = |round: usize| {
            let len = [1, 20, LONGEST as u32, LONGEST as u32 + 1, u32::MAX][round % 5];
            place.scatter(base as usize + CAPACITY as usize, &len.to_le_bytes());
            place.set(TAIL, base.wrapping_add([0, 24, 1008, 4, CAPACITY + 8][round / 5 % 5]));
        };
        // How often there was nothing, a packet, and each error.
        let mut seen = [0_u32; 4];
        let result = std::thread::scope(|scope| {
            scope.spawn(|| (0..).take_while(|_| !done.load(Ordering::Relaxed)).for_each(scribble));
            let begun = Instant::now();
            let mut result = Ok(());
            while seen.iter().any(|count| *count < 1000) && result.is_ok() {
                let mut receiver = Receiver { place: place.clone(), head: base, tail: base };
                let (kind, sound) = match receive(&mut receiver) {
                    Ok(None) => (0, true),
                    // A length is not written at once, so there are more of them.
                    Ok(Some(ref bytes)) => (1, (1..=LONGEST).contains(&bytes.len())),
                    Err(RingError::Sent(used)) => (2, [4, CAPACITY + 8].contains(&used)),
                    Err(_) => (3, true),
                };
                seen[kind] += 1;
                if !sound || begun.elapsed() > Duration::from_secs(30) {
                    result = Err(kind);
                }
            }
            done.store(true, Ordering::Relaxed);
            result
        });
        assert_eq!(result, Ok(()), "{seen:?}");
    }
}

/// Does what `one` and `other` do at the same moment, over and over, each of which says whether the other's deed is noticed: one
/// of them must. `between` is done when both are done.
fn at_once(mut one: impl FnMut() -> bool + Send, mut other: impl FnMut() -> bool, mut between: impl FnMut()) {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::time::{Duration, Instant};
    /// Spins until the round is `value`, and gives the whole word.
    fn until(word: &AtomicU32, value: u32) -> u32 {
        let mut spins = 0_u32;
        loop {
            match word.load(SeqCst) {
                now if now >> 1 == value || now == u32::MAX => return now,
                _ if spins % 1000 == 999 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
            spins += 1;
        }
    }
    let (round, noticed) = (AtomicU32::new(0), AtomicU32::new(0));
    let missed = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1.. {
                if until(&round, n) == u32::MAX {
                    return;
                }
                noticed.store(n << 1 | u32::from(one()), SeqCst);
            }
        });
        let (begun, mut missed) = (Instant::now(), 0);
        for n in 1..400_000 {
            round.store(n << 1, SeqCst);
            // Not always at the same distance, which is few cycles.
            for step in 0..n % 512 {
                std::hint::black_box(step);
            }
            let here = other();
            if !here && until(&noticed, n) & 1 == 0 {
                missed += 1;
            }
            until(&noticed, n);
            between();
            if begun.elapsed() > Duration::from_secs(5) {
                break;
            }
        }
        round.store(u32::MAX, SeqCst);
        missed
    });
    assert_eq!(missed, 0, "times that nobody noticed");
}

#[test]
fn packet_that_is_sent_as_the_other_side_goes_to_sleep_is_seen_or_rung_for() {
    let (mut sender, receiver, _) = ring_at(0);
    let receiver = RefCell::new(receiver);
    at_once(
        || send(&mut sender, b"x").unwrap().unwrap(),
        || receiver.borrow_mut().ask_for_packets().unwrap(),
        || {
            receive(&mut receiver.borrow_mut()).unwrap().unwrap();
            receiver.borrow().stay_awake();
        },
    );
}

#[test]
fn room_that_is_made_as_the_other_side_goes_to_sleep_is_seen_or_rung_for() {
    let (mut sender, mut receiver, _) = ring_at(0);
    // One more than half.
    let each = CAPACITY / 2 / record(LONGEST) as u32 + 1;
    (0..each).for_each(|_| assert!(send(&mut sender, &[1; LONGEST]).unwrap().is_some()));
    let sender = RefCell::new(sender);
    at_once(
        || receiver.receive(&mut [0; 8]).unwrap().unwrap().1,
        || sender.borrow_mut().ask_for_room().unwrap(),
        || {
            let mut sender = sender.borrow_mut();
            sender.place.set(BLOCKED, 0);
            assert!(send(&mut sender, &[1; LONGEST]).unwrap().is_some());
        },
    );
}
