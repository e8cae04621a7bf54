//! Links with rings: what waits and wakes, and other ends that die, lie, or never take their rings.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::net::RecvFlags;

use super::*;
use crate::ring::Place;

const LONGEST: usize = 2000;

fn send(link: &Link, bytes: &[u8]) -> io::Result<()> {
    link.send(&[IoSlice::new(bytes)])
}

fn receive(link: &Link) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; LONGEST];
    Ok(link.receive(&mut buffer, false)?.map(|len| buffer[..len].to_vec()))
}

fn is_blocked<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Waits as a device does: what the link is ready for. Nobody may have to wait for long.
fn wait(link: &Link, wanted: PollFlags) -> PollFlags {
    let begun = Instant::now();
    loop {
        let ready = link.wait(wanted, |watched, at_once| {
            if !at_once {
                let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), watched)];
                let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
                assert_ne!(poll(&mut fds, Some(&patience)).unwrap(), 0, "nobody rang the bell");
            }
            Ok(PollFlags::IN)
        });
        let ready = ready.unwrap();
        if !ready.is_empty() {
            return ready;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "woken for nothing all the time");
    }
}

/// The two halves of waiting for a link with rings.
fn before_sleep(link: &Link, wanted: PollFlags) -> PollFlags {
    link.rings.as_ref().unwrap().before_sleep(&link.socket, wanted)
}

fn after_sleep(link: &Link, wanted: PollFlags, bell: bool) -> PollFlags {
    link.rings.as_ref().unwrap().after_sleep(&link.socket, wanted, bell)
}

/// A link whose other end does what it likes with the rings.
struct Hostile {
    link: Link,
    /// The socket of the other end.
    other: Link,
    /// The rings, to us and from us.
    rings: [Place; 2],
}

impl Hostile {
    fn new() -> Self {
        let (mut link, mut other) = Link::pair().unwrap();
        let offer = link.offer_rings(LONGEST).unwrap();
        let size = 4096 + 2 * Place::capacity_for(LONGEST);
        let memory = SharedMemory::open(offer.file.as_fd(), size).unwrap();
        let [from, to] = rings::places(memory, LONGEST);
        other.take_rings(LONGEST).unwrap();
        other.rings = None;
        link.use_rings(offer);
        Self { link, other, rings: [to, from] }
    }
}

#[test]
fn messages_cross_both_ways_and_their_limits_hold() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        for len in [1, 2, LONGEST] {
            send(from, &vec![len as u8; len]).unwrap();
            assert_eq!(receive(to).unwrap(), Some(vec![len as u8; len]));
        }
        for len in [0, LONGEST + 1] {
            assert_eq!(send(from, &vec![1; len]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(is_blocked(&receive(to)));
    }
}

#[test]
fn two_threads_that_sleep_whenever_they_can_always_wake_each_other() {
    const MESSAGES: u32 = 100_000;
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    let numbered = |n: u32| {
        let len = 4 + (n.wrapping_mul(2_654_435_761) >> 8) as usize % (LONGEST - 4);
        let mut bytes = vec![n as u8; len];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        bytes
    };
    // Each sends and receives all it can, and sleeps for what it cannot; bursts and pauses by the number.
    let side = move |link: Link| {
        let (mut sent, mut got) = (0, 0);
        while sent < MESSAGES || got < MESSAGES {
            let burst = 1 + sent % 37;
            let mut wanted = PollFlags::empty();
            for _ in 0..burst {
                if sent == MESSAGES {
                    break;
                }
                match send(&link, &numbered(sent)) {
                    Ok(()) => sent += 1,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        wanted |= PollFlags::OUT;
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            while let Ok(message) = receive(&link) {
                assert_eq!(message.unwrap(), numbered(got));
                got += 1;
            }
            wanted.set(PollFlags::IN, got < MESSAGES);
            // Not further ahead of the other than this: so that both come to wait.
            if !wanted.is_empty() && (wanted.contains(PollFlags::OUT) || sent == MESSAGES || sent > got + 50)
            {
                wait(&link, wanted);
            }
        }
        link
    };
    let other = thread::spawn(move || side(b));
    // Neither end goes before the other has heard everything.
    let _ours = side(a);
    other.join().unwrap();
}

#[test]
fn every_single_message_wakes_one_who_sleeps() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    let echo = thread::spawn(move || {
        let mut buffer = [0; LONGEST];
        while let Some(len) = b.receive(&mut buffer, true).unwrap() {
            send(&b, &buffer[..len]).unwrap();
        }
    });
    let mut buffer = [0; LONGEST];
    for n in 0..20_000_u32 {
        send(&a, &n.to_le_bytes()).unwrap();
        while is_blocked(&a.receive(&mut buffer, false).map(|len| assert_eq!(len, Some(4)))) {
            wait(&a, PollFlags::IN);
        }
        assert_eq!(buffer[..4], n.to_le_bytes());
    }
    drop(a);
    echo.join().unwrap();
}

#[test]
fn nobody_is_called_who_does_not_sleep() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    let bells = || rustix::net::recv(&b.socket, &mut [0; 1], RecvFlags::DONTWAIT).is_ok();
    for _ in 0..100 {
        send(&a, b"message").unwrap();
    }
    assert!(!bells());
    while receive(&b).is_ok() {}
    assert!(before_sleep(&b, PollFlags::IN).is_empty());
    for _ in 0..100 {
        send(&a, b"message").unwrap();
    }
    assert!(bells() && !bells(), "one for all");
    while receive(&b).is_ok() {}
    assert!(before_sleep(&b, PollFlags::IN).is_empty());
    assert!(after_sleep(&b, PollFlags::IN, false).is_empty(), "woken by something else");
    send(&a, b"message").unwrap();
    assert!(!bells());
}

#[test]
fn full_link_blocks_and_is_writable_when_there_is_room() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    let mut sent = 0;
    while send(&a, &[1; LONGEST]).is_ok() {
        sent += 1;
    }
    assert!(is_blocked(&send(&a, &[1; LONGEST])) && sent >= 4);
    assert!(before_sleep(&a, PollFlags::OUT).is_empty());
    let reading = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        (0..sent).for_each(|_| assert_eq!(receive(&b).unwrap().unwrap().len(), LONGEST));
        b
    });
    assert_eq!(wait(&a, PollFlags::OUT), PollFlags::OUT);
    send(&a, &[1; LONGEST]).unwrap();
    reading.join().unwrap();
}

