//! What a well-behaved driver sees.

use std::sync::atomic::Ordering;

use ringfence_engine::Stateful;
use ringfence_memory::GuestAddress;

use super::driver::{Driver, Echo, SIZE};
use crate::Device;
use crate::device::lock;
use crate::pci::PciFunction;
use crate::virtio::spec::{NO_VECTOR, common, descriptor, feature, isr, status};

/// The lines that the first device's pin leads to.
const GSI: u32 = 17;

#[test]
fn capabilities_lead_to_every_structure() {
    let driver = Driver::new();
    let read = |offset: u16| {
        let mut bytes = [0; 4];
        driver.function.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(read(0), 0x106a_1af4);
    assert_eq!(read(8), 0xff00_0001);
    let mut at = (read(0x34) & 0xff) as u16;
    let mut found = Vec::new();
    while at != 0 {
        let head = read(at);
        if head & 0xff == 9 {
            found.push(((head >> 24) as u8, read(at + 4) & 0xff, read(at + 8), head >> 16 & 0xff));
        }
        at = (head >> 8 & 0xff) as u16;
    }
    let structures =
        [(1, 0, 0, 16), (2, 0, 0x3000, 20), (3, 0, 0x1000, 16), (4, 0, 0x2000, 16), (5, 0, 0, 20)];
    assert_eq!(found, structures);
}

#[test]
fn window_of_configuration_space_reaches_registers() {
    let driver = Driver::new();
    let mut at = 0x40;
    let window = loop {
        let mut head = [0; 4];
        driver.function.config_read(at, &mut head);
        if head[0] == 9 && head[3] == 5 {
            break at;
        }
        at = head[1].into();
        assert_ne!(at, 0);
    };
    let select = |offset: u32, len: u32| {
        driver.function.config_write(window + 4, &[0]);
        driver.function.config_write(window + 8, &offset.to_le_bytes());
        driver.function.config_write(window + 12, &len.to_le_bytes());
    };
    select(0x2000, 4);
    let mut text = [0; 4];
    driver.function.config_read(window + 16, &mut text);
    assert_eq!(&text, b"echo");
    select(common::STATUS as u32, 1);
    driver.function.config_write(window + 16, &[status::ACKNOWLEDGE]);
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
    // Nothing is there: no such length, no such place.
    for (offset, len) in [(0, 3), (0x4000, 4), (1, 2), (u32::MAX, 1)] {
        select(offset, len);
        driver.function.config_read(window + 16, &mut [0; 4]);
        driver.function.config_write(window + 16, &[0; 4]);
    }
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
}

#[test]
fn chains_come_back_with_what_was_written() {
    let driver = Driver::ready();
    assert_eq!(*lock(&driver.echo.activated), [feature::CORE]);
    // More than once around the ring.
    for i in 0..3 * SIZE {
        let text = format!("number {i}");
        assert_eq!(driver.send(i & 1, i % (SIZE - 1), &text), text);
    }
    // By a table, in pieces, with one of no bytes.
    driver.memory.write_bytes(GuestAddress(0x8000), b"abcdef").unwrap();
    driver.describe(0xa000, 0, (0x8000, 2, descriptor::NEXT, 2));
    driver.describe(0xa000, 2, (0x8002, 4, descriptor::NEXT, 1));
    driver.describe(0xa000, 1, (0x8000, 0, descriptor::NEXT, 3));
    driver.describe(0xa000, 3, (0x9000, 1, descriptor::NEXT | descriptor::WRITE, 4));
    driver.describe(0xa000, 4, (0x9800, 9, descriptor::WRITE, 0));
    driver.describe(Driver::table(0), 7, (0xa000, 5 * 16, descriptor::INDIRECT, 0));
    let before = driver.used_index(0);
    driver.offer(0, 7);
    driver.kick(0);
    assert_eq!(driver.used_entry(0, before), (7, 6));
    let mut bytes = [0; 5];
    driver.memory.read_bytes(GuestAddress(0x9800), &mut bytes).unwrap();
    assert_eq!(&bytes, b"bcdef");
    assert!(lock(&driver.told).is_empty());
}

#[test]
fn features_are_agreed_on_once() {
    let driver = Driver::new();
    driver.write(common::DEVICE_FEATURE_SELECT, 4, 0);
    assert_eq!(driver.read(common::DEVICE_FEATURE, 4), 1 | feature::INDIRECT | feature::EVENT_INDEX);
    driver.write(common::DEVICE_FEATURE_SELECT, 4, 1);
    assert_eq!(driver.read(common::DEVICE_FEATURE, 4), (feature::VERSION_1 | feature::QUEUE_RESET) >> 32);
    driver.write(common::DEVICE_FEATURE_SELECT, 4, 2);
    assert_eq!(driver.read(common::DEVICE_FEATURE, 4), 0);
    let try_features = |features| {
        driver.set_status(0);
        driver.set_features(features);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        driver.status() & status::FEATURES_OK != 0
    };
    assert!(!try_features(1), "the legacy interface");
    assert!(!try_features(feature::VERSION_1 | 2), "a feature that is not offered");
    assert!(try_features(feature::VERSION_1 | 1));
    driver.set_features(feature::VERSION_1 | feature::INDIRECT);
    assert_eq!(driver.read(common::DRIVER_FEATURE, 4), 1, "the upper half");
    driver.set_status(driver.status() | status::DRIVER_OK);
    assert_eq!(*lock(&driver.echo.activated), [feature::VERSION_1 | 1]);
    driver.start(feature::VERSION_1);
    assert_eq!(driver.send(1, 0, "plain"), "plain");
}

#[test]
fn interrupts_are_levels_or_messages() {
    let driver = Driver::ready();
    driver.send(0, 0, "a");
    assert!(driver.bench.level(GSI));
    assert_eq!(driver.read(0x1000, 1), u64::from(isr::QUEUE));
    assert!(!driver.bench.level(GSI));
    assert_eq!(driver.read(0x1000, 1), 0);
    driver.use_messages();
    // The driver wants to be told of the next ones.
    for queue in 0..2 {
        driver.store(Driver::ring(queue) + 4 + u64::from(SIZE) * 2, driver.used_index(queue));
    }
    driver.send(0, 0, "b");
    driver.send(1, 0, "c");
    assert_eq!(driver.bench.messages(), [(0xfee0_0000, 1), (0xfee0_0000, 2)]);
    assert!(!driver.bench.level(GSI));
    // It asked for nothing more.
    driver.send(0, 0, "d");
    assert_eq!(driver.bench.messages(), []);
    driver.echo.port().config_changed();
    assert_eq!(driver.bench.messages(), [(0xfee0_0000, 0)]);
    assert_eq!(driver.read(common::GENERATION, 1), 1);
    // No such vector.
    driver.write(common::CONFIG_VECTOR, 2, 3);
    assert_eq!(driver.read(common::CONFIG_VECTOR, 2), u64::from(NO_VECTOR));
}

#[test]
fn without_event_index_a_flag_asks_for_no_interrupts() {
    let driver = Driver::new();
    driver.start(feature::VERSION_1);
    driver.store(Driver::ring(0), 1_u16);
    driver.send(0, 0, "a");
    assert_eq!(driver.read(0x1000, 1), 0);
    driver.store(Driver::ring(0), 0_u16);
    driver.send(0, 0, "b");
    assert_eq!(driver.read(0x1000, 1), u64::from(isr::QUEUE));
}

#[test]
fn device_says_from_where_it_wants_to_be_notified() {
    let driver = Driver::ready();
    let event = Driver::used(0) + 4 + u64::from(SIZE) * 8;
    driver.send(0, 0, "a");
    driver.send(0, 0, "b");
    assert_eq!(driver.load::<u16>(event), 2);
}

#[test]
fn several_chains_go_back_at_once_or_stay() {
    let driver = Driver::ready();
    for head in 0..4 {
        driver.describe(Driver::table(0), head, (0x9000 + u64::from(head), 1, descriptor::WRITE, 0));
        driver.offer(0, head);
    }
    let port = driver.echo.port();
    assert!(port.has_chains(0) && !port.has_chains(1) && !port.has_chains(7));
    let chains: Vec<_> = (0..3).map(|_| port.take(0).unwrap()).collect();
    let mut chains = chains.into_iter();
    let (first, second, third) = (chains.next().unwrap(), chains.next().unwrap(), chains.next().unwrap());
    assert!(third.put_back());
    port.complete_all(vec![(first, 1), (second, 99)]);
    assert_eq!(driver.used_index(0), 2);
    assert_eq!((driver.used_entry(0, 0), driver.used_entry(0, 1)), ((0, 1), (1, 1)));
    let third = port.take(0).unwrap();
    let fourth = port.take(0).unwrap();
    assert!(!third.put_back(), "not the last one");
    fourth.complete(0);
    assert_eq!(driver.used_entry(0, 2), (3, 0));
}

#[test]
fn saved_state_goes_on_in_another_device() {
    let driver = Driver::ready();
    driver.use_messages();
    driver.send(1, 0, "before");
    driver.echo.holds.store(true, Ordering::Relaxed);
    for head in 0..3 {
        driver.describe(Driver::table(0), head, (0x8000, 4, 0, 0));
        driver.offer(0, head);
    }
    driver.kick(0);
    assert_eq!(lock(&driver.echo.held).len(), 3);
    driver.function.quiesce();
    let saved = driver.function.save();
    driver.echo.holds.store(false, Ordering::Relaxed);

    driver.function.reset();
    assert_eq!(driver.status(), 0);
    assert_ne!(driver.function.save(), saved);
    driver.function.restore(&saved).unwrap();
    assert_eq!(driver.function.save(), saved);
    assert_eq!(lock(&driver.echo.activated).len(), 2);
    driver.kick(0);
    assert_eq!(driver.used_index(0), 3, "what was held is there again");
    assert_eq!(driver.send(1, 2, "after"), "after");

    for (path, value) in [
        ("/registers/status", serde_json::json!(255)),
        ("/registers/driver_features", serde_json::json!(2)),
        ("/registers/config_vector", serde_json::json!(9)),
        ("/registers/queues/0/size", serde_json::json!(7)),
        ("/registers/queues/0/max", serde_json::json!(4096)),
        ("/registers/queues/1/device", serde_json::json!(crate::virtio::guest::RAM)),
        ("/registers/queues", serde_json::json!([])),
        ("/registers/postponed", serde_json::json!([[9, 0, 0]])),
        ("/endpoint/config", serde_json::json!([])),
    ] {
        let mut wrong = saved.clone();
        *wrong.fields.pointer_mut(path).unwrap() = value;
        assert!(driver.function.restore(&wrong).is_err(), "{path}");
        assert_eq!(driver.send(1, 2, path), path, "the device is as it was");
    }
}

#[test]
fn ends_wait_while_the_function_may_not_write_to_memory() {
    let driver = Driver::ready();
    driver.echo.holds.store(true, Ordering::Relaxed);
    driver.describe(Driver::table(0), 0, (0x8000, 4, 0, 0));
    driver.offer(0, 0);
    driver.kick(0);
    driver.function.config_write(4, &2_u16.to_le_bytes());
    let chain = lock(&driver.echo.held).pop().unwrap();
    Echo::echo(chain);
    assert_eq!(driver.used_index(0), 0);
    driver.offer(0, 0);
    driver.kick(0);
    assert!(lock(&driver.echo.held).is_empty());
    driver.function.config_write(4, &6_u16.to_le_bytes());
    assert_eq!(driver.used_index(0), 1);
    assert_eq!(lock(&driver.echo.held).len(), 1, "what became available meanwhile is taken");
}
