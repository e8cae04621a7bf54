//! Resets, shutdown, interrupts by pin, saved state: what happens around commands.

use ringfence_disk::IoError;
use ringfence_engine::{SavedState, Stateful};
use ringfence_memory::GuestAddress;

use super::super::*;
use super::driver::*;

fn read(block: u64) -> Cmd {
    Cmd::new(2, 1).prp(DATA, 0).blocks(block, 1)
}

#[test]
fn pin_follows_what_the_guest_has_not_taken() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(",io=sync"));
    assert!(!rig.pin());
    rig.submit(1, read(0));
    rig.submit(1, read(1));
    assert!(rig.pin());
    rig.peek(1).unwrap();
    rig.taken(1);
    assert!(rig.pin(), "one is left");
    rig.set(0x0c, 1);
    assert!(!rig.pin(), "masked");
    rig.set(0x10, 1);
    assert!(rig.pin());
    rig.use_messages();
    assert!(!rig.pin(), "messages instead");
    rig.set_config(0x48, 0);
    assert!(rig.pin());
    rig.peek(1).unwrap();
    rig.taken(1);
    assert!(!rig.pin());
    rig.submit(1, read(0));
    assert!(rig.pin());
    rig.disable();
    assert!(!rig.pin(), "a reset forgets");
}

#[test]
fn commands_wait_for_room_for_their_completions() {
    let image = Image::new(1 << 20);
    let rig = Rig::ready(image.open(",io=sync"));
    rig.create_queue(1, 32, 4, None);
    let ids: Vec<u16> = (0..20).map(|i| rig.put(1, read(i))).collect();
    rig.ring(1);
    let mut seen = Vec::new();
    while seen.len() < ids.len() {
        let mut now = 0;
        while let Some(cqe) = rig.peek(1) {
            assert_eq!(cqe.status, 0);
            seen.push(cqe.id);
            now += 1;
        }
        assert_eq!(now, 3.min(ids.len() - seen.len() + now), "a queue of four holds three");
        rig.taken(1);
    }
    assert_eq!(seen, ids);
}

#[test]
fn reset_with_commands_in_flight_waits_for_them() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    for block in 0..3 {
        rig.submit(1, read(block));
    }
    rig.submit(0, Cmd::new(0xc, 0));
    assert_eq!(disk.count(), 3);
    disk.end(Ok(()));
    assert_eq!(rig.next(1).status, 0);
    rig.set_cc(ENABLED & !1);
    assert_eq!(rig.status() & 1, 1, "the disk may still write to memory");
    rig.submit(1, read(3));
    assert_eq!(disk.count(), 2, "nothing new is taken");
    disk.end(Ok(()));
    assert_eq!(rig.status() & 1, 1);
    disk.end(Err(IoError::NoSpace));
    assert_eq!(rig.status() & 1, 0);
    assert_eq!(rig.peek(1), None, "no completion after a reset");
    rig.enable();
    assert_eq!(rig.peek(0), None);
    rig.create_queue(1, 32, 32, None);
    rig.submit(1, read(0));
    disk.end(Ok(()));
    assert_eq!(rig.next(1).status, 0);
}

#[test]
fn reset_does_not_wait_for_what_limits_hold_back() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let spec = format!("{},iops=1", image.path().display()).parse().unwrap();
    let rig = Rig::running(ringfence_disk::open(&ringfence_disk::DiskOptions::new(spec)).unwrap());
    let start = std::time::Instant::now();
    for block in 0..20 {
        rig.submit(1, read(block));
    }
    rig.set_cc(ENABLED & !1);
    while rig.status() & 1 != 0 {
        assert!(start.elapsed().as_secs() < 8, "twenty reads would take twenty seconds");
        std::thread::yield_now();
    }
    // The disk is there for the next one.
    rig.enable();
    rig.create_queue(1, 32, 32, None);
    rig.submit(1, read(0));
    assert_eq!(rig.next(1).status, 0);
}