#[test]
fn what_was_sent_before_the_end_is_received_and_then_the_end() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    send(&a, b"last").unwrap();
    drop(a);
    assert_eq!(wait(&b, PollFlags::IN), PollFlags::IN | PollFlags::HUP);
    assert_eq!(receive(&b).unwrap(), Some(b"last".to_vec()));
    assert_eq!(receive(&b).unwrap(), None);
    assert_eq!(send(&b, b"too late").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert!(b.fault().is_none());
}

#[test]
fn other_end_that_dies_in_the_midst_of_a_packet_leaves_none() {
    let Hostile { link, other, rings } = Hostile::new();
    rings[0].scatter(Place::capacity_for(LONGEST), &[100, 0, 0, 0, 1, 2, 3]);
    drop(other);
    assert_eq!(wait(&link, PollFlags::IN), PollFlags::HUP);
    assert_eq!(receive(&link).unwrap(), None);
    assert!(link.fault().is_none());
}

#[test]
fn end_is_noticed_by_one_who_waits_for_room_only() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    while send(&a, &[1; LONGEST]).is_ok() {}
    let waiting = thread::spawn(move || wait(&a, PollFlags::OUT));
    thread::sleep(Duration::from_millis(50));
    drop(b);
    assert_eq!(waiting.join().unwrap(), PollFlags::HUP);
}

#[test]
fn own_shutdown_wakes_both_ends() {
    let (a, b) = Link::pair_with_rings(LONGEST).unwrap();
    let again = a.try_clone().unwrap();
    let waiting = [a, b].map(|link| thread::spawn(move || link.receive(&mut [0; 8], true).unwrap()));
    thread::sleep(Duration::from_millis(50));
    again.shutdown();
    waiting.into_iter().for_each(|waiting| assert_eq!(waiting.join().unwrap(), None));
}

#[test]
fn own_shutdown_is_known_without_waiting() {
    let (a, _b) = Link::pair_with_rings(LONGEST).unwrap();
    a.shutdown();
    assert_eq!(receive(&a).unwrap(), None);
    assert_eq!(send(&a, b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn broken_rule_ends_the_link_for_both_with_what_it_was() {
    // A tail, a length and a head.
    for (ring, word, value, message) in [
        (0, 0, 4, "says that 0x4 bytes are in a ring"),
        (0, 0, 8, "a packet that says it has 0 bytes"),
        (1, 1, 8, "says that 0xfffffff8 bytes are left in a ring"),
    ] {
        let Hostile { link, other, rings } = Hostile::new();
        rings[ring].scribble(word, value);
        let wanted = [PollFlags::IN, PollFlags::OUT][ring];
        let _ = wait(&link, wanted);
        let error = receive(&link).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains(message), "{error}");
        // Mended, it is still of no use.
        rings[ring].scribble(word, 0);
        assert_eq!(receive(&link).unwrap_err().to_string(), error.to_string());
        assert_eq!(send(&link, b"x").unwrap_err().to_string(), error.to_string());
        assert_eq!(link.fault().unwrap().to_string(), error.to_string());
        assert!(wait(&link, PollFlags::empty()).contains(PollFlags::HUP));
        assert_eq!(other.receive(&mut [0; 8], true).unwrap(), None, "the other end sees the end");
    }
}

#[test]
fn bells_without_end_or_reason_are_heard_some_at_a_time() {
    let Hostile { link, other, .. } = Hostile::new();
    let mut rung = 0;
    while send(&other, &[7; 500]).is_ok() {
        rung += 1;
    }
    assert!(rung > 16);
    assert_eq!(after_sleep(&link, PollFlags::IN, true), PollFlags::empty());
    let left =
        (0..).take_while(|_| rustix::net::recv(&link.socket, &mut [0; 1], RecvFlags::DONTWAIT).is_ok());
    assert_eq!(left.count(), rung - 16);
    assert!(is_blocked(&receive(&link)) && link.fault().is_none());
}

#[test]
fn rings_that_could_go_away_or_are_none_are_not_taken() {
    let taken = |give: &dyn Fn(&Link)| {
        let (a, mut b) = Link::pair().unwrap();
        give(&a);
        drop(a);
        b.take_rings(LONGEST).map_err(|error| error.to_string())
    };
    assert_eq!(taken(&|link| drop(link.offer_rings(LONGEST).unwrap())), Ok(()));
    assert!(
        taken(&|link| drop(link.offer_rings(5 * LONGEST).unwrap()))
            .unwrap_err()
            .contains("bytes in place of")
    );
    assert!(taken(&|_| ()).is_err(), "nothing");
    assert!(taken(&|link| send(link, &[0x82]).unwrap()).is_err(), "no file");
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096 + 2 * Place::capacity_for(LONGEST) as u64).unwrap();
    assert!(taken(&|link| rings::offer(&link.socket, &file).unwrap()).unwrap_err().contains("not sealed"));
}
