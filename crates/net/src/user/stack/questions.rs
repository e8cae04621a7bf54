//! Questions for the host's resolvers: who is asked, and who next when one does not answer.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use super::Stack;
use crate::user::addresses::{Way, way};
use crate::user::datagram::Kind;
use crate::user::resolver::Asked;
use crate::user::tcp::Key;

/// Bytes of a question that is kept to be asked again; none is longer.
const LONGEST: usize = 4096;

impl Stack {
    /// Opens the way to `remote` as the host sees it by `open`. Where that is the resolver, one after the other until there is a way to
    /// one of them.
    pub(super) fn try_ways<T>(
        &mut self,
        remote: SocketAddr,
        now: Instant,
        mut open: impl FnMut(SocketAddr) -> io::Result<T>,
    ) -> Option<T> {
        let first = self.host(remote, now)?;
        let asks = way(remote) == Way::Resolver;
        let (mut to, turns) = (first, if asks { self.resolver.count() } else { 1 });
        for _ in 0..turns {
            #[cfg(any(test, feature = "fuzzing"))]
            let led = self.lead(to);
            #[cfg(not(any(test, feature = "fuzzing")))]
            let led = to;
            match open(led) {
                Ok(opened) => return Some(opened),
                Err(_) if asks => {
                    self.resolver.failed(to);
                    to = self.resolver.server(now);
                }
                Err(_) => return None,
            }
        }
        None
    }

    /// Keeps a question until it is answered, if what was sent is one.
    pub(super) fn note_question(&mut self, kind: Kind, key: Key, body: &[u8], now: Instant) {
        if kind != Kind::Udp || way(key.remote) != Way::Resolver || body.len() > LONGEST {
            return;
        }
        let left = self.resolver.count() - 1;
        let Some(socket) = self.datagrams.get_mut(&(kind, key)) else { return };
        let Ok(server) = socket.socket.peer_addr() else { return };
        match &mut socket.asked {
            // Asked again before there is an answer: the server has no more time for that.
            Some(asked) => asked.question = body.to_vec(),
            asked @ None => *asked = Some(Asked { server, at: now, left, question: body.to_vec() }),
        }
    }

    /// The resolver behind a socket has failed: asks the next. False if there is none, or nothing was asked.
    pub(super) fn ask_next(&mut self, key: (Kind, Key), now: Instant) -> bool {
        let Some(asked) = self.datagrams.get_mut(&key).and_then(|socket| socket.asked.take()) else {
            return false;
        };
        self.resolver.failed(asked.server);
        let Some(left) = asked.left.checked_sub(1) else { return false };
        // A socket of its own, so that only who was asked can answer.
        self.forget(key);
        if self.open(key.0, key.1, now).is_none() {
            return false;
        }
        let Some(socket) = self.datagrams.get_mut(&key) else { return false };
        let Ok(server) = socket.socket.peer_addr() else { return false };
        // Whether it arrives is noticed as with any other.
        let _ = socket.socket.send(&asked.question);
        socket.asked = Some(Asked { server, at: now, left, ..asked });
        true
    }

    /// Asks the next where an answer is overdue.
    pub(super) fn ask_others(&mut self, now: Instant) {
        let overdue = |asked: &Asked| asked.is_overdue(now);
        let overdue = self.datagrams.iter().filter(|(_, socket)| socket.asked.as_ref().is_some_and(overdue));
        let overdue: Vec<_> = overdue.map(|(key, _)| *key).collect();
        for key in overdue {
            self.ask_next(key, now);
        }
    }
}
