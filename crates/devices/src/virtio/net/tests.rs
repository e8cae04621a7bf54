//! A network card as a driver, and as a hostile guest, sees it, and as the process behind it does.

mod hostile;

use std::sync::Arc;

use ringfence_engine::Stateful;

use super::*;
use crate::virtio::testing::{DATA, Driver, Linked};

const INBOX: u64 = DATA + 0x10_0000;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

fn lab(features: u64) -> Linked {
    lab_of(1, features, 2)
}

/// A card with so many pairs, and a driver that has so many queues running.
fn lab_of(pairs: u16, features: u64, queues: u16) -> Linked {
    let lab = Linked::running(Link::pair_with_rings(MAX_MESSAGE), features, queues, |link, reporter| {
        let config = NetConfig { mac: [2, 3, 4, 5, 6, 7], mtu: 1400, pairs, link, reporter };
        Arc::new(Net::new(config).unwrap())
    });
    assert_eq!(lab.received()[0], ringfence_net::wire::CONTROL, "the driver's offloads");
    lab
}

impl Linked {
    /// Sends a message as a frame, and demands its buffer back.
    fn transmit(&self, message: &[u8]) {
        self.driver.put(DATA, message);
        self.driver.submit(TRANSMIT, &[(DATA, message.len() as u32, false)]);
        assert_eq!(self.driver.wait_for(TRANSMIT), 0);
    }
}

