use std::sync::Arc;

use ringfence_engine::Stateful;

use super::*;
use crate::virtio::testing::{DATA, Linked};

const INBOX: u64 = DATA + 0x10_0000;

fn lab() -> Linked {
    let lab = Linked::running(Link::pair(), 0, 3, |link, reporter| {
        Arc::new(Vsock::new(VsockConfig { cid: 9, link, reporter }).unwrap())
    });
    assert_eq!(lab.received(), [ACTIVE]);
    lab
}

fn packet(data: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..HEADER as u8).collect();
    bytes[LEN..LEN + 4].copy_from_slice(&(data.len() as u32).to_le_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn configuration_has_the_cid() {
    assert_eq!(lab().driver.config(0), 9_u64.to_le_bytes());
}

#[test]
fn packets_go_out_as_they_are_and_odd_ones_nowhere() {
    let lab = lab();
    let sent = packet(&[7; 5000]);
    lab.driver.put(DATA, &sent);
    lab.driver.submit(TRANSMIT, &[(DATA, 44, false), (DATA + 44, 5000, false)]);
    assert_eq!(lab.received(), sent);
    assert_eq!(lab.driver.wait_for(TRANSMIT), 0);
    // Shorter than a header; longer than any, of which the header alone goes on.
    for len in [1, 43, 4 << 20] {
        lab.driver.submit(TRANSMIT, &[(DATA, len, false)]);
        assert_eq!(lab.driver.wait_for(TRANSMIT), 0);
    }
    assert_eq!(lab.received(), sent[..HEADER]);
    lab.driver.submit(TRANSMIT, &[(DATA, 44, false)]);
    assert_eq!(lab.received(), sent[..HEADER]);
}

#[test]
fn packets_come_in_cut_to_the_drivers_buffers() {
    let lab = lab();
    let data: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
    lab.send(&packet(&data));
    let mut got: Vec<u8> = Vec::new();
    while got.len() < data.len() {
        // The first of them comes after the packet, which waits.
        lab.driver.submit(RECEIVE, &[(INBOX, 44, true), (INBOX + 44, 4096, true)]);
        let written = lab.driver.wait_for(RECEIVE) as usize;
        let bytes = lab.driver.get(INBOX, written);
        assert_eq!(bytes[LEN..LEN + 4], (written as u32 - 44).to_le_bytes());
        assert_eq!((&bytes[..LEN], &bytes[LEN + 4..HEADER]), (&packet(&[])[..LEN], &packet(&[])[LEN + 4..]));
        got.extend(&bytes[HEADER..]);
    }
    assert!(got == data);
    lab.send(&packet(&[]));
    lab.driver.submit(RECEIVE, &[(INBOX, 44, true)]);
    assert_eq!(lab.driver.wait_for(RECEIVE), 44);
}

#[test]
fn buffers_without_room_for_a_packet_break_the_device() {
    for (len, data) in [(43, 0), (44, 1), (0, 5)] {
        let lab = lab();
        lab.send(&packet(&vec![1; data]));
        lab.driver.submit(RECEIVE, &[(INBOX, len, true)]);
        lab.driver.wait("the message", || !lock(&lab.driver.told).is_empty());
        // What waited belongs to nobody any more after a reset.
        lab.driver.start(0, 3);
        assert_eq!((lab.received(), lab.received()), (vec![INACTIVE], vec![ACTIVE]));
        lab.driver.submit(RECEIVE, &[(INBOX, 100, true)]);
        lab.send(&packet(&[9]));
        assert_eq!(lab.driver.wait_for(RECEIVE), 45);
    }
}

#[test]
fn full_link_holds_packets_back_and_loses_none() {
    let lab = lab();
    let sent = packet(&vec![3; MAX_MESSAGE - HEADER]);
    lab.driver.put(DATA, &sent);
    for round in 0..5 {
        for _ in 0..4 {
            lab.driver.submit(TRANSMIT, &[(DATA, MAX_MESSAGE as u32, false)]);
        }
        for _ in 0..4 {
            assert!(lab.received() == sent, "{round}");
            lab.driver.wait_for(TRANSMIT);
        }
    }
}

#[test]
fn restored_driver_is_told_that_its_connections_are_gone() {
    let lab = lab();
    lab.driver.submit(EVENT, &[(INBOX, 4, true)]);
    lab.driver.put(INBOX, &[0xff; 4]);
    assert_eq!(lab.driver.take(EVENT), None);
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    lab.driver.function.restore(&saved).unwrap();
    assert_eq!(lab.driver.wait_for(EVENT), 4);
    assert_eq!(lab.driver.get(INBOX, 4), [0; 4]);
    assert_eq!(lab.received(), [ACTIVE], "and so is the process");
    // Once.
    lab.driver.submit(EVENT, &[(INBOX, 4, true)]);
    assert_eq!(lab.driver.take(EVENT), None);
}

#[test]
fn machine_outlives_the_process() {
    let Linked { driver, other, told } = lab();
    driver.submit(EVENT, &[(INBOX, 4, true)]);
    driver.put(INBOX, &[0xff; 4]);
    drop(other);
    driver.wait("the message", || !lock(&told).is_empty());
    // All connections are gone, and the driver can tell whoever waits for an answer.
    assert_eq!((driver.wait_for(EVENT), driver.get(INBOX, 4)), (4, vec![0; 4]));
    for _ in 0..20 {
        driver.submit(TRANSMIT, &[(DATA, 100, false)]);
        assert_eq!(driver.wait_for(TRANSMIT), 0);
    }
    driver.start(0, 3);
    assert_eq!(lock(&told).len(), 1);
}

#[test]
fn saved_device_takes_nothing_until_its_driver_is_heard_of() {
    let lab = lab();
    lab.driver.submit(RECEIVE, &[(INBOX, 100, true)]);
    lab.driver.function.quiesce();
    lab.send(&packet(&[5]));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(lab.driver.take(RECEIVE), None);
    lab.driver.submit(RECEIVE, &[(INBOX, 100, true)]);
    assert_eq!(lab.driver.wait_for(RECEIVE), 45);
}
