//! Messages of the driver about the card itself (5.1.6.5): how many pairs of queues it uses. All others are refused: filters
//! of addresses and VLANs are not offered, and a card without them passes everything on.

use crate::virtio::{Chain, Port};

/// Class and command of `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERROR: u8 = 1;

/// Answers the messages of queue `queue`; `set` has the card use so many pairs, if it can.
pub(super) fn serve(port: &Port, queue: u16, mut set: impl FnMut(u16) -> bool) {
    while let Some(chain) = port.take(queue) {
        let mut message = [0; 4];
        let len = chain.read(0, &mut message);
        if len < 2 || chain.writable_len() == 0 {
            return port.fail("a message to the network card has no command, or no room for the answer");
        }
        let [class, command, pairs @ ..] = message;
        let done =
            [class, command] == SET_PAIRS && chain.readable_len() == 4 && set(u16::from_le_bytes(pairs));
        answer(chain, if done { OK } else { ERROR });
    }
}

fn answer(chain: Chain, answer: u8) {
    let written = chain.write(0, &[answer]);
    chain.complete(written as u32);
}