#[test]
fn enable_during_a_reset_takes_effect_after_it() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    rig.submit(1, read(0));
    rig.set_cc(ENABLED & !1);
    rig.set_cc(ENABLED);
    rig.submit(1, read(0));
    assert_eq!(disk.count(), 1);
    disk.end(Ok(()));
    assert_eq!(rig.status() & 1, 1);
    rig.memory.fill(GuestAddress(0x4000), 0, 0x1000).unwrap();
    rig.enable();
    assert_eq!(rig.admin(Cmd::new(0xa, 0).cdw(&[7])).status, 0);
    assert_eq!(rig.admin(Cmd::new(0, 0).cdw(&[1])).status, 0x101, "its queues are gone");
}

#[test]
fn deleting_a_queue_waits_for_its_commands() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    rig.submit(1, read(0));
    rig.submit(1, read(1));
    let id = rig.submit(0, Cmd::new(0, 0).cdw(&[1]));
    assert_eq!(rig.peek(0), None);
    rig.submit(1, read(2));
    assert_eq!(disk.count(), 2, "it takes no more");
    assert_eq!(rig.admin(Cmd::new(0, 0).cdw(&[1])).status, 0x101, "once is enough");
    assert_eq!(rig.admin(Cmd::new(4, 0).cdw(&[1])).status, 0x10c);
    disk.end(Ok(()));
    assert_eq!(rig.peek(0), None);
    disk.end(Ok(()));
    assert_eq!((rig.next(1).status, rig.next(1).status), (0, 0));
    let deleted = rig.next(0);
    assert_eq!((deleted.id, deleted.status), (id, 0));
    assert_eq!(rig.admin(Cmd::new(4, 0).cdw(&[1])).status, 0);
    rig.forget_queue();
    rig.create_queue(1, 8, 8, None);
    rig.submit(1, read(0));
    disk.end(Ok(()));
    assert_eq!(rig.next(1).sq_head, 1);
}

#[test]
fn shutdown_flushes_after_the_last_command() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    rig.submit(1, Cmd::new(1, 1).prp(DATA, 0).blocks(0, 1));
    rig.set_cc(ENABLED | 1 << 14);
    assert_eq!(rig.status(), 1 | 1 << 2);
    disk.end(Ok(()));
    assert_eq!((rig.status(), rig.next(1).status), (1 | 1 << 2, 0));
    assert_eq!(disk.end(Ok(())), "Flush");
    assert_eq!(rig.status(), 1 | 2 << 2);
    rig.submit(1, read(0));
    assert_eq!(disk.count(), 0, "it is shut down");
    rig.disable();
    rig.enable();
    assert_eq!(rig.status(), 1);
    // A shutdown cut short by a reset, and one of a controller that is off.
    rig.set_cc(ENABLED | 2 << 14);
    rig.set_cc(0);
    assert_eq!(rig.status() & 1, 1);
    disk.end(Err(IoError::NoSpace));
    assert_eq!(rig.status(), 0);
    rig.set_cc(1 << 14);
    assert_eq!(rig.status(), 1 << 2);
    disk.end(Ok(()));
    assert_eq!(rig.status(), 2 << 2);
}

#[test]
fn without_bus_mastering_memory_is_left_alone() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    rig.use_messages();
    rig.submit(1, read(0));
    rig.set_command(2);
    let next = rig.submit(1, read(1));
    assert_eq!(disk.count(), 1, "no command is fetched");
    disk.end(Ok(()));
    assert_eq!((rig.peek(1), rig.messages()), (None, vec![]), "no completion is written");
    rig.set_command(6);
    assert_eq!((rig.next(1).status, rig.messages()), (0, vec![1]));
    disk.end(Ok(()));
    assert_eq!((rig.next(1).id, rig.messages()), (next, vec![1]));
}

#[test]
fn machine_reset_leaves_a_controller_as_after_power_on() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(""));
    rig.use_messages();
    rig.submit(1, rig.transfer(2, 0, 2048, 512, DATA));
    rig.controller.reset();
    rig.messages();
    rig.set_command(6);
    assert_eq!((rig.status(), rig.get(0x14), rig.get(0x24), rig.get(0x28)), (0, 0, 0, 0));
    rig.enable();
    rig.create_queue(1, 8, 8, Some(0));
    assert!(rig.run(1, read(5)).status == 0 && rig.messages().is_empty());
}

