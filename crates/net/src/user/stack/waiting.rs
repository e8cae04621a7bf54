//! What the stack waits for: the host's sockets, the link, and time.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::buffer::spare_capacity;
use rustix::event::{PollFlags, epoll};

use super::{LINK, Stack};
use crate::limit::time_until;

impl Stack {
    /// Waits for something to do: what the link is ready for, of frames, unless the limit holds them back, and room, when there is
    /// none; and the tokens of what else is ready.
    pub(crate) fn wait(
        &mut self,
        events: &mut Vec<epoll::Event>,
        reading: bool,
        until: Option<Instant>,
    ) -> io::Result<PollFlags> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, reading);
        wanted.set(PollFlags::OUT, self.out.is_full());
        let now = Instant::now();
        let soonest = [self.sweep, self.tidy, self.out.retry, until].into_iter().flatten().min();
        let (epoll, link, link_watched) = (&self.epoll, &self.out.link, &mut self.link_watched);
        link.wait(wanted, |watched, at_once| {
            if std::mem::replace(link_watched, watched) != watched {
                let mut flags = epoll::EventFlags::empty();
                flags.set(epoll::EventFlags::IN, watched.contains(PollFlags::IN));
                flags.set(epoll::EventFlags::OUT, watched.contains(PollFlags::OUT));
                let _ = epoll::modify(epoll, link, epoll::EventData::new_u64(LINK), flags);
            }
            let until = if at_once { Some(now) } else { soonest };
            events.clear();
            let timeout = until.map(|at| time_until(at, now));
            match epoll::wait(epoll, spare_capacity(events), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut seen = PollFlags::empty();
            events.retain(|event| {
                let (token, flags) = (event.data.u64(), event.flags);
                if token == LINK {
                    seen.set(PollFlags::IN, flags.contains(epoll::EventFlags::IN));
                    seen.set(PollFlags::OUT, flags.contains(epoll::EventFlags::OUT));
                    seen.set(
                        PollFlags::HUP,
                        flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
                    );
                }
                token != LINK
            });
            Ok(seen)
        })
    }
}

/// Changes what a socket is watched for: readable, writable.
pub(super) fn watch(
    epoll: &OwnedFd,
    socket: BorrowedFd<'_>,
    token: u64,
    was: (bool, bool),
    now: (bool, bool),
) {
    if was == now {
        return;
    }
    let mut flags = epoll::EventFlags::empty();
    flags.set(epoll::EventFlags::IN, now.0);
    flags.set(epoll::EventFlags::OUT, now.1);
    let data = epoll::EventData::new_u64(token);
    // The only failure is a lack of memory: the socket then stays silent, and the guest's own timers end it.
    let _ = match (was, now) {
        (_, (false, false)) => epoll::delete(epoll, socket),
        ((false, false), _) => epoll::add(epoll, socket, data, flags),
        _ => epoll::modify(epoll, socket, data, flags),
    };
}
