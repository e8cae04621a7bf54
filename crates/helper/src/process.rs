//! Starting such a process, and being one.

use std::error::Error;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use crate::link::Link;

/// The first message from the process: it is ready, or why not.
const READY: u8 = 0x80;
const FAILED: u8 = 0x81;

/// A process that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The host's refusal.
    #[error("cannot start a process for it")]
    Start(#[from] io::Error),
    /// What the process said before it ended.
    #[error("{0}")]
    Refused(String),
}

/// The machine's handle on a process. Dropping it ends the process.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    /// The machine's end of the link.
    pub link: Link,
}

impl Helper {
    /// Starts our program with `subcommand` and `argument`, and waits until it is ready.
    ///
    /// # Errors
    /// [`HelperError`], which tells what the process could not have, such as a port to listen on.
    pub fn start(subcommand: &str, argument: &str) -> Result<Self, HelperError> {
        Self::start_with(subcommand, argument, None)
    }

    /// The same with rings for messages of up to `longest` bytes, which the process takes with [`Link::take_rings`].
    ///
    /// # Errors
    /// As [`Helper::start`].
    pub fn start_with_rings(subcommand: &str, argument: &str, longest: usize) -> Result<Self, HelperError> {
        Self::start_with(subcommand, argument, Some(longest))
    }

    fn start_with(subcommand: &str, argument: &str, longest: Option<usize>) -> Result<Self, HelperError> {
        let (link, other) = Link::pair()?;
        let offer = longest.map(|longest| link.offer_rings(longest)).transpose()?;
        let program = std::env::current_exe()?;
        let child = Command::new(program)
            // An argument may begin like an option.
            .args([subcommand, "--", argument])
            .stdin(Stdio::from(other.into_socket()))
            .stdout(Stdio::null())
            .spawn()?;
        let mut helper = Self { child, link };
        let mut answer = [0; 1024];
        match helper.link.receive(&mut answer, true)? {
            Some(len) => match &answer[..len] {
                [READY] => {
                    offer.into_iter().for_each(|offer| helper.link.use_rings(offer));
                    Ok(helper)
                }
                [FAILED, text @ ..] => Err(HelperError::Refused(String::from_utf8_lossy(text).into_owned())),
                _ => Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            },
            None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
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

/// Calls at most once what tells the machine that the process has all that it needs.
pub type Ready<'a> = &'a mut dyn FnMut();

/// What the process does: `serve`s the link at standard input until that closes. Returns its exit status.
pub fn helper_main<E: Error>(serve: impl FnOnce(Link, Ready<'_>) -> Result<(), E>) -> u8 {
    // With the machine, should that be killed; the closed link tells too.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    // A terminal's signals are for the machine, which ends this process.
    let _ = rustix::process::setpgid(None, None);
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
    let Ok(link) = io::stdin().as_fd().try_clone_to_owned() else { return 1 };
    let link = Link::new(link);
    let Ok(answers) = link.try_clone() else { return 1 };
    let mut told = false;
    let mut ready = || {
        told = true;
        let _ = answers.send(&[IoSlice::new(&[READY])]);
    };
    match serve(link, &mut ready) {
        Ok(()) => 0,
        Err(error) => {
            let mut text = error.to_string();
            if let Some(source) = error.source()
                && !text.contains(&source.to_string())
            {
                text = format!("{text}: {source}");
            }
            if told {
                eprintln!("ringfence: {text}");
            } else {
                // What the other side reads at most; a character cut in two is replaced there.
                let text = &text.as_bytes()[..text.len().min(1000)];
                let _ = answers.send(&[IoSlice::new(&[FAILED]), IoSlice::new(text)]);
            }
            1
        }
    }
}
