//! The guest's console on our side: standard input and output, a file, or nothing.

use std::fs::File;
use std::io::{self, stdin, stdout};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use ringfence_machine::console::{ConsoleInput, ConsoleOutput, Escape, InputEvent, Nowhere, pump};
use ringfence_machine::{MachineHandle, SerialOutput, StopReason};

use crate::args::ConsoleTarget;
use crate::terminal::{self, RawMode};

/// How long a reader of the console may take nothing before the end of the output is given up.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A console, until the machine has ended.
pub(crate) struct Console {
    target: ConsoleTarget,
    output: Option<ConsoleOutput>,
    /// Whom to stop when the output's reader is gone.
    machine: Arc<OnceLock<MachineHandle>>,
}

/// The console's file cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    #[error("cannot write the console to {path:?}")]
    File { path: std::path::PathBuf, source: io::Error },
    #[error("the host refuses a thread for the console")]
    Thread(#[source] io::Error),
}

impl Console {
    /// Opens the output.
    pub(crate) fn open(target: &ConsoleTarget) -> Result<Self, ConsoleError> {
        let machine: Arc<OnceLock<MachineHandle>> = Arc::default();
        let started = match target {
            ConsoleTarget::None => None,
            ConsoleTarget::Stdio => {
                let machine = Arc::clone(&machine);
                let closed = move |_: &io::Error| {
                    if let Some(machine) = machine.get() {
                        machine.stop(StopReason::ConsoleClosed);
                    }
                };
                Some(ConsoleOutput::start(stdout(), closed))
            }
            ConsoleTarget::File(path) => {
                let file =
                    File::create(path).map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                let path = path.clone();
                // A full disk costs the log; the guest goes on.
                let closed = move |error: &io::Error| {
                    terminal::tell(&format!(
                        "ringfence: the console's file {path:?} fails: {error}; it stays as it is"
                    ));
                };
                Some(ConsoleOutput::start(file, closed))
            }
        };
        let output = started.transpose().map_err(ConsoleError::Thread)?;
        Ok(Self { target: target.clone(), output, machine })
    }

    /// The guest's end of the output.
    pub(crate) fn port(&self) -> Arc<dyn SerialOutput> {
        self.output.as_ref().map_or_else(|| Arc::new(Nowhere) as _, ConsoleOutput::port)
    }

    /// Connects the keyboard, if the console has one. Raw mode lasts as long as what is returned.
    pub(crate) fn attach(&self, machine: MachineHandle, input: ConsoleInput) -> io::Result<Option<RawMode>> {
        let _ = self.machine.set(machine.clone());
        if self.target != ConsoleTarget::Stdio {
            return Ok(None);
        }
        let raw = RawMode::enter();
        let escape = if raw.is_some() { Escape::CtrlRightBracket } else { Escape::None };
        if raw.is_some() {
            terminal::tell("ringfence: Ctrl-] leaves the machine");
        }
        thread::Builder::new().name("console-in".to_owned()).spawn(move || {
            match pump(stdin().lock(), escape, |bytes| input.offer(bytes)) {
                InputEvent::Escaped => machine.stop(StopReason::ConsoleLeft),
                // The guest goes on without input; a terminal that hangs up sends SIGHUP.
                InputEvent::EndOfInput | InputEvent::Stopped => {}
                InputEvent::Failed(error) => terminal::tell(&format!("ringfence: no more input: {error}")),
            }
        })?;
        Ok(raw)
    }

    /// Brings out the rest of the output.
    pub(crate) fn finish(&self) {
        if let Some(output) = &self.output {
            output.finish(LAST_WORDS);
        }
    }

    /// The output, to ask what went through it.
    pub(crate) fn output(&self) -> Option<&ConsoleOutput> {
        self.output.as_ref()
    }
}
