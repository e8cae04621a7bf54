//! The user's terminal: raw mode while the guest has it, and back again whatever happens.
//!
//! The modes found at the start are kept in one place for the whole process, because every way out must reach
//! them: the normal end, an error, a panic on any thread, a signal, and being stopped with SIGTSTP.

use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

struct Modes {
    /// As they were before raw mode.
    found: Termios,
    /// Raw mode is in force.
    raw: bool,
}

static MODES: Mutex<Option<Modes>> = Mutex::new(None);

/// Raw mode for as long as this lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input into raw mode. `None` if standard input is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        if !stdin().is_terminal() {
            return None;
        }
        let found = tcgetattr(stdin()).ok()?;
        *MODES.lock().unwrap_or_else(PoisonError::into_inner) = Some(Modes { found, raw: false });
        resume();
        Some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
        *MODES.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Puts the modes back that were found. Harmless at any time, on any thread.
pub(crate) fn restore() {
    if let Some(modes) = MODES.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
        && modes.raw
    {
        // Nothing better can be done if the terminal has gone away.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes.found);
        modes.raw = false;
    }
}

/// Raw mode again after [`restore`], if it was entered before.
pub(crate) fn resume() {
    if let Some(modes) = MODES.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        let mut raw = modes.found.clone();
        raw.make_raw();
        // A terminal that refuses raw mode still shows output and takes lines.
        modes.raw = tcsetattr(stdin(), OptionalActions::Now, &raw).is_ok();
    }
}

fn is_raw() -> bool {
    MODES.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|modes| modes.raw)
}

/// Rows and columns of the terminal that shows the console, if it is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdout()).ok().filter(|_| stdin().is_terminal())?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// A message of ours on standard error, readable in raw mode too.
pub(crate) fn tell(message: &str) {
    let (start, end) = if is_raw() { ("\r", "\r\n") } else { ("", "\n") };
    let message = message.trim_end().lines().collect::<Vec<_>>().join(end);
    // In one piece, so that nothing of the guest's comes between. With standard error closed there is nobody to tell.
    let _ = stderr().lock().write_all(format!("{start}{message}{end}").as_bytes());
}
