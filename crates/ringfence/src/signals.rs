//! What signals from the host do to a running machine.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ringfence_machine::console::ConsoleInput;
use ringfence_machine::{MachineHandle, StopReason};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::terminal;

/// Lets SIGXFSZ, the signal of a write past the limit on the size of files, end nothing. The write itself fails, too, and
/// that is told where it belongs: the guest sees an error of its disk.
///
/// # Errors
/// If the host refuses the handler.
pub(crate) fn survive_size_limit() -> io::Result<()> {
    // A handler that does hardly anything, since ignoring a signal takes unsafe code.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
}

/// Ends the machine on SIGINT, SIGHUP and SIGQUIT; on SIGTERM presses its power button first and gives it `patience`
/// to switch itself off. The second of these signals ends the process on the spot. Holds the machine while we are
/// stopped by SIGTSTP, and tells `console` of the terminal's size on SIGWINCH. In raw mode the terminal sends none of them for a key.
///
/// # Errors
/// If the host refuses the handlers or a thread.
pub(crate) fn watch(machine: MachineHandle, console: ConsoleInput, patience: Duration) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGWINCH])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut ending = false;
        for signal in signals.forever() {
            match signal {
                SIGWINCH => {
                    if let Some((rows, columns)) = terminal::size() {
                        console.resize(columns, rows);
                    }
                }
                SIGTSTP => {
                    machine.pause();
                    terminal::restore();
                    let stopped = emulate_default_handler(signal);
                    terminal::resume();
                    machine.resume();
                    if let Err(error) = stopped {
                        terminal::tell(&format!("ringfence: cannot stop: {error}"));
                    }
                }
                _ if ending => {
                    terminal::restore();
                    // Does not return for these signals.
                    let _ = emulate_default_handler(signal);
                }
                SIGTERM => {
                    ending = true;
                    machine.ask_to_stop(StopReason::Signal(signal), patience);
                }
                _ => {
                    ending = true;
                    machine.stop(StopReason::Signal(signal));
                }
            }
        }
    })?;
    Ok(())
}
