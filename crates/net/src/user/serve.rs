//! The loop of the network's process.

use std::io;
use std::time::Instant;

use crate::error::NetError;
use crate::limit::Limiter;
use crate::spec::{NetSpec, UserSpec};
use crate::user::stack::Stack;
use crate::wire::MAX_MESSAGE;
use ringfence_helper::Link;
use rustix::event::PollFlags;

/// Messages read before sockets have their turn.
const BATCH: usize = 64;

/// Serves the guest at the other end of `link` until that closes. `ready` is called when the forwarded ports listen.
pub(crate) fn serve(
    link: Link,
    spec: &NetSpec,
    user: &UserSpec,
    ready: impl FnOnce(&Link),
) -> Result<(), NetError> {
    let mut stack = Stack::new(link, spec, user)?;
    ready(&stack.out.link);
    let mut inward = Limiter::new(spec.bytes, spec.packets);
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    let mut events = Vec::with_capacity(256);
    let (mut reading, mut retry) = (true, None);
    while !stack.out.gone {
        let ready = stack.wait(&mut events, reading, retry).map_err(NetError::Host)?;
        let now = Instant::now();
        if retry.is_some_and(|at| at <= now) {
            (reading, retry) = (true, None);
        }
        events.iter().for_each(|event| stack.ready(event.data.u64(), now));
        if ready.contains(PollFlags::OUT) {
            stack.room(now);
        }
        if ready.contains(PollFlags::HUP) && !reading {
            break;
        }
        if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            for _ in 0..BATCH {
                if !reading {
                    break;
                }
                if !inward.passes(now, &mut retry) {
                    reading = false;
                    break;
                }
                match stack.out.link.receive(&mut buffer, false) {
                    Ok(Some(len)) => {
                        inward.take(len);
                        // A longer one was cut short, and is not ours.
                        if len <= MAX_MESSAGE {
                            stack.message(&buffer[..len], now);
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(NetError::Host(error)),
                }
            }
            stack.batch_done(now);
        }
        stack.tick(now);
    }
    stack.out.link.fault().map_or(Ok(()), |fault| Err(NetError::Host(io::Error::other(fault))))
}
