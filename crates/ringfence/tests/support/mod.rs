//! What the tests of the command share.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test program is a crate of its own and uses a part of this"
)]

pub mod disk;
pub mod guest;
pub mod image;
pub mod pty;

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The command, with nothing of the caller's environment that could change it.
pub fn ringfence() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.env_remove("COLUMNS").stdin(Stdio::null());
    command
}

/// Runs to the end and gives status, standard output and standard error.
pub fn finish(command: &mut Command) -> Finished {
    Finished::from(command.output().expect("the command starts"))
}

/// A run that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Finished {
    /// Fails the test unless the run ended so.
    #[track_caller]
    pub fn expect(&self, status: i32, err_holds: &[&str]) {
        assert_eq!(self.status, Some(status), "{self:#?}");
        for part in err_holds {
            assert!(self.err.contains(part), "standard error lacks {part:?}: {self:#?}");
        }
    }
}

/// Waits for a child, or kills it and fails the test.
#[track_caller]
pub fn wait(child: &mut Child, limit: Duration) -> ExitStatus {
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            return status;
        }
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            panic!("still running after {limit:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to a child.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a child has a pid");
    rustix::process::kill_process(pid, signal).expect("the child is alive");
}

/// Reads from a child's pipe until what was read ends with `text`.
#[track_caller]
pub fn read_until(from: &mut impl Read, text: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(text.as_bytes()) {
        let n = from.read(&mut byte).expect("the pipe is readable");
        assert!(n == 1, "the output ended before {text:?}: {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

/// A file with these bytes, removed when dropped.
pub fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("the file is writable");
    file
}
