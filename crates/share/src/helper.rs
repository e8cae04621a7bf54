//! The process of a shared folder: threads that answer what comes over the link.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, Ordering};

use ringfence_helper::{Helper, HelperError, Link};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;

use crate::error::ShareError;
use crate::server::Server;
use crate::spec::ShareSpec;
use crate::wire::{MAX_ANSWER, MAX_REQUEST};

/// The hidden subcommand of our program that becomes [`helper_main`].
pub const SUBCOMMAND: &str = "share-helper";

/// Requests that are worked on at once: others need not wait for a slow disk.
const THREADS: usize = 4;
/// Bytes before each answer on the link: the machine's number for the request.
pub const NUMBER: usize = 4;
/// Bytes before each request on the link: its number, and how many bytes of answer the guest has room for.
pub const HEAD: usize = NUMBER + 4;

/// Starts the process for a shared folder and waits until it has the folder.
///
/// # Errors
/// [`ShareError`], which tells why the folder cannot be shared.
pub fn start(spec: &ShareSpec) -> Result<Helper, ShareError> {
    Helper::start(SUBCOMMAND, &spec.to_string()).map_err(|error| match error {
        HelperError::Start(source) => ShareError::Start(source),
        HelperError::Refused(text) => ShareError::Refused(text),
    })
}

/// What the process does: serves the link at standard input until that closes. Returns its exit status.
pub fn helper_main(spec: &str) -> u8 {
    let Ok(spec) = spec.parse::<ShareSpec>() else { return 2 };
    // The guest's own has been applied to what it asks for.
    rustix::process::umask(Mode::empty());
    ringfence_helper::helper_main(|link, ready| {
        let server = Server::new(&spec)?;
        ready();
        serve(&link, &server)
    })
}

/// Answers what comes over `link` until that closes.
///
/// # Errors
/// [`ShareError::Host`] if the host has no threads or the link fails.
pub fn serve(link: &Link, server: &Server) -> Result<(), ShareError> {
    let ended = AtomicBool::new(false);
    let work = || {
        let result = answer_all(link, server, &ended);
        // The others wait in the link.
        ended.store(true, Ordering::SeqCst);
        link.shutdown();
        result
    };
    std::thread::scope(|scope| {
        for _ in 1..THREADS {
            std::thread::Builder::new().name("share".to_owned()).spawn_scoped(scope, work)?;
        }
        work()
    })
    .map_err(ShareError::Host)
}

fn answer_all(link: &Link, server: &Server, ended: &AtomicBool) -> io::Result<()> {
    let mut request = vec![0; HEAD + MAX_REQUEST + 1];
    let mut answer = Vec::with_capacity(NUMBER + MAX_ANSWER);
    while !ended.load(Ordering::SeqCst) {
        let Some(len) = link.receive(&mut request, true)? else { return Ok(()) };
        let Some((number, room, body)) = split(&request[..len]) else { continue };
        answer.clear();
        answer.extend(number);
        server.answer(body, room, &mut answer);
        while let Err(error) = link.send(&[IoSlice::new(&answer)]) {
            if error.kind() != io::ErrorKind::WouldBlock {
                return Ok(());
            }
            let mut fds = [PollFd::new(link, PollFlags::OUT)];
            let _ = poll(&mut fds, None);
        }
    }
    Ok(())
}

fn split(message: &[u8]) -> Option<([u8; NUMBER], usize, &[u8])> {
    let (number, rest) = message.split_first_chunk::<NUMBER>()?;
    let (room, body) = rest.split_first_chunk::<4>()?;
    Some((*number, u32::from_le_bytes(*room) as usize, body))
}
