//! A network card as a driver, and as a hostile guest, sees it, and as the process behind it does.

use std::io::IoSlice;
use std::sync::Arc;

use ringfence_engine::Stateful;

use super::*;
use crate::virtio::testing::{DATA, Driver};

const INBOX: u64 = DATA + 0x10_0000;

struct Lab {
    driver: Driver,
    other: Link,
    told: Arc<Mutex<Vec<String>>>,
}

fn lab(features: u64) -> Lab {
    let (link, other) = Link::pair().unwrap();
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let teller = Arc::clone(&told);
    let reporter = Arc::new(move |text| lock(&teller).push(text));
    let device = Net::new(NetConfig { mac: [2, 3, 4, 5, 6, 7], mtu: 1400, link, reporter }).unwrap();
    let lab = Lab { driver: Driver::running(Arc::new(device), features, 2), other, told };
    assert_eq!(lab.received()[0], ringfence_net::wire::CONTROL, "the driver's offloads");
    lab
}

impl Lab {
    /// The next message that the process gets.
    fn received(&self) -> Vec<u8> {
        let mut buffer = vec![0; 2 * MAX_MESSAGE];
        let len = self.other.receive(&mut buffer, true).unwrap().unwrap();
        buffer.truncate(len);
        buffer
    }

    fn send(&self, message: &[u8]) {
        self.other.send(&[IoSlice::new(message)]).unwrap();
    }

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

#[test]
fn full_link_holds_frames_back_and_loses_none() {
    let lab = lab(feature::ALL);
    let sent = frame(MAX_MESSAGE - VNET, 0);
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
fn machine_outlives_the_process_and_the_guest_sees_its_link_go_down() {
    let Lab { driver, other, told } = lab(feature::ALL);
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
