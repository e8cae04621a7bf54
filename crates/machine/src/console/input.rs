//! Bytes from the host to the guest's serial port.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ringfence_devices::serial::SerialInput;

/// The byte of Ctrl-].
const CTRL_RIGHT_BRACKET: u8 = 0x1d;

/// Whether Ctrl-] is a command to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Yes: input comes from a keyboard.
    CtrlRightBracket,
    /// No: every byte goes to the guest.
    None,
}

/// A console's receiving side, for a thread that may wait.
#[derive(Clone)]
pub struct ConsoleInput {
    device: Arc<dyn SerialInput>,
    room: Arc<Room>,
}

#[derive(Debug, Default)]
struct Room {
    /// Set whenever the port has room again after it refused some.
    there: Mutex<bool>,
    changed: Condvar,
    ended: AtomicBool,
}

/// How long to wait for the guest before looking whether the machine has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

impl std::fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleInput")
    }
}

impl ConsoleInput {
    pub(crate) fn new(device: Arc<dyn SerialInput>) -> Self {
        let room: Arc<Room> = Arc::default();
        let wake = Arc::downgrade(&room);
        device.on_input_room(Box::new(move || {
            if let Some(room) = wake.upgrade() {
                *room.there.lock().unwrap_or_else(PoisonError::into_inner) = true;
                room.changed.notify_all();
            }
        }));
        Self { device, room }
    }

    /// Hands some bytes from the front of `bytes` to the guest, waiting until it takes any. Returns how many; 0 means
    /// that the machine has ended.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        while !self.room.ended.load(Ordering::Acquire) {
            let taken = self.device.input(bytes);
            if taken > 0 || bytes.is_empty() {
                return taken;
            }
            let there = self.room.there.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.room.changed.wait_timeout_while(there, LOOK_AGAIN, |there| !*there);
            *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
        }
        0
    }

    /// Tells the guest of the terminal's size, if its console is a device that can.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.device.resize(columns, rows);
    }

    /// The machine has ended: nobody shall wait any more.
    pub(crate) fn end(&self) {
        self.room.ended.store(true, Ordering::Release);
        self.room.changed.notify_all();
    }
}

/// How the input ended.
#[derive(Debug)]
pub enum InputEvent {
    /// Nothing more to read.
    EndOfInput,
    /// Ctrl-] was typed.
    Escaped,
    /// The guest's side does not take anything any more.
    Stopped,
    /// Reading failed.
    Failed(io::Error),
}

/// Copies `source` to the guest until it ends. `offer` takes some bytes from the front of what it is given, waits
/// if the guest is slow, and returns how many it took; 0 means that the machine has ended.
pub fn pump(mut source: impl Read, escape: Escape, mut offer: impl FnMut(&[u8]) -> usize) -> InputEvent {
    let mut buffer = [0; 4096];
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => return InputEvent::EndOfInput,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return InputEvent::Failed(error),
        };
        let read = &buffer[..n];
        let escaped = match escape {
            Escape::CtrlRightBracket => read.iter().position(|&b| b == CTRL_RIGHT_BRACKET),
            Escape::None => None,
        };
        let mut rest = &read[..escaped.unwrap_or(n)];
        while !rest.is_empty() {
            match offer(rest) {
                0 => return InputEvent::Stopped,
                taken => rest = rest.get(taken..).unwrap_or_default(),
            }
        }
        if escaped.is_some() {
            return InputEvent::Escaped;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(input: &[u8], escape: Escape, step: usize) -> (Vec<u8>, InputEvent) {
        let mut got = Vec::new();
        let event = pump(input, escape, |bytes| {
            let n = bytes.len().min(step);
            got.extend(&bytes[..n]);
            n
        });
        (got, event)
    }

    #[test]
    fn all_bytes_pass_without_escape() {
        let (got, event) = run(b"a\x1db", Escape::None, 1);
        assert_eq!(got, b"a\x1db");
        assert!(matches!(event, InputEvent::EndOfInput));
    }

    #[test]
    fn escape_ends_after_what_came_before() {
        let (got, event) = run(b"ab\x1dcd", Escape::CtrlRightBracket, 7);
        assert_eq!(got, b"ab");
        assert!(matches!(event, InputEvent::Escaped));
    }

    #[test]
    fn ended_machine_ends_the_input() {
        assert!(matches!(run(b"abc", Escape::None, 0).1, InputEvent::Stopped));
    }
}
