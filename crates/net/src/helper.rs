//! The network's process: our own program again, with the link as its standard input and nothing else of the machine's.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use crate::error::NetError;
use crate::link::Link;
use crate::spec::{Backend, NetSpec};
use crate::wire::CONTROL;
use crate::{tap, user};

/// The hidden subcommand of our program that becomes [`helper_main`].
pub const SUBCOMMAND: &str = "net-helper";

const READY: u8 = 0x80;
const FAILED: u8 = 0x81;

/// The machine's handle on the process. Dropping it ends the process.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    /// The machine's end of the link.
    pub link: Link,
}

impl Helper {
    /// Starts the process and waits until the network is there.
    ///
    /// # Errors
    /// [`NetError`], which tells what the process could not have, such as a port to listen on.
    pub fn start(spec: &NetSpec) -> Result<Self, NetError> {
        let (link, other) = Link::pair().map_err(NetError::Start)?;
        let program = std::env::current_exe().map_err(NetError::Start)?;
        let child = Command::new(program)
            .args([SUBCOMMAND, &spec.to_string()])
            .stdin(Stdio::from(other.into_socket()))
            .stdout(Stdio::null())
            .spawn()
            .map_err(NetError::Start)?;
        let helper = Self { child, link };
        let mut answer = [0; 1024];
        match helper.link.receive(&mut answer, true).map_err(NetError::Start)? {
            Some(len) => match &answer[..len] {
                [CONTROL, READY] => Ok(helper),
                [CONTROL, FAILED, text @ ..] => {
                    Err(NetError::Refused(String::from_utf8_lossy(text).into_owned()))
                }
                _ => Err(NetError::Start(io::ErrorKind::InvalidData.into())),
            },
            None => Err(NetError::Start(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.link.shutdown();
        // It ends by itself; if something is wrong with it, it is ended. Killed in either case, it holds nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the process does: serves the link at standard input until that closes. Returns its exit status.
pub fn helper_main(spec: &str) -> u8 {
    // With the machine, should that be killed; the closed link tells too.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    // A terminal's signals are for the machine, which ends this process.
    let _ = rustix::process::setpgid(None, None);
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    let Ok(spec) = spec.parse::<NetSpec>() else { return 2 };
    let Ok(link) = io::stdin().as_fd().try_clone_to_owned() else { return 1 };
    let link = Link::new(link);
    let Ok(answers) = link.try_clone() else { return 1 };
    let mut told = false;
    let ready = |link: &Link| {
        told = true;
        let _ = link.send(&[IoSlice::new(&[CONTROL, READY])]);
    };
    match serve(link, &spec, ready) {
        Ok(()) => 0,
        Err(error) => {
            let mut text = error.to_string();
            if let Some(source) = std::error::Error::source(&error)
                && !text.contains(&source.to_string())
            {
                text = format!("{text}: {source}");
            }
            if told {
                eprintln!("ringfence: {text}");
            } else {
                // What the other side reads at most; a character cut in two is replaced there.
                let text = &text.as_bytes()[..text.len().min(1000)];
                let _ = answers.send(&[IoSlice::new(&[CONTROL, FAILED]), IoSlice::new(text)]);
            }
            1
        }
    }
}

/// Serves the guest at the other end of `link`; `ready` is called when the network is there.
pub(crate) fn serve(link: Link, spec: &NetSpec, ready: impl FnOnce(&Link)) -> Result<(), NetError> {
    match &spec.backend {
        Backend::User(user) => user::serve(link, spec, user, ready),
        Backend::Tap(name) => tap::serve(&link, name, spec, ready),
    }
}