/// Saves a controller and loads the state into another one on the same memory.
fn move_to_another(rig: &Rig, disk: Arc<dyn BlockDevice>) -> Controller2 {
    rig.controller.quiesce();
    let saved = rig.controller.save();
    let json = serde_json::to_string(&saved).unwrap();
    let new = Rig::on(Arc::clone(&rig.memory), config(&[disk], None));
    let saved: SavedState = serde_json::from_str(&json).unwrap();
    new.controller.restore(&saved).unwrap();
    assert_eq!(new.controller.save(), saved);
    Controller2(new)
}

struct Controller2(Rig);

#[test]
fn saved_controller_goes_on_elsewhere() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(",readonly"));
    rig.use_messages();
    assert_eq!(rig.admin(Cmd::new(9, 0).cdw(&[0xb, 2])).status, 0);
    let held = rig.submit(0, Cmd::new(0xc, 0));
    for block in 0..45 {
        assert_eq!(rig.run(1, read(block)).status, 0);
    }
    // A completion that is there and has not been taken.
    rig.submit(1, read(77));
    rig.controller.quiesce();
    rig.bench.messages();
    let Controller2(new) = move_to_another(&rig, image.open(",readonly"));
    // The old rig knows where the queues stand; its memory is the new one's.
    new.adopt(&rig);
    assert_eq!(new.next(1).status, 0);
    assert_eq!(new.run(1, read(78)).sq_head, 47 % 32);
    assert_eq!(new.bench.messages(), [(0xfee0_0000, 0x41)]);
    assert_eq!(new.bytes(DATA, 512), image.bytes()[78 * 512..79 * 512]);
    new.doorbell(50, 0);
    assert_eq!((new.next(0).id, new.admin(Cmd::new(0xa, 0).cdw(&[0xb])).result), (held, 2));
}

#[test]
fn saved_state_that_cannot_be_is_refused() {
    let image = Image::new(1 << 20);
    let rig = Rig::running(image.open(""));
    let good = rig.controller.save();
    let change = |path: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.fields.pointer_mut(path).unwrap() = value;
        assert!(rig.controller.restore(&bad).is_err(), "{path}");
        assert_eq!(rig.controller.save(), good);
    };
    change("/submissions/1/size", 0.into());
    change("/submissions/1/head", 32.into());
    change("/submissions/1/tail", 1000.into());
    change("/submissions/1/completion", 3.into());
    change("/submissions/1/completion", 9.into());
    change("/submissions/1/base", RAM.into());
    change("/submissions/1/deleted_by", 3.into());
    change("/completions/1/base", 0x8001.into());
    change("/completions/1/size", 1_000_000.into());
    change("/completions/1/vector", 5.into());
    change("/completions/0", serde_json::Value::Null);
    change("/completions", serde_json::json!([]));
    change("/features/queues", 0.into());
    change("/features/vectors", serde_json::json!([]));
    change("/events/requests", serde_json::json!([1, 2, 3, 4, 5]));
    change("/csts", 0.into());
    change("/endpoint/config", serde_json::json!([1]));
    let ticket =
        serde_json::json!({"ticket": {"queue": 2, "id": 1, "namespace": 1}, "result": 0, "status": 0});
    change("/postponed", serde_json::json!([ticket]));
    let mut many = ticket.clone();
    many["ticket"]["queue"] = 1.into();
    change("/postponed", vec![many; 32].into());
}

#[test]
fn completions_postponed_are_saved() {
    let disk = held();
    let rig = Rig::running(Arc::clone(&disk) as _);
    rig.submit(1, read(0));
    let delete = rig.submit(0, Cmd::new(0, 0).cdw(&[1]));
    rig.set_command(2);
    disk.end(Ok(()));
    let Controller2(new) = move_to_another(&rig, Arc::clone(&disk) as _);
    new.adopt(&rig);
    assert_eq!(new.peek(1), None);
    new.set_command(6);
    assert_eq!((new.next(1).status, new.next(0).id), (0, delete));
}