/// A frame of so many bytes with a header of zeroes, but for the count of buffers.
fn frame(len: usize, buffers: u16) -> Vec<u8> {
    let mut message = vec![0; VNET];
    message[BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    message.extend((0..len).map(|i| (i % 251) as u8));
    message
}

#[test]
fn configuration_has_address_state_and_mtu() {
    let lab = lab(feature::ALL);
    assert_eq!(lab.driver.config(0), [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x78, 5]);
    lab.driver.set_config(0, &[9; 12]);
    assert_eq!(lab.driver.config(0), [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x78, 5], "a guest cannot change it");
}

#[test]
fn headers_of_all_kinds_go_out_with_the_one_flag_that_counts_and_harm_nobody() {
    let lab = lab(feature::ALL);
    for flags in [0, 1, 2, 4, 0xfe, 0xff] {
        // Kind of segments, length of headers, length of segments, where the checksum starts and goes, buffers.
        for rest in [
            [0; 11],
            [0xff; 11],
            [1, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            [0x80 | 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 9, 9],
        ] {
            let mut message = frame(100, 0);
            message[0] = flags;
            message[1..VNET].copy_from_slice(&rest);
            lab.transmit(&message);
            message[0] &= NEEDS_CSUM;
            assert_eq!(lab.received(), message);
        }
    }
    assert!(!lab.driver.is_broken());
}

#[test]
fn frames_too_short_and_too_long_go_nowhere_and_their_buffers_come_back() {
    let lab = lab(feature::ALL);
    for len in [1, VNET as u32, SHORTEST as u32 - 1, MAX_MESSAGE as u32 + 1, 4 << 20] {
        lab.driver.submit(TRANSMIT, &[(DATA, len, false)]);
        assert_eq!(lab.driver.wait_for(TRANSMIT), 0, "{len}");
    }
    lab.transmit(&frame(SHORTEST as usize - VNET, 0));
    assert_eq!(lab.received(), frame(SHORTEST as usize - VNET, 0), "only the one that can be");
    lab.transmit(&frame(MAX_MESSAGE - VNET, 0));
    assert_eq!(lab.received().len(), MAX_MESSAGE);
}

#[test]
fn frames_come_in_over_as_many_buffers_as_it_takes() {
    let lab = lab(feature::ALL);
    lab.send(&frame(3000, 7));
    // The frame is there first, and waits for all of its room.
    for at in 0..4 {
        assert_eq!(lab.driver.take(RECEIVE), None);
        lab.driver.submit(RECEIVE, &[(INBOX + at * 0x1000, 900, true)]);
    }
    let lens: Vec<u32> = (0..4).map(|_| lab.driver.wait_for(RECEIVE)).collect();
    assert_eq!(lens, [900, 900, 900, 312]);
    let got: Vec<u8> = lens
        .iter()
        .zip(0..)
        .flat_map(|(len, at)| lab.driver.get(INBOX + at * 0x1000, *len as usize))
        .collect();
    assert!(got == frame(3000, 4), "with the count of buffers");
}

#[test]
fn frame_that_does_not_fit_the_one_buffer_is_lost_and_the_next_is_not() {
    let lab = lab(feature::ALL & !feature::MERGEABLE);
    lab.driver.submit(RECEIVE, &[(INBOX, 200, true)]);
    lab.send(&frame(300, 1));
    lab.send(&frame(100, 1));
    assert_eq!(lab.driver.wait_for(RECEIVE), 112);
    assert_eq!(lab.driver.get(INBOX, 112), frame(100, 1));
}

#[test]
fn frame_longer_than_all_buffers_together_is_lost_and_the_next_is_not() {
    let lab = lab(feature::ALL);
    let entries = 16;
    for _ in 0..entries {
        lab.driver.submit(RECEIVE, &[(INBOX, 1, true)]);
    }
    lab.send(&frame(300, 1));
    // All of the queue is too little, so there will never be enough; a driver that begins anew can go on.
    lab.driver.start(feature::ALL, 2);
    lab.driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
    lab.send(&frame(100, 1));
    let mut len = lab.driver.wait_for(RECEIVE);
    if len == 312 {
        // It may have been there before the reset was seen.
        lab.driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
        len = lab.driver.wait_for(RECEIVE);
    }
    assert_eq!(len, 112);
}

/// Frames of the longest kind that a link has room for.
const FITTING: u16 = 7;

#[test]
fn full_link_holds_frames_back_and_loses_none() {
    let lab = lab(feature::ALL);
    let sent = frame(MAX_MESSAGE - VNET, 0);
    lab.driver.put(DATA, &sent);
    for round in 0..5 {
        for _ in 0..FITTING + 3 {
            lab.driver.submit(TRANSMIT, &[(DATA, MAX_MESSAGE as u32, false)]);
        }
        (0..FITTING).for_each(|_| assert_eq!(lab.driver.wait_for(TRANSMIT), 0));
        assert_eq!(lab.driver.take(TRANSMIT), None, "{round}: three wait");
        for _ in 0..FITTING + 3 {
            assert!(lab.received() == sent, "{round}");
        }
        (0..3).for_each(|_| assert_eq!(lab.driver.wait_for(TRANSMIT), 0));
    }
}

#[test]
fn machine_outlives_the_process_and_the_guest_sees_its_link_go_down() {
    let Linked { driver, other, told } = lab(feature::ALL);
    drop(other);
    driver.wait("the message", || !lock(&told).is_empty());
    assert_eq!(driver.config::<2>(6), [0, 0], "the link is down");
    for _ in 0..20 {
        driver.submit(TRANSMIT, &[(DATA, 100, false)]);
        assert_eq!(driver.wait_for(TRANSMIT), 0);
    }
    driver.start(feature::ALL, 2);
    assert_eq!(lock(&told).len(), 1);
}

#[test]
fn saved_device_goes_on() {
    let lab = lab(feature::ALL);
    lab.transmit(&frame(60, 0));
    lab.received();
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    lab.driver.function.restore(&saved).unwrap();
    assert_eq!(lab.received()[0], ringfence_net::wire::CONTROL, "the process hears of the offloads again");
    lab.transmit(&frame(61, 0));
    assert_eq!(lab.received(), frame(61, 0));
    lab.driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
    lab.send(&frame(62, 1));
    assert_eq!(lab.driver.wait_for(RECEIVE), 74);
}

#[test]
fn frames_that_wait_for_the_link_are_saved_in_their_queue_and_those_in_the_link_are_whole() {
    let lab = lab(feature::ALL);
    let sent = frame(MAX_MESSAGE - VNET, 0);
    lab.driver.put(DATA, &sent);
    for _ in 0..FITTING + 3 {
        lab.driver.submit(TRANSMIT, &[(DATA, MAX_MESSAGE as u32, false)]);
    }
    (0..FITTING).for_each(|_| assert_eq!(lab.driver.wait_for(TRANSMIT), 0));
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    // What has left the guest's queue is the network's, as a whole.
    (0..FITTING).for_each(|_| assert!(lab.received() == sent));
    assert_eq!(lab.other.receive(&mut [0; 8], false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    lab.driver.function.restore(&saved).unwrap();
    // Those that were still in the guest's queue go as soon as there is one again, before or behind the offloads.
    let after: Vec<_> = (0..4).map(|_| lab.received()).collect();
    let (frames, others): (Vec<_>, Vec<_>) = after.into_iter().partition(|message| *message == sent);
    assert_eq!((frames.len(), others[0][0]), (3, ringfence_net::wire::CONTROL));
    (0..3).for_each(|_| assert_eq!(lab.driver.wait_for(TRANSMIT), 0));
}

#[test]
fn frames_that_come_while_the_device_is_saved_are_lost_or_come_whole_and_in_order() {
    let lab = lab(feature::ALL);
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    (1..=3).for_each(|n| lab.send(&frame(99 + n, 1)));
    lab.driver.function.restore(&saved).unwrap();
    lab.send(&frame(62, 1));
    let mut before = 0;
    loop {
        lab.driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
        let len = lab.driver.wait_for(RECEIVE) as usize;
        assert_eq!(lab.driver.get(INBOX, len), frame(len - VNET, 1));
        if len == VNET + 62 {
            break;
        }
        assert!(len > before && (100..=102).contains(&(len - VNET)), "{len}");
        before = len;
    }
}

const MULTIQUEUE: u64 = feature::ALL | feature::CONTROL | feature::MULTIQUEUE;

/// Sends a message to the card by queue `queue`, and gives the answer.
fn tell(driver: &Driver, queue: u16, message: &[u8]) -> u8 {
    driver.put(DATA, message);
    driver.put(INBOX, &[0xee]);
    driver.submit(queue, &[(DATA, message.len() as u32, false), (INBOX, 1, true)]);
    assert_eq!(driver.wait_for(queue), 1);
    driver.get(INBOX, 1)[0]
}

/// A UDP datagram between the guest's port `port` and another host, out of the guest or into it.
fn datagram(port: u8, out: bool) -> Vec<u8> {
    let mut message = frame(12, 1);
    message.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
    let mut ends = [[10, 0, 2, 15, 4, port], [192, 0, 2, 1, 0, 80]];
    ends.sort_by_key(|end| (end[0] != 10) == out);
    ends.iter().for_each(|end| message.extend(&end[..4]));
    ends.iter().for_each(|end| message.extend(&end[4..]));
    message.extend([0, 8, 0, 0]);
    message
}

#[test]
fn control_queue_sets_pairs_and_refuses_all_else() {
    let Linked { driver, .. } = lab_of(3, MULTIQUEUE, 7);
    assert_eq!(driver.config(8), 3_u16.to_le_bytes());
    let control = 6;
    for (message, answer) in [
        (&[4, 0, 3, 0][..], 0),
        (&[4, 0, 1, 0], 0),
        (&[4, 0, 0, 0], 1),
        (&[4, 0, 4, 0], 1),
        (&[4, 0, 3, 0x80], 1),
        // Cut, too long, and other commands: of this class, of receive modes, addresses, VLANs, offloads.
        (&[4, 0, 3], 1),
        (&[4, 0], 1),
        (&[4, 0, 3, 0, 0], 1),
        (&[4, 1, 3, 0], 1),
        (&[0, 0, 1], 1),
        (&[0, 1, 0], 1),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        (&[1, 1, 2, 3, 4, 5, 6, 7], 1),
        (&[2, 0, 5, 0], 1),
        (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        (&[0xff, 0xff, 0xff, 0xff], 1),
    ] {
        assert_eq!(tell(&driver, control, message), answer, "{message:?}");
    }
    for chain in [&[(DATA, 4, false)][..], &[(INBOX, 1, true)], &[(DATA, 1, false), (INBOX, 1, true)]] {
        driver.submit(control, chain);
        driver.wait("the end", || driver.is_broken());
        assert_eq!(driver.take(control), None);
        driver.start(MULTIQUEUE, 7);
        assert_eq!(tell(&driver, control, &[4, 0, 2, 0]), 0, "it works after a reset");
    }
}

#[test]
fn flows_come_in_by_the_pair_by_which_they_went_out() {
    let lab = lab_of(4, MULTIQUEUE, 9);
    let driver = &lab.driver;
    assert_eq!(tell(driver, 8, &[4, 0, 4, 0]), 0);
    for port in 0..40 {
        let pair = u16::from(port) * 7 % 4;
        driver.put(DATA, &datagram(port, true));
        driver.submit(transmit_queue(pair), &[(DATA, 54, false)]);
        assert_eq!((driver.wait_for(transmit_queue(pair)), lab.received()), (0, datagram(port, true)));
        driver.submit(receive_queue(pair), &[(INBOX, 2000, true)]);
        lab.send(&datagram(port, false));
        assert_eq!(driver.wait_for(receive_queue(pair)), 54, "{port}");
        assert_eq!(driver.get(INBOX, 54), datagram(port, false));
    }
    // One pair: all come in by the first, also one that waits already.
    lab.send(&datagram(1, false));
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(tell(driver, 8, &[4, 0, 1, 0]), 0);
    driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
    assert_eq!(driver.wait_for(RECEIVE), 54);
}

#[test]
fn one_pair_is_used_until_the_driver_says_otherwise_and_again_after_a_reset() {
    let lab = lab_of(2, MULTIQUEUE, 5);
    for life in 0..2 {
        for port in 0..10 {
            lab.driver.submit(RECEIVE, &[(INBOX, 2000, true)]);
            lab.send(&datagram(port, false));
            assert_eq!(lab.driver.wait_for(RECEIVE), 54, "{life}");
        }
        assert_eq!(tell(&lab.driver, 4, &[4, 0, 2, 0]), 0);
        lab.driver.start(MULTIQUEUE, 5);
    }
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let Linked { driver, .. } = lab_of(4, feature::ALL | feature::CONTROL, 3);
    assert_eq!(tell(&driver, 2, &[0, 0, 1]), 1);
}

#[test]
fn pairs_in_use_are_saved_and_impossible_ones_refused() {
    let lab = lab_of(4, MULTIQUEUE, 9);
    assert_eq!(tell(&lab.driver, 8, &[4, 0, 3, 0]), 0);
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    assert_eq!(saved.fields["device"]["pairs"], 3);
    for wrong in [serde_json::json!({"pairs": 5}), serde_json::json!({"pairs": 0}), serde_json::json!(null)] {
        let mut other = saved.clone();
        other.fields["device"] = wrong;
        assert!(lab.driver.function.restore(&other).is_err());
    }
    lab.driver.start(MULTIQUEUE, 9);
    lab.driver.function.restore(&saved).unwrap();
    assert_eq!(lab.driver.function.save(), saved);
}

#[test]
fn full_link_holds_frames_of_all_pairs_back_and_loses_none() {
    let lab = lab_of(3, MULTIQUEUE, 7);
    lab.driver.put(DATA, &frame(MAX_MESSAGE - VNET, 0));
    for _ in 0..4 {
        (0..3).for_each(|pair| lab.driver.submit(transmit_queue(pair), &[(DATA, MAX_MESSAGE as u32, false)]));
    }
    for _ in 0..12 {
        assert_eq!(lab.received().len(), MAX_MESSAGE);
    }
    (0..12).for_each(|n| assert_eq!(lab.driver.wait_for(transmit_queue(n % 3)), 0));
}
