use super::*;
use crate::testing::{Bench, Requests, poke, write8};

#[test]
fn written_value_becomes_the_exit_status() {
    let requests = Arc::new(Requests::default());
    let device = DebugExit::new(0xf4, Arc::clone(&requests) as _);
    write8(&*device, 0, 0x10);
    device.write(0, &[0x21, 0x43, 0, 0]);
    let events = requests.take();
    assert_eq!(events, [PowerEvent::DebugExit(0x10), PowerEvent::DebugExit(0x4321)]);
    assert_eq!(events[0].exit_status(), Some(0x21));
    assert_eq!(PowerEvent::DebugExit(u32::MAX).exit_status(), Some(0xff));
    poke(&*device, 4, &Bench::new(), 1);
}
