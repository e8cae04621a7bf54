use super::*;
use crate::testing::{Bench, Requests, poke, read8, write8};

#[test]
fn panic_is_reported_and_other_events_are_not() {
    let requests = Arc::new(Requests::default());
    let device = PvPanic::new(Arc::clone(&requests) as _);
    assert_eq!(read8(&*device, 0), PANICKED);
    write8(&*device, 0, 2);
    assert_eq!(requests.take(), []);
    write8(&*device, 0, 3);
    assert_eq!(requests.take(), [PowerEvent::GuestPanic]);
    poke(&*device, 1, &Bench::new(), 13);
}
