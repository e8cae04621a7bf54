use super::*;
use crate::testing::{Bench, Requests, poke, read8, write8};

fn port92() -> (Arc<GuestMemory>, Arc<Requests>, Arc<Port92>) {
    let memory = Arc::new(GuestMemory::flat(0x1000).unwrap());
    let requests = Arc::new(Requests::default());
    let port = Port92::new(Arc::clone(&memory), Arc::clone(&requests) as _);
    (memory, requests, port)
}

#[test]
fn bit_1_moves_the_a20_gate() {
    let (memory, requests, port) = port92();
    assert_eq!(read8(&*port, 0), A20);
    write8(&*port, 0, 0);
    assert_eq!((memory.a20_mask(), read8(&*port, 0)), (!(1 << 20), 0));
    write8(&*port, 0, A20);
    assert_eq!((memory.a20_mask(), read8(&*port, 0)), (!0, A20));
    assert_eq!(requests.take(), []);
}

#[test]
fn bit_0_resets() {
    let (_, requests, port) = port92();
    write8(&*port, 0, A20 | RESET);
    assert_eq!(requests.take(), [PowerEvent::Reset]);
    poke(&*port, 1, &Bench::new(), 2);
}
