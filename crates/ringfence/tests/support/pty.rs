//! A terminal for the command to run on.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// Our end of a pseudo-terminal, with everything read so far.
pub struct Pty {
    ours: File,
    /// Kept open, so that modes can be looked at and the terminal outlives the command.
    theirs: OwnedFd,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    searched: usize,
}

impl Pty {
    pub fn new() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).expect("a pseudo-terminal");
        grantpt(&ours).expect("grantpt");
        unlockpt(&ours).expect("unlockpt");
        let theirs = ioctl_tiocgptpeer(&ours, flags).expect("the other end");
        tcsetwinsize(&theirs, Winsize { ws_row: 33, ws_col: 111, ws_xpixel: 0, ws_ypixel: 0 })
            .expect("a size");
        let ours = File::from(ours);
        let mut reader = ours.try_clone().expect("a second descriptor");
        let (send, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { ours, theirs, output, seen: Vec::new(), searched: 0 }
    }

    /// Starts a command on the terminal.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let end = || Stdio::from(self.theirs.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("the command starts")
    }

    /// Gives the terminal another size, and tells the command on it, whose controlling terminal it is not.
    pub fn resize(&self, child: &Child, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.theirs, size).expect("a size");
        super::signal(child, rustix::process::Signal::WINCH);
    }

    pub fn modes(&self) -> Termios {
        tcgetattr(&self.theirs).expect("terminal modes")
    }

    /// Whether keys go to the program one by one and unechoed.
    pub fn is_raw(&self) -> bool {
        !self.modes().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    pub fn send(&mut self, text: &str) {
        self.ours.write_all(text.as_bytes()).expect("the terminal takes input");
    }

    /// Waits until `text` appears behind what earlier calls found; gives everything in between, `text` included.
    #[track_caller]
    pub fn expect(&mut self, text: &str, limit: Duration) -> String {
        let until = Instant::now() + limit;
        let mut looked = self.searched;
        loop {
            let mut windows = self.seen[looked..].windows(text.len());
            if let Some(at) = windows.position(|window| window == text.as_bytes()) {
                let end = looked + at + text.len();
                let found = String::from_utf8_lossy(&self.seen[self.searched..end]).into_owned();
                self.searched = end;
                return found;
            }
            // What has been looked at is not looked at again: commands may show megabytes.
            looked = looked.max((self.seen.len() + 1).saturating_sub(text.len()));
            match self.output.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("no {text:?} within {limit:?}; the terminal shows:\n{}", self.text())
                }
            }
        }
    }

    /// Everything seen so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

/// The modes that programs change, to be compared.
pub fn comparable(modes: &Termios) -> String {
    format!(
        "{:?} {:?} {:?} {:?}",
        modes.input_modes, modes.output_modes, modes.control_modes, modes.local_modes
    )
}
