use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringfence_engine::{SavedState, Stateful};

use super::super::control::{NO_SUCH_PORT, event};
use super::super::*;
use super::life::{Lab, Sink, console, message, speak};
use crate::virtio::spec::status;
use crate::virtio::testing::DATA;

fn is_broken(lab: &Lab, why: &str) {
    assert_eq!(lab.driver.status() & status::NEEDS_RESET, status::NEEDS_RESET, "{why}");
    let told = lock(&lab.driver.told);
    assert!(told.len() == 1 && told[0].contains(why), "{told:?}");
    drop(told);
    // And works after a reset.
    lab.driver.start(feature::MULTIPORT, 8);
    lab.set_up();
}

#[test]
fn control_message_that_is_none_breaks_the_device() {
    let lab = Lab::new(&Arc::default());
    lab.driver.submit(3, &[(DATA, 7, false)]);
    is_broken(&lab, "shorter");
    let lab = Lab::new(&Arc::default());
    lab.driver.submit(3, &[(DATA, 8, true)]);
    is_broken(&lab, "shorter");
}

#[test]
fn control_message_about_no_port_breaks_the_device() {
    for (port, event) in
        [(0, event::PORT_READY), (3, event::PORT_OPEN), (u32::MAX, event::PORT_OPEN), (99, 77)]
    {
        let lab = Lab::new(&Arc::default());
        lab.say(port, event, 1);
        is_broken(&lab, NO_SUCH_PORT);
    }
}

#[test]
fn control_buffer_without_room_breaks_the_device() {
    let lab = Lab::new(&Arc::default());
    lab.say(u32::MAX, event::DEVICE_READY, 1);
    lab.driver.submit(2, &[(DATA, 7, true)]);
    is_broken(&lab, "no room");
}

#[test]
fn unknown_events_and_values_change_nothing() {
    let lab = Lab::open(&Arc::default());
    for event in 0..=u16::MAX {
        if event != event::PORT_READY && event != event::PORT_OPEN && event % 97 == 3 {
            lab.say(1, event, 0);
        }
    }
    lab.say(1, event::DEVICE_ADD, 9);
    lab.say(1, event::PORT_OPEN, 7);
    assert!(lock(&lab.driver.told).is_empty());
    assert_eq!(lab.driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn messages_asked_for_again_and_again_are_not_kept() {
    let lab = Lab::new(&Arc::default());
    for _ in 0..10_000 {
        lab.say(u32::MAX, event::DEVICE_READY, 1);
        lab.say(1, event::PORT_READY, 1);
    }
    // A driver that has a port need not be told that it is there.
    assert_eq!(lab.heard()[..8], message(1, event::PORT_NAME, 1));
    assert_eq!(lab.heard(), message(2, event::DEVICE_ADD, 1));
    lab.driver.submit(2, &[(DATA, 64, true)]);
    assert_eq!(lab.driver.take(2), None, "no more");
}

#[test]
fn ports_before_they_are_announced_carry_nothing() {
    let sink = Sink::with_room(100);
    let lab = Lab::new(&sink);
    lab.driver.submit(7, &[(DATA, 100, false)]);
    assert_eq!((lab.driver.take(7), sink.take()), (Some(0), Vec::new()));
    let mut stream = lab.connect();
    stream.write_all(b"x").unwrap();
    lab.driver.submit(4, &[(DATA, 100, true)]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(lab.driver.take(4), None);
}

#[test]
fn driver_without_ports_finds_an_end_where_nobody_is() {
    let lab = Lab::new(&Arc::default());
    lab.driver.start(0, 8);
    for queue in [1, 3, 5] {
        lab.driver.submit(queue, &[(DATA, 8, false)]);
    }
    assert_eq!((lab.driver.take(1), lab.driver.take(3)), (Some(0), None));
    assert_eq!(lab.driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn too_much_output_at_once_and_buffers_without_room_break_the_device() {
    let sink = Sink::with_room(10 << 20);
    let (_first, driver) = console(&sink);
    driver.submit(1, &[(DATA, (1 << 20) + 1, false)]);
    assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET);
    assert!(sink.take().is_empty());
    let (console, driver) = console(&sink);
    speak(&driver);
    driver.submit(0, &[(DATA, 8, false)]);
    assert_eq!(console.input().input(b"abc"), 0);
    assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET);
    driver.start(0, 2);
    speak(&driver);
    driver.submit(0, &[(DATA, 8, true)]);
    assert_eq!(console.input().input(b"abc"), 3);
}

#[test]
fn resets_under_load_lose_no_program() {
    let lab = Lab::open(&Arc::default());
    let stream = lab.connect();
    let writer = stream.try_clone().unwrap();
    let pump = std::thread::spawn(move || {
        let mut writer: UnixStream = writer;
        writer.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        for _ in 0..200 {
            let _ = writer.write(&[7; 1000]);
        }
    });
    for round in 0..50_u32 {
        lab.driver.submit(4, &[(DATA + 0x1000, 4096, true)]);
        lab.driver.submit(5, &[(DATA, 4096, false)]);
        if round % 7 == 0 {
            lab.driver.function.quiesce();
            let saved = lab.driver.function.save();
            lab.driver.function.restore(&saved).unwrap();
        }
        lab.driver.start(feature::MULTIPORT, 8);
    }
    pump.join().unwrap();
    lab.begin_anew();
    assert!(lock(&lab.driver.told).is_empty(), "{:?}", lock(&lab.driver.told));
}

#[test]
fn state_of_other_ports_or_none_is_refused() {
    let lab = Lab::open(&Arc::default());
    lab.driver.function.quiesce();
    let saved = lab.driver.function.save();
    for (from, to) in [
        ("\"port a\"", "\"port c\""),
        ("\"sent\":[0,0,0]", "\"sent\":[0,0]"),
        ("\"names\"", "\"nameless\""),
        // A port that was never announced cannot be open.
        ("\"open\":false", "\"open\":true"),
    ] {
        let text = serde_json::to_string(&saved).unwrap();
        assert!(text.contains(from), "{text}");
        let changed: SavedState = serde_json::from_str(&text.replacen(from, to, 1)).unwrap();
        assert!(lab.driver.function.restore(&changed).is_err(), "{to}");
    }
    lab.driver.function.restore(&saved).unwrap();
}
