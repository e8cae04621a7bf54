//! The process of vsock: one thread, one `epoll`.

use std::io;

use ringfence_helper::{Helper, HelperError, Link};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;

use crate::error::VsockError;
use crate::spec::VsockSpec;
use crate::switch::{LINK, LISTENER, Switch};
use crate::wire::MAX_MESSAGE;

/// The hidden subcommand of our program that becomes [`helper_main`].
pub const SUBCOMMAND: &str = "vsock-helper";

/// Messages read before sockets have their turn.
const BATCH: usize = 64;

/// Starts the process of a machine's vsock and waits until it listens.
///
/// # Errors
/// [`VsockError`], which tells why it cannot.
pub fn start(spec: &VsockSpec) -> Result<Helper, VsockError> {
    Helper::start(SUBCOMMAND, &spec.to_string()).map_err(|error| match error {
        HelperError::Start(source) => VsockError::Start(source),
        HelperError::Refused(text) => VsockError::Refused(text),
    })
}

/// What the process does: serves the link at standard input until that closes. Returns its exit status.
pub fn helper_main(spec: &str) -> u8 {
    let Ok(spec) = spec.parse::<VsockSpec>() else { return 2 };
    ringfence_helper::helper_main(|link, ready| serve(link, &spec, ready))
}

/// Serves the guest at the other end of `link` until that closes. `ready` is called when programs of the host can connect.
///
/// # Errors
/// [`VsockError`] for what the host does not give.
pub fn serve(link: Link, spec: &VsockSpec, ready: &mut dyn FnMut()) -> Result<(), VsockError> {
    let mut switch = Switch::new(link, spec)?;
    ready();
    let result = run(&mut switch).map_err(VsockError::Host);
    // Not when the process is killed; the next one finds that nobody listens there.
    let _ = std::fs::remove_file(&spec.socket);
    result
}

fn run(switch: &mut Switch) -> io::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    let mut events = Vec::with_capacity(256);
    loop {
        switch.watch_link();
        match epoll::wait(&switch.epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events.drain(..) {
            let flags = event.flags;
            match event.data.u64() {
                LINK if flags.contains(epoll::EventFlags::HUP) => return Ok(()),
                LINK if flags.contains(epoll::EventFlags::IN) => {
                    if !receive(switch, &mut buffer)? {
                        return Ok(());
                    }
                }
                LINK => {}
                LISTENER => switch.accept(),
                id => switch.ready(id),
            }
        }
        match switch.pump() {
            Ok(()) => {}
            // The machine has ended.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
}

/// Takes what the guest has sent. False at the end of the link.
fn receive(switch: &mut Switch, buffer: &mut [u8]) -> io::Result<bool> {
    for _ in 0..BATCH {
        if !switch.reads() {
            break;
        }
        match switch.link.receive(buffer, false) {
            Ok(Some(len)) => switch.message(buffer.get(..len).unwrap_or_default()),
            Ok(None) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
